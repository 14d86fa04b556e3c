"""Methods that keep some entries of every delta and add or average what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import Field, model_validator
from torch import Tensor

from ...config import Settings
from ..entries import Ranked, agreed, dropped, kept_of, pruned_by_rank, ranked
from ..method import GlobalStats, Merged, TensorTriple, merge_method


class Ties(Settings):
    """Parameters of TIES; the paper keeps the top 20 %, EnchTable's comparison the top 50 %."""

    density: float = Field(0.5, gt=0, le=1, description="share of each delta's entries kept, the largest")
    scale: float = Field(1.0, gt=0, description="λ: factor of the merged delta")
    average: bool = Field(True, description="average the deltas that agree; if not, add them up")


class Dare(Settings):
    """Parameters of DARE."""

    drop: float = Field(0.5, ge=0, lt=1, description="p: share of each delta's entries dropped at random")


class Breadcrumbs(Settings):
    """Parameters of Model Breadcrumbs."""

    density: float = Field(0.5, gt=0, le=1, description="share of each delta's entries kept")
    outliers: float = Field(0.01, ge=0, lt=1, description="share of the largest entries removed")


class Della(Settings):
    """Parameters of DELLA."""

    density: float = Field(0.5, gt=0, le=1, description="share of each delta's entries kept, on average")
    spread: float = Field(0.15, ge=0, lt=0.5, description="ε: by how much a row's extremes deviate from density")

    @model_validator(mode="after")
    def _possible(self) -> Della:
        if not (self.density - self.spread > 0 and self.density + self.spread <= 1):
            raise ValueError(f"density {self.density} ± spread {self.spread} must stay above 0 and at most 1")
        return self


def _stays(triples: Callable[[], Iterable[TensorTriple]], p: Ties | Breadcrumbs) -> list[Ranked | None]:
    """Which entries of every delta stay, of a tensor that is told piece by piece."""
    outliers = p.outliers if isinstance(p, Breadcrumbs) else 0.0
    return ranked(lambda: ([d for d, _ in _parts(t)] for t in triples()), p.density, outliers)


@merge_method(
    "ties", params=Ties, paper="arXiv:2306.01708", strength=1.0, match_norm=False, fuses=True, entrywise=True,
    overview=_stays, local=True,
)  # fmt: skip
def ties(t: TensorTriple, p: Ties, stats: GlobalStats) -> Merged | None:
    """Keep each delta's largest entries, elect a sign for every weight, average the deltas that agree with it."""
    parts = _parts(t)
    if not parts:
        return None
    deltas = [d for d, _ in parts]
    masks = kept_of(deltas, t.overview or _stays(lambda: [t], p))
    return Merged(agreed(deltas, [w for _, w in parts], average=p.average, masks=masks).mul_(p.scale), {})


@merge_method("dare", params=Dare, paper="arXiv:2311.03099", strength=1.0, match_norm=False, fuses=True)
def dare(t: TensorTriple, p: Dare, stats: GlobalStats) -> Merged | None:
    """Drop entries of every delta at random, scale up the others, and add them."""
    return _added([(dropped(d, p.drop, t.rng), w) for d, w in _parts(t)])


@merge_method("dare_ties", params=Dare, paper="arXiv:2311.03099", strength=1.0, match_norm=False, fuses=True)
def dare_ties(t: TensorTriple, p: Dare, stats: GlobalStats) -> Merged | None:
    """Drop entries of every delta at random, scale up the others, elect signs and average as TIES does."""
    return _elected([(dropped(d, p.drop, t.rng), w) for d, w in _parts(t)])


@merge_method(
    "breadcrumbs", params=Breadcrumbs, paper="arXiv:2312.06795", strength=1.0, match_norm=False, fuses=True,
    entrywise=True, overview=_stays, local=True,
)  # fmt: skip
def breadcrumbs(t: TensorTriple, p: Breadcrumbs, stats: GlobalStats) -> Merged | None:
    """Remove each delta's largest and smallest entries, and add what is left."""
    parts = _parts(t)
    if not parts:
        return None
    masks = kept_of([d for d, _ in parts], t.overview or _stays(lambda: [t], p))
    return _added([(d if mask is None else d * mask, w) for (d, w), mask in zip(parts, masks, strict=True)])


@merge_method("della", params=Della, paper="arXiv:2406.11617", strength=1.0, match_norm=False, fuses=True)
def della(t: TensorTriple, p: Della, stats: GlobalStats) -> Merged | None:
    """Drop entries at random, large ones rarely, elect signs and average as TIES does."""
    return _elected([(pruned_by_rank(d, p.density, p.spread, t.rng), w) for d, w in _parts(t)])


def _parts(t: TensorTriple) -> list[tuple[Tensor, float]]:
    """Every delta that is not zero, dense, with its weight; the vector's is 1, for s is scaled already."""
    parts = [(d.dense(), w) for d, w in zip(t.tasks, t.weights, strict=True) if not d.is_zero]
    return parts if t.safety.is_zero else [*parts, (t.safety.dense(), 1.0)]


def _added(parts: list[tuple[Tensor, float]]) -> Merged | None:
    if not parts:
        return None
    total = parts[0][0] * parts[0][1]
    for delta, weight in parts[1:]:
        total.add_(delta, alpha=weight)
    return Merged(total, {})


def _elected(parts: list[tuple[Tensor, float]]) -> Merged | None:
    if not parts:
        return None
    return Merged(agreed([d for d, _ in parts], [w for _, w in parts]), {})
