"""Methods that add the vector as it is, or a random part of it."""

from __future__ import annotations

from pydantic import Field

from ...config import Settings
from ...tensors.lowrank import plus
from ..entries import dropped
from ..method import GlobalStats, Merged, TensorTriple, merge_method


class NoParameters(Settings):
    """A method that has none."""


class Resta(Settings):
    """Parameters of RESTA. The paper adds Δ whole; with ``drop`` it sparsifies it by DARE first."""

    drop: float = Field(0.0, ge=0, lt=1, description="p: share of the vector's entries dropped at random (DARE)")


@merge_method(
    "norm_matched", params=NoParameters, paper="the coarse step of arXiv:2511.09880", strength=0.1, entrywise=True
)
def norm_matched(t: TensorTriple, p: NoParameters, stats: GlobalStats) -> Merged | None:
    """Add the vector scaled to a share of the fine-tune's norm: W_t + s, EnchTable without its fine step."""
    return Merged(plus(t.task, t.safety), {})


@merge_method("resta", params=Resta, paper="arXiv:2402.11746", strength=1.0, match_norm=False, entrywise=True)
def resta(t: TensorTriple, p: Resta, stats: GlobalStats) -> Merged | None:
    """Add the vector as it was made, or a random part of it: W_t + b·DARE(Δ)."""
    if p.drop == 0:
        return Merged(plus(t.task, t.safety), {})
    return Merged(t.task.dense() + dropped(t.safety.dense(), p.drop, t.rng), {})


@merge_method(
    "task_arithmetic",
    params=NoParameters,
    paper="arXiv:2212.04089",
    strength=1.0,
    match_norm=False,
    fuses=True,
    entrywise=True,
    local=True,
)
def task_arithmetic(t: TensorTriple, p: NoParameters, stats: GlobalStats) -> Merged | None:
    """Add the weighted task deltas of one or several fine-tunes and the vector: W_b + Σ wᵢτᵢ + s."""
    total = t.safety.dense().clone()
    for delta, weight in zip(t.tasks, t.weights, strict=True):
        total.add_(delta.dense(), alpha=weight)
    return Merged(total, {})
