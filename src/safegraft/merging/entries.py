"""Pure maths over the entries of deltas: which to keep, and how several agree on a sign. No files, no names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 1 << 20
"""Entries worked on at a time where several temporaries are needed."""


def largest(delta: Tensor, density: float) -> Tensor:
    """``delta`` with all but its ``density`` share of entries of largest magnitude set to 0 (TIES, arXiv:2306.01708).

    Args:
        density: 0 < density ≤ 1. ``max(1, int(density · n))`` of the n entries stay; among equals the first.
    """
    return _ranked(delta, density, 0.0)


def without_outliers(delta: Tensor, density: float, outliers: float) -> Tensor:
    """``delta`` without its ``outliers`` share of largest entries and without its smallest ones, so that ``density``
    stays (Model Breadcrumbs, arXiv:2312.06795).

    Args:
        density: 0 < density ≤ 1. outliers: 0 ≤ outliers < 1; where both together exceed 1, fewer outliers are removed.
    """
    return _ranked(delta, density, outliers)


def _ranked(delta: Tensor, density: float, outliers: float) -> Tensor:
    if density >= 1:
        return delta
    flat = delta.reshape(-1)
    stay = max(1, int(density * flat.numel()))
    top = min(int(outliers * flat.numel()), flat.numel() - stay)
    sizes = flat.abs()
    keep = _among_largest(sizes, top + stay)
    if top:
        keep &= ~_among_largest(sizes, top)
    return (flat * keep).reshape(delta.shape)


def _among_largest(sizes: Tensor, count: int) -> Tensor:
    """A mask of ``count`` largest entries; of those equal to the smallest of them, the first ones."""
    floor = sizes.kthvalue(sizes.numel() - count + 1).values
    mask = sizes > floor
    equal = (sizes == floor).nonzero().squeeze(1)
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def dropped(delta: Tensor, drop: float, rng: torch.Generator) -> Tensor:
    """Each entry set to 0 with probability ``drop``, the others times 1/(1 − drop) (DARE, arXiv:2311.03099).

    Args:
        drop: 0 ≤ drop < 1. rng: on ``delta``'s device.
    """
    if drop == 0:
        return delta
    keep = torch.rand(delta.shape, generator=rng, device=delta.device) >= drop
    return delta * keep / (1 - drop)


def pruned_by_rank(delta: Tensor, density: float, spread: float, rng: torch.Generator) -> Tensor:
    """Entries kept with a probability that rises with their magnitude's rank in their row, and divided by it
    (DELLA's MAGPRUNE, arXiv:2406.11617).

    The smallest entry of a row stays with probability density − spread, the largest with density + spread; a row of
    one entry with density.

    Args:
        density, spread: 0 < density − spread and density + spread ≤ 1.
    """
    rows = delta.reshape(-1, delta.shape[-1]) if delta.dim() > 1 else delta.reshape(1, -1)
    width = rows.shape[1]
    rank = rows.abs().argsort(dim=1).argsort(dim=1).to(delta.dtype)
    share = rank / (width - 1) if width > 1 else torch.full_like(rank, 0.5)
    stays = density - spread + 2 * spread * share
    keep = torch.rand(rows.shape, generator=rng, device=delta.device) < stays
    return (rows * keep / stays).reshape(delta.shape)


def agreed(deltas: Sequence[Tensor], weights: Sequence[float], *, average: bool = True) -> Tensor:
    """Per entry the weighted mean of those deltas whose sign is the elected one (TIES steps 2 and 3), or their sum.

    The sign of the weighted sum is elected, a sum of 0 electing +; entries that are 0 take no part.

    Args:
        weights: one a delta, > 0.
    """
    flat = [delta.reshape(-1) for delta in deltas]
    out = torch.empty_like(flat[0])
    for start in range(0, out.numel(), PIECE):
        pieces = [delta[start : start + PIECE] for delta in flat]
        out[start : start + PIECE] = _agreed(pieces, weights, average)
    return out.reshape(deltas[0].shape)


def _agreed(deltas: Sequence[Tensor], weights: Sequence[float], average: bool) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    positive = total >= 0
    mixed, share = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        votes = torch.where(positive, delta > 0, delta < 0)
        mixed.add_(delta * votes, alpha=weight)
        share.add_(votes, alpha=weight)
    return mixed.div_(share.masked_fill_(share == 0, 1.0)) if average else mixed
