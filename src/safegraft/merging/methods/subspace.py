"""Methods that work on the singular directions of the deltas."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...config import Settings
from ...tensors.lowrank import Delta, LowRank, plus
from ..linalg import kept, polar_factor
from ..method import GlobalStats, Merged, TensorTriple, merge_method


class Tsv(Settings):
    """Parameters of TSV-Merge; the paper keeps 1/N of each of N deltas."""

    keep: float | None = Field(None, gt=0, le=1, description="share of each delta's directions kept; 1/N if not given")


class SafeLora(Settings):
    """Parameters of Safe LoRA."""

    threshold: float = Field(0.5, ge=-1, le=1, description="project where cos(Cτ, τ) is at most this")
    projector: Literal["published", "orthogonal"] = Field(
        "published", description="C = ΔΔᵀ/‖Δ‖, or UUᵀ over the vector's leading left directions"
    )
    keep: float = Field(0.5, gt=0, le=1, description="share of left directions of the orthogonal projector")


class Lox(Settings):
    """Parameters of LoX."""

    directions: int = Field(6, ge=1, description="k: leading directions of the vector that are added")


@merge_method(
    "tsv_merge", params=Tsv, paper="arXiv:2412.00081", strength=1.0, match_norm=False, fuses=True, decomposes=True,
    directions=lambda p: True,
)  # fmt: skip
def tsv_merge(t: TensorTriple, p: Tsv, stats: GlobalStats) -> Merged | None:
    """Keep the leading directions of every delta, make them orthogonal to each other, and add them up.

    With U, S, V the concatenated triplets and U⊥, V⊥ the polar factors of U and V the delta is U⊥ S V⊥ᵀ. Tensors of
    one dimension take the weighted mean.
    """
    parts = [(d, w) for d, w in (*zip(t.tasks, t.weights, strict=True), (t.safety, 1.0)) if not d.is_zero]
    if not parts:
        return None
    if len(t.base.shape) < 2:
        total = sum((d.dense() * w for d, w in parts[1:]), start=parts[0][0].dense() * parts[0][1])
        return Merged(total / sum(w for _, w in parts), {})
    k = max(1, kept(tuple(t.base.shape), p.keep or 1 / len(parts)))
    found = [(d.svd(k), w) for d, w in parts]
    u, v = (polar_factor(torch.cat([getattr(svd, side) for svd, _ in found], dim=1)) for side in ("u", "v"))
    s = torch.cat([svd.s * w for svd, w in found])
    return Merged((u * s) @ v.T, {"directions": float(s.numel())})


@merge_method(
    "safe_lora", params=SafeLora, paper="arXiv:2405.16833", strength=1.0, match_norm=False,
    directions=lambda p: p.projector == "orthogonal",
)  # fmt: skip
def safe_lora(t: TensorTriple, p: SafeLora, stats: GlobalStats) -> Merged | None:
    """Replace the fine-tune's delta by its projection onto the vector where the two point apart.

    ``published`` is C = ΔΔᵀ/‖Δ‖_F, which is not idempotent and scales with the strength; ``orthogonal`` is UUᵀ, which
    does not depend on it. Tensors of one dimension keep the fine-tune.
    """
    if len(t.base.shape) < 2 or t.task.is_zero:
        return None
    task = t.task.dense()
    projected = _published(t.safety, task) if p.projector == "published" else _orthogonal(t.safety, task, p.keep)
    norms = float(projected.norm()) * float(task.norm())
    cosine = float((projected * task).sum()) / norms if norms else 0.0
    if cosine > p.threshold:
        return Merged(task, {"cosine": cosine, "projected": 0.0})
    return Merged(projected, {"cosine": cosine, "projected": 1.0})


@merge_method("lox", params=Lox, paper="arXiv:2506.15606", strength=1.0, match_norm=False, directions=lambda p: True)
def lox(t: TensorTriple, p: Lox, stats: GlobalStats) -> Merged | None:
    """Add only the vector's k leading directions: W_t + s_k. Tensors of one dimension keep the fine-tune."""
    if len(t.base.shape) < 2:
        return None
    svd = t.safety.svd(min(p.directions, *t.base.shape))
    leading = Delta(t.safety.shape, low=LowRank(svd.u * svd.s, svd.v))
    return Merged(plus(t.task, leading), {"directions": float(svd.s.numel())})


def _published(safety: Delta, task: Tensor) -> Tensor:
    delta = safety.dense()
    projected: Tensor = delta @ (delta.T @ task) / float(delta.norm())
    return projected


def _orthogonal(safety: Delta, task: Tensor, keep: float) -> Tensor:
    u = safety.svd(max(1, kept(tuple(task.shape), keep))).u
    return u @ (u.T @ task)
