"""The prompts a search needs, in three disjoint parts: to search with, to choose with, to report on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..data import harmful, lookalikes
from ..errors import ConfigError
from ..train.data import Pair, read_rows

T = TypeVar("T")
LEAST = 12
"""Rows of a kind below which the three parts would say nothing."""


@dataclass(frozen=True)
class KeyedPair(Pair):
    """``key``: words that a right answer holds; "" where rows have none."""

    key: str = ""


@dataclass(frozen=True)
class Part:
    """Requests to be refused, requests to be answered, and rows of the fine-tune's own task."""

    harmful: list[str]
    harmless: list[str]
    task: list[KeyedPair]

    @property
    def has_keys(self) -> bool:
        return all(row.key for row in self.task)


@dataclass(frozen=True)
class Parts:
    """``search``: the cheap look at every trial. ``choose``: the short list. ``report``: the final numbers."""

    search: Part
    choose: Part
    report: Part


def read_parts(task: Path, harmful_file: Path | None, harmless_file: Path | None, *, search: int, seed: int) -> Parts:
    """Read and split; the starter sets where no file is given.

    Args:
        task: JSONL with ``prompt`` and ``answer`` (or ``response``), and ``key``, the words that a right answer holds,
            in all rows or none. The others: JSONL with ``prompt``.
        search: at most this many rows of each kind go to the first part; it never takes more than a third.

    Raises:
        ConfigError: a file cannot be read, rows are wrong (all of them named), or there are too few.
    """
    rows = _task_rows(task)
    bad = (
        [p for p, _ in read_rows(harmful_file, least=LEAST)]
        if harmful_file
        else [r.prompt for r in harmful("select", "report")]
    )
    good = (
        [p for p, _ in read_rows(harmless_file, least=LEAST)]
        if harmless_file
        else [r.prompt for r in lookalikes("select", "report")]
    )
    split = [_three(kind, search, seed) for kind in (bad, good)]
    tasks = _three(rows, search, seed)
    return Parts(*(Part(split[0][i], split[1][i], tasks[i]) for i in range(3)))


def _task_rows(task: Path) -> list[KeyedPair]:
    pairs = read_rows(task, answers=True, least=LEAST)
    lines = [json.loads(line) for line in task.read_text(encoding="utf-8").splitlines() if line.strip()]
    keys = [line.get("key", "") for line in lines]
    lacking = [str(number) for number, key in enumerate(keys, 1) if not (isinstance(key, str) and key.strip())]
    if lacking and any(keys):
        raise ConfigError(
            f"{task} has no key in {len(lacking)} of {len(keys)} rows: {', '.join(lacking[:20])}",
            "Give all rows a key, the words that a right answer holds, or none.",
        )
    return [KeyedPair(prompt, answer, key) for (prompt, answer), key in zip(pairs, keys, strict=True)]


def _three(rows: Sequence[T], search: int, seed: int) -> tuple[list[T], list[T], list[T]]:
    mixed = random.Random(seed).sample(list(rows), len(rows))
    first = min(search, len(mixed) // 3)
    second = first + (len(mixed) - first) // 2
    return mixed[:first], mixed[first:second], mixed[second:]
