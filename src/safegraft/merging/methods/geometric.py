"""Methods that look at the angle between deltas."""

from __future__ import annotations

import math
from itertools import combinations

from pydantic import Field
from torch import Tensor

from ...config import Settings
from ...errors import NumericError
from ..method import GlobalStats, Merged, TensorTriple, merge_method
from .additive import NoParameters

PARALLEL = 1e-4
"""Angle in radians, from 0 or π, at which slerp's formula divides by nearly nothing."""


class Slerp(Settings):
    """Parameters of slerp; not from a safety paper."""

    fraction: float = Field(0.5, ge=0, le=1, description="how far from the fine-tune's delta (0) to the vector (1)")


@merge_method("model_stock", params=NoParameters, paper="arXiv:2403.19522", strength=1.0, match_norm=False, fuses=True)
def model_stock(t: TensorTriple, p: NoParameters, stats: GlobalStats) -> Merged | None:
    """Average the deltas and go back towards the base the more they disagree: W_b + t·mean, t = N·c/(1+(N−1)c).

    c is the mean cosine over all pairs of the N deltas that are not zero. Where we differ: for c ≤ 0, where the formula
    would point away from every model, t is 0. Weights of several fine-tunes are not part of the method.
    """
    parts = [d.dense() for d in (*t.tasks, t.safety) if not d.is_zero]
    if not parts:
        return None
    mean = sum(parts[1:], start=parts[0]) / len(parts)
    if len(parts) == 1:
        return Merged(mean, {"interpolation": 1.0})
    angles = [_cosine(a, b) for a, b in combinations(parts, 2)]
    c, n = max(0.0, sum(angles) / len(angles)), len(parts)
    ratio = n * c / (1 + (n - 1) * c)
    return Merged(mean * ratio, {"interpolation": ratio})


@merge_method("slerp", params=Slerp, paper="Shoemake 1985", strength=1.0, match_norm=True)
def slerp(t: TensorTriple, p: Slerp, stats: GlobalStats) -> Merged | None:
    """Turn the fine-tune's delta towards the vector along the arc between the two.

    Of deltas, not of whole weights as elsewhere, so that the base has no part in the angle. Raises NumericError where
    the fine-tune left a tensor of the vector unchanged: a zero delta has no direction.
    """
    task, safety = t.task.dense(), t.safety.dense()
    if float(task.norm()) == 0.0:
        raise NumericError(
            f"{t.name}: slerp needs two directions, and the fine-tune's delta is zero here",
            "Use a vector whose scope the fine-tune changed, or another --method.",
        )
    angle = math.acos(_cosine(task, safety))
    if min(angle, math.pi - angle) < PARALLEL:
        return Merged((1 - p.fraction) * task + p.fraction * safety, {"angle": angle})
    here, there = (math.sin(x * angle) / math.sin(angle) for x in (1 - p.fraction, p.fraction))
    return Merged(here * task + there * safety, {"angle": angle})


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.double().norm()) * float(b.double().norm())
    if norms == 0.0:
        return 0.0
    return max(-1.0, min(1.0, float((a.double() * b.double()).sum()) / norms))
