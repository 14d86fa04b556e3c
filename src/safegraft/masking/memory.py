"""What learning a mask will take, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..hardware import memory_of
from ..merging.fusion import Fusion
from ..tensors.finetune import FineTune
from ..tensors.masking import Grain

STATE = 8
"""Bytes an AdamW logit has: two float32 moments."""
SCRATCH = 24
"""Bytes an entry of the largest weight, while its mask is drawn or differentiated: six float32 tensors."""


@dataclass(frozen=True)
class Memory:
    """Bytes. ``model``: the frozen weights, and those fused without a mask. ``changes``: what is masked. ``logits``:
    with gradients and optimiser state; there are ``numbers`` of them. ``weights``: the masked weights of one forward
    pass and the scratch to make them."""

    model: int
    changes: int
    logits: int
    numbers: int
    weights: int

    @property
    def total(self) -> int:
        return self.model + self.changes + self.logits + self.weights

    @property
    def share(self) -> float:
        """What logits, gradients and optimiser state cost, over the model itself."""
        return self.logits / self.model

    def describe(self, weights: int) -> str:
        """A sentence for the user; ``weights``: how many have a mask."""

        def mb(nbytes: int) -> str:
            return f"{nbytes / 1e6:,.0f} MB"

        return (
            f"{weights} weights are masked with {self.numbers:,} logits. Expected memory: {mb(self.total)} and "
            f"activations (frozen model {mb(self.model)}; changes {mb(self.changes)}; logits with gradients and "
            f"optimiser {mb(self.logits)}, {self.share:.1%} of the model; masked weights {mb(self.weights)})"
        )


def expected(
    fine: FineTune,
    chosen: Sequence[str],
    others: Sequence[str],
    how: Fusion,
    grain: Grain,
    *,
    factors: bool,
    width: int,
    logit_width: int,
    adamw: bool,
) -> Memory:
    """Memory for masks on ``chosen``, with ``others`` fused plainly; activations come on top.

    Args:
        width: bytes of a number in the frozen weights. logit_width: of a logit.
    """
    layout = fine.layout
    own = sum(fine.base.spec(n).numel for n in fine.base.names() if n not in fine.base.tied)
    fixed = sum(layout.spec(n).numel for n in others)
    changes = numbers = state = 0
    for name in chosen:
        shape = layout.spec(name).shape
        ranks = [one.rank(name) for one in (fine, *fine.others)]
        low = [r * sum(shape) * 4 for r in ranks if r is not None]
        dense = math.prod(shape) * width
        if how.linear and not factors:
            stays_low = how.keeps_factors and len(low) == len(ranks)
            changes += sum(low) if stays_low else dense
        else:
            changes += sum(low) + dense * (len(ranks) - len(low))
        masks = [(n, ranks[0] or 0) for n in shape] if factors else [grain.shape(shape)]
        numbers += sum(math.prod(m) for m in masks)
        state += sum(math.prod(m) * STATE if adamw else _factored(m) for m in masks)
    sizes = [layout.spec(n).numel for n in chosen]
    return Memory(
        (own + fixed) * width,
        changes,
        numbers * 2 * logit_width + state,
        numbers,
        sum(sizes) * width + SCRATCH * max(sizes),
    )


def require_room(memory: Memory, device: torch.device) -> list[str]:
    """Sentences for the user where it will be tight.

    Raises:
        ConfigError: the device has less memory in all.
    """
    has = memory_of(device)
    if memory.total > has:
        raise ConfigError(
            f"learning this mask needs {memory.total / 1e9:.1f} GB and activations, and the {device.type} device has "
            f"{has / 1e9:.1f} GB",
            "Choose --granularity row or block, --optimizer adafactor, --logits-dtype bfloat16, --precision bfloat16, "
            "or a smaller --scope or --layers.",
        )
    if memory.total > 0.75 * has:
        return [f"that is {memory.total / has:.0%} of the {device.type} device's memory, and activations come on top"]
    return []


def _factored(shape: tuple[int, ...]) -> int:
    """Bytes of Adafactor's state: a number a row and a column; of a vector one an entry."""
    return 4 * (sum(shape[-2:]) if len(shape) > 1 else math.prod(shape))
