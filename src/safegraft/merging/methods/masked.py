"""Methods that keep the part of the fine-tunes' changes that a learnt mask calls safe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...config import Settings
from ...tensors.lowrank import Delta
from ...tensors.masking import Kind, Logits, deployed
from ...tensors.randomness import generator
from ..fusion import Fusion, FusionName, fused, ordered, usual_fusion, usual_scale
from ..method import GlobalStats, Merged, TensorTriple, merge_method


class Somf(Settings):
    """Parameters of SOMF; where one is not given it is the mask's own."""

    kind: Kind = Field("continuous", description="mask of σ(s), or of 1 where σ(s) > ½")
    fusion: FusionName | None = Field(
        None, description="sum, task-arithmetic, ties, dare or mean; what the mask was learnt with if not given"
    )
    scale: float | None = Field(None, gt=0, allow_inf_nan=False, description="λ: factor of the fused change")
    density: float | None = Field(None, gt=0, le=1, description="ties: share of each change's entries kept")
    drop: float | None = Field(None, ge=0, lt=1, description="dare: share of each change's entries dropped at random")
    seed: int | None = Field(None, description="draw the mask with this seed; not drawn at all if not given")
    temperature: float | None = Field(None, gt=0, description="T of a mask that is drawn")

    def how(self, fine_tunes: int, *, lora: bool = False) -> Fusion:
        """The fusion, with SOMF's defaults for what is not given."""
        kind = self.fusion or usual_fusion(fine_tunes)
        return Fusion(
            kind,
            usual_scale(kind, lora=lora) if self.scale is None else self.scale,
            0.2 if self.density is None else self.density,
            0.2 if self.drop is None else self.drop,
        )


@merge_method("somf", params=Somf, paper="arXiv:2405.09055", strength=1.0, match_norm=False, fuses=True, needs="mask")
def somf(t: TensorTriple, p: Somf, stats: GlobalStats) -> Merged | None:
    """Keep the part of the changes that a mask learnt on safety preferences calls safe: W_b + fuse(δᵢ·m/mean(m)).

    The base is the aligned model, the mask one of `safegraft somf train` (DPO), shared by all fine-tunes. Weights
    without a mask are fused as they are; of a single fine-tune they stay its own.

    Where every m is 1 the result is that of the plain fusion, bit for bit; of one fine-tune it is the fine-tune. Where
    every m is 0, m/mean(m) is not defined; it is taken to be 0, so that the result is the base, bit for bit.

    A mask over LoRA factors (``--mask-factors``, the published way) multiplies each factor by its own m/mean(m). That
    is not a mask over the weights: an entry of the product mixes as many masked entries as the update has directions.

    Figures: ``density``, the mean of m (0 to 1; of factors that of both together); ``size``, the norm of the fused
    masked change over that of the fused change.
    """
    how = p.how(len(t.tasks))
    if t.mask is None:
        parts = [(d.dense(), w) for d, w in ordered(t.tasks, t.weights)]
        return Merged(fused(parts, t.weights, how, t.rng), {}) if parts else Merged(_nothing(t.base), {})
    logits = [t.mask] if isinstance(t.mask, Logits) else list(t.mask)
    masks = [_mask(one, p, f"{t.name}#{i}" if i else t.name) for i, one in enumerate(logits)]
    gates = [one.gate(m) for one, m in zip(logits, masks, strict=True)]
    density = _density(logits, masks)
    if all(bool((m == 1).all()) for m in masks) and len(t.tasks) == 1 and t.weights[0] * how.scale == 1.0:
        return None
    pairs = ordered(t.tasks, t.weights)
    if not pairs or any(not bool(m.any()) for m in masks):
        return Merged(_nothing(t.base), {"density": density, "size": 0.0})
    state = t.rng.get_state()
    plain = fused([(d.dense(), w) for d, w in pairs], t.weights, how, t.rng)
    t.rng.set_state(state)
    if len(gates) == 2:
        kept = fused([(_by_factors(d, gates), w) for d, w in pairs], t.weights, how, t.rng)
    elif how.linear:
        kept = plain * gates[0]
    else:
        kept = fused([(d.dense(), w) for d, w in pairs], t.weights, how, t.rng, gates[0]).mul_(gates[0])
    norm = float(plain.norm())
    return Merged(kept, {"density": density, "size": float(kept.norm()) / norm if norm else 0.0})


def _density(logits: Sequence[Logits], masks: Sequence[Tensor]) -> float:
    sizes = [math.prod(one.shape) for one in logits]
    means = [float(one.grain.mean(m, one.shape)) for one, m in zip(logits, masks, strict=True)]
    return sum(mean * size for mean, size in zip(means, sizes, strict=True)) / sum(sizes)


def _mask(logits: Logits, p: Somf, name: str) -> Tensor:
    rng = None if p.seed is None else generator(p.seed, name)
    return deployed(logits.values, p.kind, temperature=p.temperature or 0.5, rng=rng)


def _by_factors(delta: Delta, gates: Sequence[Tensor]) -> Tensor:
    assert delta.low is not None  # merging.masked refuses anything else
    return (delta.low.left * gates[0] * delta.scale) @ (delta.low.right * gates[1]).T


def _nothing(base: Tensor) -> Tensor:
    """A change after which every weight is the base's, bit for bit: adding +0 would turn a −0 into +0."""
    return torch.full_like(base, -0.0)
