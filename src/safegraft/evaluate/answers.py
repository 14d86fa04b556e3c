"""An evaluation on disk: answers and verdicts as append-only lines, to be stopped, resumed and judged again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..manifest import digest_of
from .records import Verdict

ANSWERS, VERDICTS, PLAN, MANIFEST = "answers.jsonl", "verdicts.jsonl", "plan.json", "manifest.json"
KIND = "safegraft evaluation"
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One reply of one model to one case under one attack.

    ``key`` is unique in a run and the same in every run of the same settings (see ``key_of``). ``prompt`` is the
    case's own; ``judged`` is what judges read: the reply, decoded where the attack asked for an encoded one, without
    its reasoning. ``reasoning``: what stood in a think block; ``thinking``: none | complete | truncated, see
    thinking.split. ``finished``: the model ended the reply itself.
    """

    key: str
    model: str
    benchmark: str
    id: str
    kind: str
    category: str
    attack: str
    prompt: str
    expected: str
    reply: str
    judged: str
    reasoning: str
    thinking: str
    finished: bool
    tokens: int


@dataclass(frozen=True)
class Judged:
    """A verdict on an answer. ``label``: unsafe | safe | refused | unparsed, correct | wrong for tasks, and truncated
    where the reasoning was cut off before an answer, which no judge is asked about."""

    key: str
    judge: str
    label: str
    reason: str = ""

    @classmethod
    def of(cls, key: str, verdict: Verdict) -> Judged:
        return cls(key, verdict.judge, verdict.label, verdict.reason)


def key_of(model: str, benchmark: str, case: str, attack: str) -> str:
    """16 hexadecimal digits that name an answer."""
    return digest_of([model, benchmark, case, attack])[:16]


def append(file: Path, rows: Sequence[Answer] | Sequence[Judged]) -> None:
    """Add lines and flush them to the disk, in one write."""
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def mend(file: Path) -> None:
    """Cut off a last line that a kill left without its end."""
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as opened:
            opened.truncate(whole)


def read_answers(run: Path) -> list[Answer]:
    """Raises ConfigError where ``run`` is no evaluation or a line is damaged."""
    return _lines(run / ANSWERS, Answer)


def read_verdicts(run: Path) -> list[Judged]:
    """All verdicts; none where nothing was judged. Raises ConfigError where a line is damaged."""
    return _lines(run / VERDICTS, Judged) if (run / VERDICTS).exists() else []


def read_manifest(run: Path) -> dict[str, Any]:
    """Raises ConfigError where ``run`` holds no finished evaluation."""
    try:
        found = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
        if found["kind"] != KIND:
            raise ValueError(f"it is of kind {found['kind']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{run} holds no finished evaluation: {error}", "Make one: safegraft evaluate MODEL --out RUN."
        ) from error
    return dict(found)


def _lines(file: Path, kind: type[T]) -> list[T]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", "Name a folder that evaluate wrote.") from error
    out: list[T] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            out.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file}, line {number}: {error}", "Repeat the run with --resume.") from error
    return out


def latest(verdicts: Iterable[Judged]) -> dict[str, dict[str, str]]:
    """``{judge: {key: label}}``; of several verdicts of one judge on one answer the last counts."""
    out: dict[str, dict[str, str]] = {}
    for verdict in verdicts:
        out.setdefault(verdict.judge, {})[verdict.key] = verdict.label
    return out
