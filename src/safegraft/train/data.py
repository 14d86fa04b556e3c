"""From prompt and answer to token ids and labels, by the tokenizer's own chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError

IGNORED = -100
"""Label of a position that carries no loss (PyTorch's cross-entropy default)."""


class Row(Protocol):
    """What is trained on: a user's request and the assistant's answer."""

    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Pair:
    """The plainest Row."""

    prompt: str
    answer: str


def read_rows(file: Path, *, answers: bool | None = False, least: int = 1) -> list[tuple[str, str]]:
    """``(prompt, answer)`` of every line of a JSONL file, in its order.

    Args:
        answers: whether each line must have an ``answer`` (or ``response``); None takes one where it is there. The
            answer is "" where there is none or it is not asked for. least: fewest rows that are of use.

    Raises:
        ConfigError: the file cannot be read, rows are wrong (all of them named), or there are too few.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"]
            answer = "" if answers is False else row.get("answer", row.get("response", ""))
            if not (isinstance(prompt, str) and prompt.strip() and isinstance(answer, str) and (answer or not answers)):
                raise ValueError("empty or no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wrong.append(f"line {number}: {error!r}")
            continue
        found.append((prompt, answer))
    if wrong:
        shown = "\n".join(f"- {w}" for w in wrong[:20])
        raise ConfigError(
            f"{file} has {len(wrong)} row(s) that cannot be used:\n{shown}",
            f"Each line is JSON with {'prompt and answer' if answers else 'prompt'}.",
        )
    if len(found) < least:
        raise ConfigError(f"{file} has {len(found)} row(s)", f"Give at least {least}; a few hundred tell more.")
    return found


@dataclass(frozen=True)
class Encoded:
    """One conversation: ``ids`` and ``labels`` of equal length; labels are IGNORED outside the answer."""

    ids: list[int]
    labels: list[int]


def encode(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], answer: str, *, max_length: int | None = None
) -> Encoded:
    """Render with the chat template and tokenise once; label the answer and the token that ends it, nothing else.

    The whole conversation is one text, so no token boundary differs from what the model sees later. Which tokens
    belong to the answer is read off the offset mapping. What the template puts after the end token is cut off.

    Args:
        tokenizer: a fast tokenizer with a chat template. prompt: the user's request, or all turns up to it, each with
            ``role`` and ``content``. max_length: longer conversations are cut at the end.

    Raises:
        ConfigError: no chat template, no offset mapping, a template whose prompt is not a prefix of the whole, or an
            answer cut away entirely by ``max_length``.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template", "Give a chat model, or set tokenizer.chat_template.")
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer gives no character offsets (it is not a fast tokenizer)")
    user = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    head = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": answer}], tokenize=False)
    if not whole.startswith(head):
        raise ConfigError(
            "the chat template renders the request differently once there is an answer",
            "Use a template whose generation prompt is a prefix of the full conversation.",
        )
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = made["input_ids"]
    end = tokenizer.eos_token_id
    inside = [stop > len(head) for _, stop in made["offset_mapping"]]
    ends = [i for i, (t, answer_token) in enumerate(zip(ids, inside, strict=True)) if answer_token and t == end]
    size = min(ends[0] + 1 if ends else len(ids), max_length or len(ids))
    labels = [t if a else IGNORED for t, a in zip(ids[:size], inside[:size], strict=True)]
    if all(label == IGNORED for label in labels):
        raise ConfigError(f"nothing of the answer is left within {size} tokens", "Raise max_length.")
    return Encoded(ids[:size], labels)


class Conversations(Dataset[dict[str, list[int]]]):
    """Encoded rows as transformers' Trainer wants them: ``input_ids`` and ``labels``."""

    def __init__(self, tokenizer: Any, rows: Sequence[Row], *, max_length: int | None = None) -> None:
        self.items = [encode(tokenizer, row.prompt, row.answer, max_length=max_length) for row in rows]

    @classmethod
    def of(cls, items: Sequence[Encoded]) -> Conversations:
        """From rows that are encoded already."""
        made = cls(None, ())
        made.items = list(items)
        return made

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.items[index].ids, "labels": self.items[index].labels}

    @property
    def tokens(self) -> int:
        """Tokens in one pass over the rows, padding left out."""
        return sum(len(item.ids) for item in self.items)


@dataclass(frozen=True)
class PadRight:
    """Collator: pads to the longest row. The mask comes from the lengths, so ``pad_id`` may equal the end token.

    Args:
        pad_id: what fills the ids. from_first_label: ask the model for logits only from the position before the first
            label on (``logits_to_keep``), and cut the labels to match: the same loss without the prompt's logits.
    """

    pad_id: int
    from_first_label: bool = False

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels``: int64 [rows, longest row]; labels may be cut on the left."""
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, Any] = {
            "input_ids": _padded([row["input_ids"] for row in rows], longest, self.pad_id),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], longest, 0),
            "labels": _padded([row["labels"] for row in rows], longest, IGNORED),
        }
        if self.from_first_label:
            labelled = (batch["labels"] != IGNORED).any(dim=0).nonzero()
            kept = longest - max(0, int(labelled[0]) - 1)
            batch["labels"] = batch["labels"][:, -kept:]
            batch["logits_to_keep"] = kept
        return batch


def _padded(rows: Sequence[list[int]], longest: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
