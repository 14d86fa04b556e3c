"""What the utility tasks share: the run asks each of them to measure a model, and gets answers with their verdicts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...manifest import digest_of
from ..answers import ANSWERS, VERDICTS, Answer, Judged, append, mend, read_answers, read_verdicts
from ..records import ChatModel

KIND = "scored"
"""Of answers that the program which asked also scored."""
FOLDER = "utility"
DONE = "scored.json"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scored:
    """An answer and whether it is right: ``verdict.label`` is correct, wrong or truncated, ``verdict.judge`` the
    metric's name (exact_match, acc, pass@1 …)."""

    answer: Answer
    verdict: Judged


class Utility(Protocol):
    """One task that models are measured on.

    Attributes:
        name: unique in a run. about: for the manifest, at least ``source``, ``sha256``, ``cases``, ``paper`` and
            ``licence``, as a benchmark has them; whatever changes the result is in it. needs: what a model must be able
            to do beside answering: ``likelihood`` of given texts, ``continue`` an answer that is begun for it.
    """

    @property
    def name(self) -> str: ...
    @property
    def about(self) -> Mapping[str, Any]: ...
    @property
    def needs(self) -> frozenset[str]: ...

    def measure(self, label: str, model: ChatModel, folder: Path, progress: Progress | None) -> list[Scored]:
        """Ask ``model`` and score it. Leaves result files in ``folder``, which may hold an interrupted try to go on
        with. The same answers in the same order every time."""
        ...


def measure(
    label: str, opened: Callable[[], ChatModel], tasks: Sequence[Utility], run: Path, progress: Progress | None
) -> None:
    """Measure one model on every task that the run does not have yet, and add answers and verdicts to it.

    Args:
        opened: gives the model, which is loaded at the first call. run: the evaluation's folder.
    """
    for task in tasks:
        folder = place(run, label, task.name)
        if (folder / DONE).exists():
            continue
        rows = task.measure(label, opened(), folder, progress)
        mend(run / ANSWERS)
        mend(run / VERDICTS)
        answered = {a.key for a in read_answers(run)}
        judged = {(v.judge, v.key) for v in read_verdicts(run)}
        append(run / ANSWERS, [row.answer for row in rows if row.answer.key not in answered])
        append(run / VERDICTS, [r.verdict for r in rows if (r.verdict.judge, r.verdict.key) not in judged])
        counts = Counter(row.verdict.label for row in rows)
        save(folder / DONE, json.dumps({"model": label, "task": task.name, **dict(sorted(counts.items()))}) + "\n")


def place(run: Path, label: str, task: str) -> Path:
    """The folder for one model's result files of one task; names that no folder may have are written otherwise."""
    return run / FOLDER / _safe(label) / _safe(task)


def _safe(name: str) -> str:
    plain = re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "_"
    return plain if plain == name else f"{plain}-{digest_of(name)[:8]}"


def journal(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file that is appended to; a last line that a kill left without its end is cut off."""
    mend(file)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def save(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def lines(rows: list[Any], default: Callable[[Any], Any] | None = None) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False, default=default) + "\n" for row in rows)
