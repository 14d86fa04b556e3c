"""From a trace with character spans to token ids with token spans: one tokenisation, read through its offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ..data import IGNORED

OPEN, CLOSE = "<think>", "</think>"
_ASKED, _SAID = "\ue000asked\ue001", "\ue000said\ue001"
"""Texts of private-use characters that stand for a query and an answer while a template is looked at."""

Span = tuple[int, int]
"""[start, end)."""


@dataclass(frozen=True)
class Trace:
    """A query and its ``<think>`` response; ``understanding`` and ``key`` in characters of the response."""

    id: str
    prompt: str
    response: str
    harmful: bool
    understanding: Span
    key: Span


@dataclass(frozen=True)
class Spanned:
    """A trace in tokens. ``labels``: IGNORED outside of what the model is to write.

    ``query`` (its content alone), ``understanding`` and ``key`` are ranges of tokens, in this order, not empty.
    """

    ids: list[int]
    labels: list[int]
    query: Span
    understanding: Span
    key: Span
    harmful: bool


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around a query and a response: ``before`` query ``after`` response ``end``.

    ``opened``: ``after`` ends inside the reasoning, with the opening tag, which the response then does not repeat.
    """

    before: str
    after: str
    end: str
    opened: bool


def frame_of(tokenizer: Any) -> Frame:
    """Read the frame off the tokenizer's template.

    Many templates drop the reasoning of turns that are over, so a conversation is not rendered whole: the response is
    written after the generation prompt, as the model will write it, and ended by what the template ends answers with.

    Raises:
        ConfigError: no template, no offsets, a template that does not print the query once and unchanged, or one
            without a think block.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template", "Give a chat model, or set tokenizer.chat_template.")
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer gives no character offsets (it is not a fast tokenizer)")
    user = {"role": "user", "content": _ASKED}
    head = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": _SAID}], tokenize=False)
    if head.count(_ASKED) != 1 or whole.count(_SAID) != 1:
        raise ConfigError("the chat template does not print a user's and an assistant's turn once each, unchanged")
    before, _, after = head.partition(_ASKED)
    opened = after.rstrip().endswith(OPEN)
    if not opened and OPEN not in tokenizer.get_chat_template():
        raise ConfigError(
            f"the chat template has no think block: nothing in it says {OPEN}",
            "Give a reasoning model, or teach this one the form: --think-template adds the opening tag to what "
            "answers begin with, and to the template of the output.",
        )
    rest = whole.partition(_SAID)[2]
    at = rest.find(tokenizer.eos_token)
    end = tokenizer.eos_token if at < 0 else rest[: at + len(tokenizer.eos_token)]
    return Frame(before, after, end, opened)


def add_think_template(tokenizer: Any) -> None:
    """Let the template's generation prompt end with ``<think>`` and a line break, where it has no think block yet.

    Raises:
        ConfigError: it has one already.
    """
    template = tokenizer.get_chat_template()
    if OPEN in template:
        raise ConfigError("the chat template has a think block already", "Leave out --think-template.")
    tokenizer.chat_template = template + "{% if add_generation_prompt %}{{ '" + OPEN + "\\n' }}{% endif %}"


class RowError(ValueError):
    """Why a trace cannot be trained on, without any of its text."""


def spanned(tokenizer: Any, frame: Frame, trace: Trace, *, max_length: int) -> Spanned:
    """Tokenise a trace once and find its spans.

    A token belongs to the span that holds its first character that is no white space; a token of white space alone
    between two spans belongs to neither. The query is the exception: a token that holds any of its characters is the
    query's, so that masking it leaves nothing of the query in sight, even where it merged with the template. Longer
    conversations are cut at the end, never inside U or K.

    Args:
        max_length: tokens, ≥ 1.

    Raises:
        RowError: a span holds no token or is cut, or the template changes the query.
    """
    query = trace.prompt.strip()
    head = frame.before + query + frame.after
    asked = [{"role": "user", "content": query}]
    if tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) != head:
        raise RowError("the chat template changes its query")
    body, shift = _body(trace.response, frame)
    text = head + body + frame.end
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = made["input_ids"], made["offset_mapping"]
    at = len(head) + shift
    places = {
        "understanding": _tokens(text, offsets, at + trace.understanding[0], at + trace.understanding[1]),
        "key sentence": _tokens(text, offsets, at + trace.key[0], at + trace.key[1]),
    }
    first, last = len(frame.before), len(frame.before) + len(query)
    inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first and b > a]
    for what, place in (*places.items(), ("query", inside)):
        if not place:
            raise RowError(f"its {what} has no token of its own")
    size = min(len(ids), max_length)
    understanding, key = ((place[0], place[-1] + 1) for place in places.values())
    if key[1] > size:
        raise RowError(f"its key sentence ends at token {key[1]}, beyond the {size} that are kept")
    labels = [t if b > len(head) else IGNORED for t, (_, b) in zip(ids[:size], offsets[:size], strict=True)]
    return Spanned(ids[:size], labels, (inside[0], inside[-1] + 1), understanding, key, trace.harmful)


def _body(response: str, frame: Frame) -> tuple[str, int]:
    """What the model is to write, and how far its characters lie from those of ``response``."""
    start = response.index(OPEN)
    if frame.opened:
        start += len(OPEN)
        if frame.after.endswith("\n"):
            start += len(response[start:]) - len(response[start:].lstrip("\n"))
    body = response[start:].rstrip()
    return body, -start


def _tokens(text: str, offsets: Sequence[Span], start: int, end: int) -> list[int]:
    """Tokens whose first character that is no white space lies in [start, end)."""
    found = []
    for number, (a, b) in enumerate(offsets):
        if b <= start or a >= end:
            continue
        piece = text[a:b]
        at = a + len(piece) - len(piece.lstrip())
        if at < b and start <= at < end:
            found.append(number)
    return found
