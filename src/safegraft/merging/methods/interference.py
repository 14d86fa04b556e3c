"""EnchTable's interference-aware scaling (arXiv:2511.09880), with a scale-free score and finer damping of our own."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ...config import Settings
from ...tensors.lowrank import Svd, plus
from ..linalg import crosstalk, kept, opposition, without_inputs, without_subspace
from ..method import GlobalStats, Merged, TensorTriple, merge_method

SHARPNESS = {"paper": 200.0, "scale-free": 1.0}


class EnchTable(Settings):
    """Parameters of the published method, with the paper's values."""

    keep: float = Field(0.5, gt=0, le=1, description="γ: share of singular directions compared")
    sharpness: float = Field(200.0, ge=0, description="c: how steeply the score lowers w")


class Interference(Settings):
    """Parameters of the interference method; ``keep`` and the paper score's ``sharpness`` are the paper's."""

    score: Literal["paper", "scale-free", "none"] = Field(
        "none", description="how interference is scored; none: not at all, damping fully what damp names"
    )
    damp: Literal["tensor", "subspace", "input"] = Field(
        "input", description="what is damped: all of s, its part in τ's subspace, or its part on τ's inputs"
    )
    keep: float = Field(0.5, gt=0, le=1, description="γ of the paper score: share of singular directions compared")
    energy: float = Field(0.9, gt=0, le=1, description="share of ‖τ‖² held by the directions of the task's subspace")
    sharpness: float | None = Field(
        None, ge=0, description="c: how steeply the score lowers w; 200 (the paper's), scale-free 1"
    )


@merge_method(
    "enchtable", params=EnchTable, paper="arXiv:2511.09880", strength=0.1, decomposes=True, directions=lambda p: True
)
def enchtable(t: TensorTriple, p: EnchTable, stats: GlobalStats) -> Merged | None:
    """Add the scaled safety vector, each tensor weighted by w = exp(−I): as published (score paper, damp tensor)."""
    params = Interference(score="paper", damp="tensor", keep=p.keep, energy=1.0, sharpness=p.sharpness)
    return interference(t, params, stats)


@merge_method(
    "interference", params=Interference, paper="after arXiv:2511.09880", strength=0.4, decomposes=True,
    directions=lambda p: p.score == "paper",
)  # fmt: skip
def interference(t: TensorTriple, p: Interference, stats: GlobalStats) -> Merged | None:
    """Add the scaled safety vector, less of it where it meets the fine-tune: without its part on the task's inputs.

    That default restored most at equal cost (docs/results/damping.md). It does at 0.4 what the published method does
    at 0.1. ``damp`` says what is multiplied by w: the whole tensor s (the paper), its part within the task's subspace,
    or its part that acts on the task's inputs. With ``score`` none there is no I: the whole tensor is added as it is
    (w = 1), a part is removed (w = 0). Tensors of one dimension, and matrices that the fine-tune left alone, take all
    of s.
    """
    if t.task.is_zero or len(t.safety.shape) != 2:
        return Merged(plus(t.task, t.safety), {"interference": 0.0, "weight": 1.0, "kept": 1.0})
    task = t.task.leading(p.energy) if p.damp != "tensor" or p.score == "scale-free" else None
    score = _score(t, p, task)
    weight = math.exp(-score) if p.score != "none" else float(p.damp == "tensor")
    figures = {"interference": score, "weight": weight, "kept": weight}
    if p.damp == "tensor":
        return Merged(plus(t.task, t.safety.scaled(weight)), figures)
    damped = (without_subspace if p.damp == "subspace" else without_inputs)(t.safety, _given(task), 1 - weight)
    norm = t.safety.norm()
    figures["kept"] = damped.norm() / norm if norm else 1.0
    return Merged(plus(t.task, damped), figures)


def _score(t: TensorTriple, p: Interference, task: Svd | None) -> float:
    if p.score == "none":
        return 0.0
    sharpness = SHARPNESS[p.score] if p.sharpness is None else p.sharpness
    if p.score == "scale-free":
        return opposition(_given(task), t.safety.dense(), sharpness)
    k = kept(t.safety.shape, p.keep)
    return crosstalk(t.task.svd(k), t.safety.svd(k), k, sharpness)


def _given(task: Svd | None) -> Svd:
    assert task is not None
    return task
