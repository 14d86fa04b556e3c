"""Pure maths over the entries of deltas: which to keep, and how several agree on a sign. No files, no names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..tensors.randomness import uniform

PIECE = 1 << 18
"""Entries worked on at a time where several temporaries are needed."""


Pieces = Callable[[], Iterable[Sequence[Tensor]]]
"""Several tensors a piece at a time, from their beginning at every call: each item holds the next entries of all."""


class Largest:
    """The entries of largest magnitude of one tensor, told piece by piece.

    Attributes:
        floor: the smallest magnitude among them. spare: how many of the entries equal to it belong to them, the first
            ones, and have not come up yet.
    """

    def __init__(self, floor: Tensor, spare: int) -> None:
        self.floor, self.spare = floor, spare

    def mask(self, piece: Tensor) -> Tensor:
        """Which entries of ``piece`` are among them. Every piece is asked about once, in order."""
        flat = piece.reshape(-1)
        mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
        for start in range(0, flat.numel(), PIECE):
            part = flat[start : start + PIECE].abs()
            torch.gt(part, self.floor, out=mask[start : start + PIECE])
            if self.spare:
                equal = (part == self.floor).nonzero().squeeze(1)[: self.spare]
                mask[start + equal] = True
                self.spare -= equal.numel()
        return mask.reshape(piece.shape)


def largest(pieces: Pieces, counts: Callable[[int], Sequence[int]]) -> list[list[Largest]]:
    """Of every tensor in ``pieces`` the entries of largest magnitude, for each of several ``counts``; in two passes.

    Magnitudes are ordered as their bits are: counted by the leading 16, then by the others among those that share them.

    Args:
        pieces: float32 entries without NaN. counts: how many are wanted of a tensor of n ≥ 1 entries, 1 to n each.
    """
    high: list[Tensor] = []
    for tensors in pieces():
        high = high or [_no_counts(t) for t in tensors]
        for counted, tensor in zip(high, tensors, strict=True):
            for part in torch.split(tensor.reshape(-1), PIECE):
                counted += torch.bincount(_bits(part) >> 16, minlength=1 << 16)
    wanted = [[_bin(counted, count) for count in counts(int(counted.sum()))] for counted in high]
    low = [[torch.zeros_like(counted) for _ in bins] for counted, bins in zip(high, wanted, strict=True)]
    for tensors in pieces():
        for tensor, bins, finer in zip(tensors, wanted, low, strict=True):
            for part in torch.split(tensor.reshape(-1), PIECE):
                bits = _bits(part)
                for (leading, _), counted in zip(bins, finer, strict=True):
                    counted += torch.bincount(bits[bits >> 16 == leading] & 0xFFFF, minlength=1 << 16)
    return [
        [_cut(leading, counted, count) for (leading, count), counted in zip(bins, finer, strict=True)]
        for bins, finer in zip(wanted, low, strict=True)
    ]


def _cut(leading: int, counted: Tensor, count: int) -> Largest:
    trailing, spare = _bin(counted, count)
    floor = counted.new_full((), leading << 16 | trailing, dtype=torch.int32)
    return Largest(floor.view(torch.float32), spare)


def _no_counts(like: Tensor) -> Tensor:
    return torch.zeros(1 << 16, dtype=torch.int64, device=like.device)


def _bits(piece: Tensor) -> Tensor:
    return piece.abs().view(torch.int32)


def _bin(counts: Tensor, count: int) -> tuple[int, int]:
    """The bin of the ``count``-th entry from the top, and which one it is within it."""
    above = counts.flip(0).cumsum(0).flip(0)
    found = int((above >= count).sum()) - 1
    return found, count - int(above[found] - counts[found])


class Ranked:
    """Which entries of a tensor stay when it loses its ``outliers`` share of largest entries, and then its smallest
    ones, so that ``density`` stays (Model Breadcrumbs, arXiv:2312.06795); without outliers the ``density`` share of
    largest magnitude stays (TIES, arXiv:2306.01708).

    ``max(1, int(density · n))`` of the n entries stay; among equals the first.

    Args:
        kept: the entries that stay and the outliers. outliers: the outliers; None where there are none.
    """

    def __init__(self, kept: Largest, outliers: Largest | None) -> None:
        self.kept, self.outliers = kept, outliers

    def mask(self, piece: Tensor) -> Tensor:
        """Which entries of ``piece`` stay. Every piece is asked about once, in order."""
        mask = self.kept.mask(piece)
        if self.outliers is not None:
            mask &= ~self.outliers.mask(piece)
        return mask


def ranked(pieces: Pieces, density: float, outliers: float = 0.0) -> list[Ranked | None]:
    """Which entries of every tensor in ``pieces`` stay (see Ranked); None for all where all do.

    Args:
        density: 0 < density ≤ 1. outliers: 0 ≤ outliers < 1; where both together exceed 1, fewer outliers are removed.
    """
    if density >= 1:
        return [None for _ in next(iter(pieces()))]

    def counts(numel: int) -> list[int]:
        stay = max(1, int(density * numel))
        top = min(int(outliers * numel), numel - stay)
        return [stay + top, top] if top else [stay]

    return [Ranked(kept, rest[0] if rest else None) for kept, *rest in largest(pieces, counts)]


def kept_of(deltas: Sequence[Tensor], stays: Sequence[Ranked | None]) -> list[Tensor | None]:
    """The masks of these pieces of the tensors that ``stays`` was made of; None for all entries."""
    return [None if stay is None else stay.mask(delta) for delta, stay in zip(deltas, stays, strict=True)]


def mask_of_largest(delta: Tensor, density: float) -> Tensor | None:
    """The mask of the ``density`` share of a whole tensor's entries that is largest; None where all are."""
    return kept_of([delta], ranked(lambda: [[delta]], density))[0]


def dropped(delta: Tensor, drop: float, rng: torch.Generator) -> Tensor:
    """Each entry set to 0 with probability ``drop``, the others times 1/(1 − drop) (DARE, arXiv:2311.03099).

    Args:
        drop: 0 ≤ drop < 1.
    """
    if drop == 0:
        return delta
    keep = uniform(delta.shape, rng, delta.device) >= drop
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
    keep = uniform(rows.shape, rng, delta.device) < stays
    return (rows * keep / stays).reshape(delta.shape)


def agreed(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    average: bool = True,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Per entry the weighted mean of those deltas whose sign is the elected one (TIES steps 2 and 3), or their sum.

    The sign of the weighted sum is elected, a sum of 0 electing +; entries that are 0 take no part.

    Args:
        weights: one a delta, > 0. masks: one a delta, of the entries that count; None for all.
    """
    flat = [delta.reshape(-1) for delta in deltas]
    kept = [None if mask is None else mask.reshape(-1) for mask in masks or [None] * len(flat)]
    out = torch.empty_like(flat[0])
    for start in range(0, out.numel(), PIECE):
        part = slice(start, start + PIECE)
        pieces = [d[part] if m is None else d[part] * m[part] for d, m in zip(flat, kept, strict=True)]
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
