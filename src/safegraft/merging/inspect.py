"""Look at a merge before doing it: how the fine-tune and the safety vector meet, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..tensors.finetune import FineTune
from ..tensors.source import Workspace
from ..tensors.vector import SafetyVector
from . import methods as _methods
from .execute import merge_tensor
from .linalg import kept, opposition, overlap
from .lineage import cosine, doubts
from .method import METHODS, GlobalStats
from .run import scale
from .survey import Survey, inner, survey
from .workers import parallel

_ = _methods


@dataclass(frozen=True)
class TensorView:
    """One tensor of the vector.

    Attributes:
        base_norm, task_norm, safety_norm: ‖W_b‖, ‖τ‖, ‖Δ‖ (Frobenius). ratio: ‖w·s‖/‖τ‖ at the strength asked for.
        cosine: cos(τ, Δ). overlap: share of Δ's norm inside the task's leading directions (None for vectors).
        interference, weight: the paper's score I and w = exp(−I) at that strength. opposition: the scale-free score,
            0 to 2, which no strength changes (None for vectors).
    """

    name: str
    shape: tuple[int, ...]
    base_norm: float
    task_norm: float
    safety_norm: float
    cosine: float
    overlap: float | None
    interference: float
    weight: float
    opposition: float | None
    ratio: float


@dataclass(frozen=True)
class Inspection:
    """Global figures as in MergeSummary, and a view of each tensor the vector covers, in the model's order."""

    task_norm: float
    safety_norm: float
    alpha: float
    cosine: float | None
    tensors: list[TensorView]
    warnings: list[str]
    notes: list[str]


def inspect(
    model: str | Path,
    vector: str | Path,
    *,
    base: str | Path | None = None,
    strength: float = 0.1,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Measure how ``vector`` would meet the fine-tune ``model`` under the published method; writes nothing.

    Args and errors as in safegraft.merge.
    """
    opened = SafetyVector(vector)
    fine = FineTune.open(model, base, opened)
    threads = workers or os.cpu_count() or 1
    total = sum(fine.layout.spec(n).nbytes for n in fine.layout.names())
    done = 0

    def count(_: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("survey", min(done, total), total)

    found = survey(fine, opened, threads, count)
    alpha = scale(strength, found)
    stats = GlobalStats(found.task_norm, found.safety_norm, alpha)
    names = [n for n in fine.layout.names() if n in found.tensors and found.tensors[n].safety_sq > 0]
    views = parallel(lambda n, w: _view(fine, opened, found, stats, n, w), names, threads)
    return Inspection(
        found.task_norm, found.safety_norm, alpha, cosine(found), views, doubts(found), list(fine.pairing.notes)
    )


def _view(
    fine: FineTune, vector: SafetyVector, found: Survey, stats: GlobalStats, name: str, workspace: Workspace
) -> TensorView:
    method, ours = METHODS.get("enchtable"), METHODS.get("interference").parameters({})
    params = method.parameters({})
    base, (task,) = fine.read(name, workspace)
    safety = fine.safety(name, vector, workspace).scaled(stats.alpha)
    merged = merge_tensor(method, params, stats, name=name, base=base, tasks=[task], safety=safety)
    figures = merged.figures if merged else {"interference": 0.0, "weight": 1.0}
    shared = against = None
    if len(task.shape) == 2 and not task.is_zero:
        k = kept(task.shape, params.keep)  # type: ignore[attr-defined]
        shared = overlap(task.svd(k), safety.dense())
        against = opposition(task.leading(ours.energy), safety.dense(), 1.0)  # type: ignore[attr-defined]
    row = found.tensors[name]
    task_norm, safety_norm = math.sqrt(row.task_sq), math.sqrt(row.safety_sq)
    added = figures["weight"] * stats.alpha * safety_norm
    return TensorView(
        name=name,
        shape=tuple(task.shape),
        base_norm=math.sqrt(row.base_sq),
        task_norm=task_norm,
        safety_norm=safety_norm,
        cosine=inner(task, safety) / (task_norm * safety_norm * stats.alpha) if task_norm and stats.alpha else 0.0,
        overlap=shared,
        interference=figures["interference"],
        weight=figures["weight"],
        opposition=against,
        ratio=added / task_norm if task_norm else math.inf,
    )
