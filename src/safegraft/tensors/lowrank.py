"""Changes of one weight, dense or as a product of thin factors, and their thin SVD.

Low rank is a type: a LoRA update and a stored low-rank vector stay factors; norms, inner products and SVDs never
form the full matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .source import CPU

GRAM_FLOOR = 1e-2
"""Smallest σ_k/σ_1 for which singular vectors are taken from a float32 Gram matrix; below it, float64.

Forming A·Aᵀ squares the condition number, so float32 gives the directions of σ_k with an error of about
1.2e-7·(σ_1/σ_k)². With this floor the interference score is off by at most 7e-5 of itself on the spectra of
tests/merging/test_linalg.py and 5e-4 on the demo's models, which is 2e-5 of the weight w; without one it means nothing
below full rank. With 3e-2 (4e-6 and 3e-5) merging the demo's models takes half as long again.
"""


@dataclass(frozen=True)
class Svd:
    """Leading singular triplets: ``A ≈ u @ diag(s) @ v.T``; u [m, k], s [k] falling, v [n, k]."""

    u: Tensor
    s: Tensor
    v: Tensor
    complete: bool = False
    """Whether every direction above the numerical rank is held, so that no more could be asked for."""

    def leading(self, k: int) -> Svd:
        return Svd(self.u[:, :k], self.s[:k], self.v[:, :k], self.complete and k >= self.s.numel())

    def scaled(self, factor: float) -> Svd:
        return replace(self, s=self.s * factor)


@dataclass(frozen=True)
class LowRank:
    """The matrix ``left @ right.T``; left [m, r], right [n, r]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self) -> Tensor:
        return self.left @ self.right.T

    def norm(self) -> float:
        """Frobenius norm, by trace((LᵀL)(RᵀR)) in float64."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0).sqrt())

    def svd(self) -> Svd:
        """Thin SVD from two QRs and an r × r SVD, in float64, directions below the numerical rank dropped."""
        q_left, r_left = torch.linalg.qr(self.left.double())
        q_right, r_right = torch.linalg.qr(self.right.double())
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        keep = numerical_rank(s, self.shape)
        return Svd((q_left @ u[:, :keep]).float(), s[:keep].float(), (q_right @ vh[:keep].T).float(), complete=True)


def numerical_rank(s: Tensor, shape: tuple[int, int]) -> int:
    """How many σ exceed ``max(m, n)·ε₃₂·σ_max``: the directions that float32 weights can define at all.

    Weights are float32 or shorter, so smaller directions are rounding noise, whose vectors are arbitrary.
    """
    if s.numel() == 0 or float(s[0]) == 0.0:
        return 0
    return int((s > max(shape) * torch.finfo(torch.float32).eps * s[0]).sum())


def thin_svd(matrix: Tensor, k: int, started: Started | None = None) -> Svd:
    """The leading ``k`` singular triplets of a float32 ``matrix`` [m, n], those above the numerical rank.

    The vectors of the shorter side come from ``eigh`` of the Gram matrix, those of the longer side by one
    multiplication. Where σ_k falls below ``GRAM_FLOOR``·σ_1 the Gram matrix is formed again in float64.
    ``started``: what that begins with, where it is known already.
    """
    return _svd(matrix, lambda _: k, started)


def leading_svd(matrix: Tensor, energy: float, started: Started | None = None) -> Svd:
    """The fewest leading triplets of ``matrix``, as thin_svd gives them, that hold ``energy`` in (0, 1] of ‖A‖²."""
    return _svd(matrix, lambda s: holding(s, energy), started)


def _svd(matrix: Tensor, wanted: Callable[[Tensor], int], started: Started | None = None) -> Svd:
    """``wanted`` says how many triplets, given all singular values falling."""
    rows, columns = matrix.shape
    if rows > columns:
        flipped = _svd(matrix.T, wanted, started)
        return Svd(flipped.v, flipped.s, flipped.u, flipped.complete)
    largest = _largest(matrix)
    if largest == 0.0:
        return Svd(matrix.new_zeros(rows, 0), matrix.new_zeros(0), matrix.new_zeros(columns, 0), complete=rows > 0)
    unit = matrix / largest
    u, s = started or _gram_eigh(unit)
    k = min(wanted(s), rows)
    if k and float(s[k - 1]) < GRAM_FLOOR * float(s[0]):
        unit = unit.double()
        u, s = _gram_eigh(unit)
        k = min(wanted(s), rows)
    keep = numerical_rank(s[:k], (rows, columns))
    u, s = u[:, :keep], s[:keep]
    v = (unit.T @ u) / s
    return Svd(u.float(), (s * largest).float(), v.float(), complete=keep < k)


def holding(s: Tensor, energy: float) -> int:
    """How many leading σ hold ``energy`` of ``Σ σ²``; at least one."""
    held = s.double().square().cumsum(0)
    return min(s.numel(), int((held < energy * held[-1]).sum()) + 1)


def _largest(matrix: Tensor) -> float:
    return float(matrix.abs().max()) if matrix.numel() else 0.0


def _gram_eigh(matrix: Tensor) -> Started:
    return _started(*torch.linalg.eigh(matrix @ matrix.T))


def _started(values: Tensor, vectors: Tensor) -> Started:
    """From the eigenvalues and eigenvectors of A·Aᵀ, as ``eigh`` orders them."""
    return vectors.flip(-1), values.flip(-1).clamp_min(0).sqrt()


Started = tuple[Tensor, Tensor]
"""Of a matrix A [m, n], m ≤ n, over its largest entry: all left singular vectors [m, m] and values [m], falling."""


@dataclass(frozen=True)
class Delta:
    """One tensor's change, times ``scale``: dense, low-rank, or zero; with its SVD where that is already known.

    ``full`` is float32 of any shape; ``low`` has two dimensions. Exactly one of them is given, or none for a zero on
    ``device``. ``started`` is what the SVD of ``full``, turned so that m ≤ n, begins with.
    """

    shape: tuple[int, ...]
    full: Tensor | None = None
    low: LowRank | None = None
    known: Svd | None = None
    scale: float = 1.0
    device: torch.device = CPU
    started: Started | None = None

    @property
    def is_zero(self) -> bool:
        return self.scale == 0.0 or (self.full is None and self.low is None)

    @property
    def _where(self) -> torch.device:
        if self.full is not None:
            return self.full.device
        return self.device if self.low is None else self.low.left.device

    def dense(self) -> Tensor:
        """The whole tensor; for an unscaled dense delta the stored one itself, so do not write to it."""
        if self.is_zero:
            return torch.zeros(self.shape, device=self._where)
        tensor = self.full if self.full is not None else self.low.dense()  # type: ignore[union-attr]
        return tensor if self.scale == 1.0 else tensor * self.scale

    def norm(self) -> float:
        """Frobenius norm (root of the sum of squares)."""
        if self.is_zero:
            return 0.0
        if self.full is None:
            assert self.low is not None
            return abs(self.scale) * self.low.norm()
        return abs(self.scale) * math.sqrt(sum_of_squares(self.full))

    def scaled(self, factor: float) -> Delta:
        return replace(self, scale=self.scale * factor)

    def to(self, device: torch.device | str) -> Delta:
        """The same on another device."""
        full = None if self.full is None else self.full.to(device)
        low = None if self.low is None else LowRank(self.low.left.to(device), self.low.right.to(device))
        known = self.known
        if known is not None:
            known = replace(known, u=known.u.to(device), s=known.s.to(device), v=known.v.to(device))
        return Delta(self.shape, full, low, known, self.scale, torch.device(device))

    def svd(self, k: int) -> Svd:
        """The leading ``k`` triplets above the numerical rank, from the stored ones where they reach far enough."""
        if len(self.shape) != 2:
            raise ValueError(f"an SVD needs two dimensions, not {self.shape}")
        shape = (self.shape[0], self.shape[1])
        if self.is_zero:
            u, s, v = (torch.zeros(size, device=self._where) for size in ((shape[0], 0), (0,), (shape[1], 0)))
            return Svd(u, s, v, complete=True)
        if self.known is not None and (self.known.complete or self.known.s.numel() >= k):
            found = self.known.leading(numerical_rank(self.known.s, shape))
        elif self.low is not None:
            found = self.low.svd()
        else:
            assert self.full is not None
            found = thin_svd(self.full, k, self.started)
        return found.leading(min(k, found.s.numel())).scaled(self.scale)

    def leading(self, energy: float) -> Svd:
        """The fewest leading triplets that hold ``energy`` of the squared norm; two dimensions, not zero."""
        if self.full is None:
            found = self.svd(min(self.shape))
            return found.leading(holding(found.s, energy))
        return leading_svd(self.full, energy, self.started).scaled(self.scale)

    def slices(self) -> list[Delta]:
        """A stack of matrices [e, m, n] (fused experts) as e deltas of two dimensions."""
        rest = self.shape[1:]
        if self.is_zero:
            return [Delta(rest, device=self._where) for _ in range(self.shape[0])]
        assert self.full is not None
        known = self.known
        return [
            Delta(
                rest,
                full=self.full[i],
                known=None if known is None else Svd(known.u[i], known.s[i], known.v[i], known.complete),
                scale=self.scale,
            )
            for i in range(self.shape[0])
        ]


def with_started(deltas: Sequence[Delta]) -> list[Delta]:
    """The same deltas, the dense matrices among them with what their SVD begins with, worked out for all of one shorter
    side in one call: on a GPU that takes little longer for many small matrices than for one."""
    sides: dict[int, list[tuple[int, Tensor]]] = {}
    for i, delta in enumerate(deltas):
        if len(delta.shape) == 2 and not delta.is_zero and delta.full is not None and (top := _largest(delta.full)):
            sides.setdefault(min(delta.shape), []).append((i, _gram(delta.full, top)))
    out = list(deltas)
    for found in sides.values():
        members, grams = zip(*found, strict=True)
        values, vectors = torch.linalg.eigh(torch.stack(grams))
        for i, own, vectors_of in zip(members, values, vectors, strict=True):
            out[i] = replace(deltas[i], started=_started(own, vectors_of))
    return out


def _gram(matrix: Tensor, largest: float) -> Tensor:
    """As ``_svd`` forms it."""
    unit = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix) / largest
    return unit @ unit.T


def plus(a: Delta, b: Delta) -> Tensor | LowRank:
    """``a + b``: factors side by side where neither is dense, else the whole tensor."""
    factors = [d for d in (a, b) if not d.is_zero]
    if len(a.shape) == 2 and factors and all(d.low is not None for d in factors):
        return LowRank(
            torch.cat([d.low.left * d.scale for d in factors if d.low], dim=1),
            torch.cat([d.low.right for d in factors if d.low], dim=1),
        )
    return a.dense() + b.dense()


def sum_of_squares(tensor: Tensor) -> float:
    """Σ x², float32 within rows of 2048 elements and float64 over them; relative error below 1e-5 at any length."""
    flat = tensor.reshape(-1)
    whole = flat.numel() // 2048 * 2048
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, 2048), dim=1)
    return float(rows.double().square().sum()) + float(flat[whole:].double().square().sum())
