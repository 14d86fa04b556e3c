"""Changes of one weight, dense or as a product of thin factors, and their thin SVD.

Low rank is a type: a LoRA update and a stored low-rank vector stay factors; norms, inner products and SVDs never
form the full matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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


def thin_svd(matrix: Tensor, k: int) -> Svd:
    """The leading ``k`` singular triplets of a float32 ``matrix`` [m, n], those above the numerical rank.

    The vectors of the shorter side come from ``eigh`` of the Gram matrix, those of the longer side by one
    multiplication. Where σ_k falls below ``GRAM_FLOOR``·σ_1 the Gram matrix is formed again in float64.
    """
    return _svd(matrix, lambda _: k)


def leading_svd(matrix: Tensor, energy: float) -> Svd:
    """The fewest leading triplets of ``matrix``, as thin_svd gives them, that hold ``energy`` in (0, 1] of ‖A‖²."""
    return _svd(matrix, lambda s: holding(s, energy))


def _svd(matrix: Tensor, wanted: Callable[[Tensor], int]) -> Svd:
    """``wanted`` says how many triplets, given all singular values falling."""
    rows, columns = matrix.shape
    if rows > columns:
        flipped = _svd(matrix.T, wanted)
        return Svd(flipped.v, flipped.s, flipped.u, flipped.complete)
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if largest == 0.0:
        return Svd(matrix.new_zeros(rows, 0), matrix.new_zeros(0), matrix.new_zeros(columns, 0), complete=rows > 0)
    unit = matrix / largest
    u, s = _gram_eigh(unit)
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


def _gram_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors and values of ``matrix`` [m, n], m ≤ n, values falling."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Delta:
    """One tensor's change, times ``scale``: dense, low-rank, or zero; with its SVD where that is already known.

    ``full`` is float32 of any shape; ``low`` has two dimensions. Exactly one of them is given, or none for zero.
    """

    shape: tuple[int, ...]
    full: Tensor | None = None
    low: LowRank | None = None
    known: Svd | None = None
    scale: float = 1.0

    @property
    def is_zero(self) -> bool:
        return self.scale == 0.0 or (self.full is None and self.low is None)

    def dense(self) -> Tensor:
        """The whole tensor; for an unscaled dense delta the stored one itself, so do not write to it."""
        if self.is_zero:
            return torch.zeros(self.shape)
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
        def move(value: Tensor) -> Tensor:
            return value.to(device)

        return replace(
            self,
            full=None if self.full is None else move(self.full),
            low=None if self.low is None else LowRank(move(self.low.left), move(self.low.right)),
            known=None
            if self.known is None
            else replace(self.known, u=move(self.known.u), s=move(self.known.s), v=move(self.known.v)),
        )

    def svd(self, k: int) -> Svd:
        """The leading ``k`` triplets above the numerical rank, from the stored ones where they reach far enough."""
        if len(self.shape) != 2:
            raise ValueError(f"an SVD needs two dimensions, not {self.shape}")
        shape = (self.shape[0], self.shape[1])
        if self.is_zero:
            return Svd(torch.zeros(shape[0], 0), torch.zeros(0), torch.zeros(shape[1], 0), complete=True)
        if self.known is not None and (self.known.complete or self.known.s.numel() >= k):
            found = self.known.leading(numerical_rank(self.known.s, shape))
        elif self.low is not None:
            found = self.low.svd()
        else:
            assert self.full is not None
            found = thin_svd(self.full, k)
        return found.leading(min(k, found.s.numel())).scaled(self.scale)

    def leading(self, energy: float) -> Svd:
        """The fewest leading triplets that hold ``energy`` of the squared norm; two dimensions, not zero."""
        if self.full is None:
            found = self.svd(min(self.shape))
            return found.leading(holding(found.s, energy))
        return leading_svd(self.full, energy).scaled(self.scale)

    def slices(self) -> list[Delta]:
        """A stack of matrices [e, m, n] (fused experts) as e deltas of two dimensions."""
        rest = self.shape[1:]
        if self.is_zero:
            return [Delta(rest) for _ in range(self.shape[0])]
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
