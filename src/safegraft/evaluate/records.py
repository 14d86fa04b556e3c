"""What evaluation passes around, and its lines on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

VerdictLabel = Literal["unsafe", "safe", "refused", "unparsed"]


@dataclass(frozen=True)
class Message:
    """One turn. ``role``: system | user | assistant."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Sampling:
    """How to decode. Greedy where ``temperature`` is 0. ``max_new_tokens`` ≥ 1."""

    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclass(frozen=True)
class Reply:
    """``text``: without special tokens. ``finished``: the model ended it itself, it was not cut off."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Exchange:
    """A request and the answer to be judged."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class Verdict:
    """A judge's finding. ``judge`` names who found it; ``reason`` is what it was read off, or empty."""

    label: VerdictLabel
    judge: str
    reason: str = ""


@dataclass(frozen=True)
class Record:
    """One measured answer. ``set``: which prompts. ``outcome``: the verdict's label, or correct | wrong for tasks."""

    model: str
    set: str
    id: str
    prompt: str
    reply: str
    outcome: str
    judge: str


class ChatModel(Protocol):
    def replies(self, batch: Sequence[Conversation], sampling: Sampling) -> list[Reply]: ...


class Judge(Protocol):
    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...


def ask(prompt: str) -> Conversation:
    """A conversation of one user turn."""
    return (Message("user", prompt),)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One JSON object a line, UTF-8."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n" * bool(lines), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """What ``write_records`` wrote. Raises ValueError or TypeError on a line that is no record."""
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
