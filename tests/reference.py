"""The interference score as the paper writes it: two full SVDs, the whole bracket, float64. Slow on purpose."""

import math

import torch
from torch import Tensor


def rank(s: Tensor, shape: tuple[int, int]) -> int:
    return int((s > max(shape) * torch.finfo(torch.float32).eps * s.max()).sum()) if s.max() > 0 else 0


def published_score(task: Tensor, safety: Tensor, keep: float, sharpness: float) -> float:
    k = int(keep * min(task.shape))
    parts = []
    for matrix in (task, safety):
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        kept = min(k, rank(s, matrix.shape))
        parts.append((u[:, :kept], s[:kept], vh[:kept].T))
    (u1, s1, v1), (u2, s2, v2) = parts
    u, s, v = torch.cat([u1, u2], 1), torch.diag(torch.cat([s1, s2])), torch.cat([v1, v2], 1)
    eye = torch.eye(u.shape[1], dtype=torch.float64)
    bracket = (u.T @ u - eye) @ s @ (v.T @ v - eye)
    return sharpness / (2 * k) ** 2 * float(bracket.abs().sum())


def published_merge(fine: Tensor, base: Tensor, delta: Tensor, alpha: float, keep: float, sharpness: float) -> Tensor:
    fine, base, delta = fine.double(), base.double(), delta.double()
    if fine.dim() < 2:
        return fine + alpha * delta
    score = published_score(fine - base, alpha * delta, keep, sharpness)
    return fine + math.exp(-score) * alpha * delta
