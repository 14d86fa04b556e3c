"""EnchTable's interference-aware scaling (arXiv:2511.09880)."""

from __future__ import annotations

import math

from pydantic import Field

from ...config import Settings
from ..linalg import crosstalk, kept
from ..method import GlobalStats, Merged, TensorTriple, merge_method


class Interference(Settings):
    """Parameters of the interference method; defaults are the paper's."""

    keep: float = Field(0.5, gt=0, le=1, description="γ: share of singular directions compared")
    sharpness: float = Field(200.0, ge=0, description="c: how steeply interference lowers the weight")
    score: str = Field("paper", pattern="^paper$", description="how interference is scored")


@merge_method("interference", params=Interference, paper="arXiv:2511.09880")
def interference(t: TensorTriple, p: Interference, stats: GlobalStats) -> Merged | None:
    """Add the scaled safety vector, each matrix weighted by w = exp(−I), I its interference with the fine-tune.

    Tensors of one dimension, and matrices with fewer than two kept directions to compare, take w = 1.
    """
    if t.safety.is_zero:
        return None
    score = 0.0
    if len(t.safety.shape) == 2 and not t.task.is_zero:
        k = kept(t.safety.shape, p.keep)
        score = crosstalk(t.task.svd(k), t.safety.svd(k), k, p.sharpness)
    weight = math.exp(-score)
    return Merged(t.task.dense() + t.safety.scaled(weight).dense(), {"interference": score, "weight": weight})
