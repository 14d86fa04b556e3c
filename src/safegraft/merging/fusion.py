"""How the changes of one or several fine-tunes become one change. Pure maths, the same whatever their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..tensors.lowrank import Delta, LowRank
from .entries import agreed, dropped, mask_of_largest

FusionName = Literal["sum", "task-arithmetic", "ties", "dare", "mean"]
LORA, FULL = 0.3, 0.04
"""SOMF's λ of task arithmetic for LoRA fine-tunes and for full ones."""


@dataclass(frozen=True)
class Fusion:
    """One way of fusing the changes δᵢ with weights wᵢ > 0.

    ``sum``: ``λ·Σ wᵢδᵢ``, as ``task-arithmetic`` (they differ in what λ is by default). ``mean``: ``λ·Σ wᵢδᵢ/Σ wᵢ``.
    ``dare``: entries of every δᵢ dropped at random first, with probability ``drop``. ``ties``: the ``density`` share of
    largest entries of each, signs elected, those that agree averaged, times λ. ``scale``: λ > 0.
    """

    kind: FusionName = "sum"
    scale: float = 1.0
    density: float = 0.2
    drop: float = 0.2

    @property
    def linear(self) -> bool:
        """Whether fusing masked changes is masking the fused ones, so that one tensor holds them all."""
        return self.kind != "ties"

    @property
    def keeps_factors(self) -> bool:
        """Whether low-rank changes have a low-rank fusion."""
        return self.kind in ("sum", "task-arithmetic", "mean")


def usual_fusion(fine_tunes: int) -> FusionName:
    """What is done where the user does not say: the one change as it is; several by task arithmetic."""
    return "sum" if fine_tunes == 1 else "task-arithmetic"


def usual_scale(kind: FusionName, *, lora: bool) -> float:
    """SOMF's λ (arXiv:2405.09055). ``lora``: whether every fine-tune is an adapter."""
    own = {"sum": 1.0, "mean": 1.0, "ties": 0.4, "dare": 0.3}
    return own.get(kind, LORA if lora else FULL)


def ordered(deltas: Sequence[Delta], weights: Sequence[float]) -> list[tuple[Delta, float]]:
    """The changes that are not zero with their weights, in an order that depends on nothing but them."""
    pairs = [(d, w) for d, w in zip(deltas, weights, strict=True) if not d.is_zero]
    if len(pairs) < 2:
        return pairs
    return sorted(pairs, key=lambda pair: (pair[1], pair[0].norm(), _total(pair[0])))


def fused_delta(deltas: Sequence[Delta], weights: Sequence[float], how: Fusion, rng: torch.Generator) -> Delta:
    """The fusion of unmasked changes, all of one shape: as factors where all are and ``how`` allows it."""
    shape = deltas[0].shape
    pairs = ordered(deltas, weights)
    if not pairs:
        return Delta(shape)
    if how.keeps_factors and all(d.low is not None for d, _ in pairs):
        factor = _factor(weights, how)
        left = torch.cat([d.low.left * (d.scale * w * factor) for d, w in pairs if d.low], dim=1)
        return Delta(shape, low=LowRank(left, torch.cat([d.low.right for d, _ in pairs if d.low], dim=1)))
    return Delta(shape, full=fused([(d.dense(), w) for d, w in pairs], weights, how, rng))


def fused(
    parts: Sequence[tuple[Tensor, float]],
    weights: Sequence[float],
    how: Fusion,
    rng: torch.Generator,
    gate: Tensor | None = None,
) -> Tensor:
    """A of ``fusion(gate ∘ δᵢ) = gate ∘ A``; ``gate`` ≥ 0 is the same for every fine-tune.

    A does not depend on the gate but for TIES, which ranks the masked entries; there A is constant almost everywhere,
    so that it is no part of the gradient. Signs are elected and averaged alike with a gate and without it.

    Args:
        parts: changes with their weights, as ``ordered``; at least one. weights: of all, those that are zero too.
        rng: for DARE.
    """
    if how.kind == "ties":
        masks = [mask_of_largest(d if gate is None else d * gate, how.density) for d, _ in parts]
        return agreed([d for d, _ in parts], [w for _, w in parts], masks=masks).mul_(how.scale)
    factor, total = _factor(weights, how), None
    for delta, weight in parts:
        part = dropped(delta, how.drop, rng) if how.kind == "dare" else delta
        total = part * (weight * factor) if total is None else total.add_(part, alpha=weight * factor)
    assert total is not None
    return total


def _factor(weights: Sequence[float], how: Fusion) -> float:
    return how.scale / sum(weights) if how.kind == "mean" else how.scale


def _total(delta: Delta) -> float:
    if delta.low is not None:
        return delta.scale * float(delta.low.left.double().sum(0) @ delta.low.right.double().sum(0))
    return delta.scale * float(delta.dense().sum(dtype=torch.float64))
