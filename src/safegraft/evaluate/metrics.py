"""Rates with their uncertainty. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n``, with the 95 % Wilson interval [low, high]."""

    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.hits / self.n


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, within [0, 1].

    Raises:
        ValueError: ``n`` < 1, or ``hits`` outside 0 … n.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209, eq. for the roots in p.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n} is no proportion")
    p, shrink = hits / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half) if hits else 0.0, min(1.0, centre + half) if hits < n else 1.0


def rate(outcomes: Iterable[bool]) -> Rate:
    """The share of true outcomes. Raises ValueError where there are none."""
    seen = list(outcomes)
    hits = sum(seen)
    return Rate(hits, len(seen), *wilson(hits, len(seen)))
