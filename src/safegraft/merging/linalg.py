"""Pure maths of the merge methods: no files, no names, no options."""

from __future__ import annotations

from torch import Tensor

from ..tensors.lowrank import Svd


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


def _l1(matrix: Tensor) -> float:
    return float(matrix.abs().sum(dim=1).double().sum())
