"""Pure maths of the merge methods: no files, no names, no options."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors.lowrank import Delta, LowRank, Svd, numerical_rank


def kept(shape: tuple[int, ...], keep: float) -> int:
    """``k = int(γ · min(m, n))``, the number of directions compared."""
    return int(keep * min(shape))


def crosstalk(task: Svd, safety: Svd, k: int, sharpness: float) -> float:
    """Interference ``I ≥ 0`` of two deltas (EnchTable, arXiv:2511.09880, after TSV-Merge, arXiv:2412.00081).

    The paper writes, with U = [U1 U2], S = diag(S1, S2), V = [V1 V2] and ‖·‖₁ the sum of absolute entries::

        I = c / (2k)² · ‖ (UᵀU − 1) S (VᵀV − 1) ‖₁

    Singular vectors of one delta are orthonormal, so the diagonal blocks of both brackets vanish, and what is left of
    the product is block-diagonal: with C = U1ᵀU2 and D = V1ᵀV2::

        I = c / (2k)² · ( ‖C S2 Dᵀ‖₁ + ‖Cᵀ S1 D‖₁ )

    Args:
        task, safety: leading triplets of the two deltas, at most ``k`` each; directions below the numerical rank left
            out (the paper is silent; their vectors would be arbitrary). k: the nominal number. sharpness: c.
    """
    if k == 0 or task.s.numel() == 0 or safety.s.numel() == 0:
        return 0.0
    left = task.u.T @ safety.u
    right = task.v.T @ safety.v
    return sharpness / (2 * k) ** 2 * (_l1((left * safety.s) @ right.T) + _l1((left.T * task.s) @ right))


def overlap(task: Svd, delta: Tensor) -> float:
    """``‖U1ᵀ s V1‖_F / ‖s‖_F``: the share of ``delta`` that acts inside the task's leading directions, 0 to 1."""
    norm = float(delta.norm())
    return 0.0 if norm == 0.0 else float((task.u.T @ delta @ task.v).norm()) / norm


def opposition(task: Svd, safety: Tensor, sharpness: float) -> float:
    """The scale-free interference score ``I = c · o · (1 − a)``, ours; 0 ≤ I ≤ 2c.

    With M = U1ᵀ s V1, the part of s within the task's leading directions, ``o = ‖M‖/‖s‖`` is the overlap and
    ``a = ⟨M, S1⟩ / (‖M‖·‖S1‖)`` says whether that part pushes along the task (1), across (0) or against it (−1). So I
    is 0 for disjoint subspaces and where both push the same way, rises with the overlap, is largest for opposite
    deltas, and changes neither when a delta is scaled nor when both are rotated.

    Args:
        task: the triplets of τ that hold its energy. safety: s [m, n]. sharpness: c ≥ 0.
    """
    norm, strength = float(safety.norm()), float(task.s.norm())
    inside = task.u.T @ safety @ task.v
    shared = float(inside.norm())
    if norm == 0.0 or strength == 0.0 or shared == 0.0:
        return 0.0
    along = float((inside.diagonal() * task.s).sum()) / (shared * strength)
    return sharpness * min(1.0, shared / norm) * (1 - max(-1.0, min(1.0, along)))


def without_subspace(delta: Delta, task: Svd, share: float) -> Delta:
    """``s − share · U1 U1ᵀ s V1 V1ᵀ``: less of what acts from the task's inputs to its outputs."""
    if delta.low is not None:
        left, right = delta.low.left, delta.low.right
        inside = LowRank(task.u @ (task.u.T @ left) * -share, task.v @ (task.v.T @ right))
        both = LowRank(torch.cat([left, inside.left], dim=1), torch.cat([right, inside.right], dim=1))
        return Delta(delta.shape, low=both, scale=delta.scale)
    full = delta.dense()
    return Delta(delta.shape, full=full - share * (task.u @ (task.u.T @ full @ task.v) @ task.v.T))


def without_inputs(delta: Delta, task: Svd, share: float) -> Delta:
    """``s − share · s V1 V1ᵀ``: less of what acts on the task's inputs."""
    if delta.low is not None:
        right = delta.low.right - share * (task.v @ (task.v.T @ delta.low.right))
        return Delta(delta.shape, low=LowRank(delta.low.left, right), scale=delta.scale)
    full = delta.dense()
    return Delta(delta.shape, full=full - share * ((full @ task.v) @ task.v.T))


def polar_factor(matrix: Tensor) -> Tensor:
    """``P Qᵀ`` of the thin SVD ``P D Qᵀ`` of ``matrix`` [m, n]: the nearest matrix with orthonormal columns.

    Directions below the numerical rank are left out, so that equal columns share one direction instead of each
    getting an arbitrary one.
    """
    p, d, qh = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = numerical_rank(d, (matrix.shape[0], matrix.shape[1]))
    factor: Tensor = p[:, :rank] @ qh[:rank]
    return factor.float()


def _l1(matrix: Tensor) -> float:
    return float(matrix.abs().sum(dim=1).double().sum())
