"""Relaxed-Bernoulli masks over a weight's change: pure maths, differentiable in the logits. No files, no names.

SOMF (arXiv:2405.09055) keeps of a fine-tune's change δ the part δ·m/mean(m), with a mask m between 0 and 1. Its logits
s are learnt under ``m = σ((s + log u − log(1 − u))/T)``, u uniform (the binary Concrete distribution), and deployed as
σ(s) or as σ(s) > ½. The authors' code deploys unseeded random draws; here draws are made only where they are asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .randomness import uniform

Granularity = Literal["element", "row", "block"]
Kind = Literal["continuous", "binary"]
SMALLEST = 2.0**-25
"""What a uniform draw of 0 is taken for: half the step between draws."""


@dataclass(frozen=True)
class Grain:
    """Which entries of a weight of one or two dimensions share a logit.

    ``element``: none. ``row``: those of one output, a row of a matrix [m, n]; in a vector none. ``block``: squares of
    ``block`` × ``block`` entries, or ``block`` entries of a vector; those at the end may be smaller.
    """

    granularity: Granularity = "element"
    block: int = 64

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the logits of a weight of this shape."""
        if self.granularity == "row" and len(weight) > 1:
            return weight[:-1]
        if self.granularity == "block":
            return tuple(math.ceil(n / self.block) for n in weight)
        return weight

    def expand(self, values: Tensor, weight: tuple[int, ...]) -> Tensor:
        """One value a logit -> one an entry; rows without a copy."""
        if self.granularity == "row" and len(weight) > 1:
            return values.unsqueeze(-1).expand(weight)
        if self.granularity == "block":
            for dim, size in enumerate(weight):
                values = values.repeat_interleave(self.block, dim).narrow(dim, 0, size)
        return values

    def mean(self, values: Tensor, weight: tuple[int, ...]) -> Tensor:
        """Mean over the weight's entries, summed in float64, as a float32 scalar; of all ones it is exactly 1."""
        if self.granularity == "block":
            sizes = [_sizes(n, self.block, values.device) for n in weight]
            counts = sizes[0] if len(sizes) == 1 else torch.outer(*sizes)
            return ((values.double() * counts).sum() / counts.sum()).float()
        return (values.sum(dtype=torch.float64) / values.numel()).float()


@dataclass(frozen=True)
class Logits:
    """The logits s of one weight: ``values`` as ``grain`` shapes them, ``shape`` the weight's (one or two sizes)."""

    values: Tensor
    shape: tuple[int, ...]
    grain: Grain

    def to(self, device: torch.device) -> Logits:
        return Logits(self.values.to(device), self.shape, self.grain)

    def gate(self, mask: Tensor) -> Tensor:
        """m/mean(m), an entry each, of ``mask`` (a value a logit); all 0 where m is.

        Differentiable through the mean. For a mask of zeros the quotient is not defined; taken to be 0, it makes logits
        of −∞ mean that nothing is kept.
        """
        mean = self.grain.mean(mask, self.shape)
        return self.grain.expand(mask / torch.where(mean > 0, mean, torch.ones_like(mean)), self.shape)


def relaxed(logits: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """A draw of m in [0, 1], a value a logit, float32, differentiable in ``logits``. ``temperature``: T > 0."""
    u = uniform(logits.shape, rng, logits.device).clamp_(min=SMALLEST)
    return torch.sigmoid((logits.float() + u.logit_()) / temperature)


def deployed(logits: Tensor, kind: Kind, *, temperature: float = 0.5, rng: torch.Generator | None = None) -> Tensor:
    """The mask that a model is made with: σ(s) for ``continuous``, 1 where σ(s) > ½ (s > 0) for ``binary``.

    With ``rng`` a draw instead: of the relaxed distribution, or of whether that exceeds ½.
    """
    if rng is None:
        return torch.sigmoid(logits.float()) if kind == "continuous" else (logits > 0).float()
    drawn = relaxed(logits, temperature, rng)
    return drawn if kind == "continuous" else (drawn > 0.5).float()


def _sizes(entries: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, entries, block, device=device)
    return (entries - starts).clamp(max=block).double()
