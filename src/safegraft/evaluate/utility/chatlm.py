"""A chat model as lm-evaluation-harness wants one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from ...errors import ConfigError
from ...manifest import digest_of
from ..models.hf import HfChatModel
from ..records import ChatModel, Conversation, Message, Reply, Sampling
from ..thinking import Thought, split
from .base import journal as read_journal

CHUNK = 128
"""Requests asked and written at a time; the chunks follow from the task alone."""
SCORED = 32
"""Requests whose likelihood is taken at a time where nobody said how many: these need the logits of every token."""
TOKENS = 256
"""New tokens where a task says nothing, as in the harness's own models."""
FENCE = "```python\n"
"""Where an answer is begun with this, the harness (0.4.13, mbpp_instruct) looks for the code in the three backquotes
and the reply, and takes a first word right behind them, such as def, for the name of a language. So a reply is handed
over with a new line before it."""
KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature"}


class ChatLM(LM):  # type: ignore[misc]
    """Asks a ChatModel, and keeps every reply in a journal, so that an interrupted task goes on where it was.

    Contexts are conversations as JSON: the harness's ``apply_chat_template`` is asked for them and the model renders
    them itself. Reasoning is taken out of a reply before the harness reads it, and stop sequences cut the answer, not
    the reasoning. Likelihoods come from the harness's own HFLM, on the model's rendered template.

    Args:
        journal: a JSON Lines file, made if it is not there. progress: called with (asked, in all).
    """

    tokenizer_name = ""

    def __init__(self, model: ChatModel, journal: Path, progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__()
        self.model, self.journal, self.progress = model, journal, progress
        self.held = {row["key"]: row for row in read_journal(journal)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation itself. A begun answer is its last turn."""
        return json.dumps([[turn["role"], turn["content"]] for turn in chat_history], ensure_ascii=False)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers, without reasoning, cut at the first stop sequence.

        Raises:
            ConfigError: the task asks for a way of decoding that is not offered here.
        """
        sampling = [_sampling(request.args[1]) for request in requests]

        def ask(places: Sequence[int]) -> list[dict[str, Any]]:
            found: dict[int, Reply] = {}
            for one in dict.fromkeys(sampling[i] for i in places):
                group = [i for i in places if sampling[i] == one]
                asked = [conversation(requests[i].args[0]) for i in group]
                found.update(zip(group, self.model.replies(asked, one), strict=True))
            return [{"text": found[i].text, "tokens": found[i].tokens, "finished": found[i].finished} for i in places]

        self._all(requests, ask)
        return [answer(self.held[key_of(r.args)], r.args)[1] for r in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """log p(continuation | conversation), and whether it is what greedy decoding gives.

        Raises:
            ConfigError: the model is not one in this process, or has a defence round it.
        """
        if not isinstance(self.model, HfChatModel):
            raise ConfigError("likelihoods of given answers need a model in this process, without a defence")
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        chat = self.model
        inner = HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size=chat.batch or SCORED)

        def ask(places: Sequence[int]) -> list[dict[str, Any]]:
            made = []
            for i in places:
                turns = [{"role": m.role, "content": m.content} for m in conversation(requests[i].args[0])]
                rendered = inner.apply_chat_template(turns, turns[-1]["role"] != "assistant")
                made.append(Instance("loglikelihood", {}, (rendered, requests[i].args[1]), 0))
            return [{"logp": float(p), "greedy": bool(g)} for p, g in inner.loglikelihood(made, disable_tqdm=True)]

        self._all(requests, ask)
        return [(row["logp"], row["greedy"]) for row in (self.held[key_of(r.args)] for r in requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        raise ConfigError("perplexity of running text is no chat task", "Choose another task.")

    def _all(self, requests: list[Any], ask: Callable[[Sequence[int]], list[dict[str, Any]]]) -> None:
        keys = [key_of(r.args) for r in requests]
        first = list({key: i for i, key in reversed(list(enumerate(keys)))}.values())
        first.sort()
        for start in range(0, len(first), CHUNK):
            part = first[start : start + CHUNK]
            if any(keys[i] not in self.held for i in part):
                rows = [{"key": keys[i], **row} for i, row in zip(part, ask(part), strict=True)]
                fresh = [row for row in rows if row["key"] not in self.held]
                with self.journal.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh))
                self.held.update((row["key"], row) for row in fresh)
            if self.progress:
                self.progress(start + len(part), len(first))


def key_of(arguments: Sequence[Any]) -> str:
    """Names a request in the journal."""
    return digest_of(list(arguments))[:24]


def conversation(context: str) -> Conversation:
    return tuple(Message(role, content) for role, content in json.loads(context))


def answer(row: dict[str, Any], arguments: Sequence[Any]) -> tuple[Thought, str, bool]:
    """A reply in parts; the answer as far as the first stop sequence; and whether it came to its end.

    ``row`` is the journal's.
    """
    turns = conversation(arguments[0])
    begun = turns[-1].role == "assistant"
    thought = split(row["text"], opened=begun and turns[-1].content.rstrip().endswith("<think>"))
    text = row["text"] if thought.outcome == "none" else thought.answer
    stops = [at for stop in _stops(arguments[1]) if (at := text.find(stop)) >= 0]
    text = text[: min(stops, default=len(text))]
    if begun and turns[-1].content.endswith(FENCE) and not text.startswith("\n"):
        text = "\n" + text
    return thought, text, bool(row["finished"] or stops)


def _stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else [stop for stop in until if stop]


def _sampling(settings: dict[str, Any]) -> Sampling:
    other = set(settings) - KNOWN_SETTINGS
    if other:
        raise ConfigError(f"the task decodes with {', '.join(sorted(other))}, which is not offered", "Choose another.")
    heat = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
    return Sampling(int(settings.get("max_gen_toks") or TOKENS), heat)
