import math

import pytest
import torch

from reference import published_score
from safegraft.merging.linalg import crosstalk, kept, overlap
from safegraft.tensors import lowrank
from safegraft.tensors.lowrank import Delta, LowRank, Svd, sum_of_squares, thin_svd


def gaussian(m, n, seed, scale=1e-3):
    return scale * torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def spectrum(m, n, values, seed):
    u, _, vh = torch.linalg.svd(gaussian(m, n, seed).double(), full_matrices=False)
    return ((u * values) @ vh).float()


def fast_score(task, safety, keep=0.5, sharpness=200.0):
    k = kept(task.shape, keep)
    return crosstalk(thin_svd(task, k), thin_svd(safety, k), k, sharpness)


def falling(n, power):
    return torch.arange(1, n + 1).double() ** -power * 1e-2


PAIRS = {
    "square": (gaussian(192, 192, 0), gaussian(192, 192, 1)),
    "tall": (gaussian(300, 96, 2), gaussian(300, 96, 3)),
    "wide": (gaussian(64, 500, 4), gaussian(64, 500, 5)),
    "odd": (gaussian(7, 5, 6), gaussian(7, 5, 7)),
    "task of low rank": (gaussian(120, 12, 8) @ gaussian(12, 100, 9, 1.0), gaussian(120, 100, 10)),
    "both of low rank": (
        gaussian(120, 12, 11) @ gaussian(12, 100, 12, 1.0),
        gaussian(120, 20, 13) @ gaussian(20, 100, 14, 1.0),
    ),
    "falling slowly": (spectrum(160, 128, falling(128, 0.5), 15), spectrum(160, 128, falling(128, 0.5), 16)),
    "falling": (spectrum(160, 128, falling(128, 1), 17), spectrum(160, 128, falling(128, 1), 18)),
    "falling fast": (spectrum(160, 128, falling(128, 2), 19), spectrum(160, 128, falling(128, 2), 20)),
    "over six decades": (
        spectrum(160, 128, torch.logspace(-2, -8, 128).double(), 21),
        spectrum(160, 128, torch.logspace(-2, -8, 128).double(), 22),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_score_equals_the_published_formula(name):
    task, safety = PAIRS[name]
    expected = published_score(task, safety, 0.5, 200.0)
    assert expected > 0
    assert fast_score(task, safety) == pytest.approx(expected, rel=1e-4)


def test_stored_factors_scaled_give_the_same_score():
    task, safety = PAIRS["square"]
    stored = Delta(safety.shape, full=safety, known=thin_svd(safety, 96)).scaled(0.37)
    expected = published_score(task, 0.37 * safety, 0.5, 200.0)
    assert crosstalk(thin_svd(task, 96), stored.svd(96), 96, 200.0) == pytest.approx(expected, rel=1e-5)


def test_lora_delta_scores_without_its_product():
    low = LowRank(gaussian(200, 8, 30, 0.05), gaussian(150, 8, 31, 0.05))
    safety = gaussian(200, 150, 32)
    found = Delta((200, 150), low=low).svd(75)
    assert found.s.numel() == 8
    expected = published_score(low.dense(), safety, 0.5, 200.0)
    assert crosstalk(found, thin_svd(safety, 75), 75, 200.0) == pytest.approx(expected, rel=1e-5)


def test_float32_gram_alone_would_not_do(monkeypatch):
    """Keeps the fallback honest: without it the score of a falling spectrum is off by far more than allowed."""
    task, safety = PAIRS["falling fast"]
    expected = published_score(task, safety, 0.5, 200.0)
    monkeypatch.setattr(lowrank, "GRAM_FLOOR", 0.0)
    assert abs(fast_score(task, safety) / expected - 1) > 1e-3


def test_golden_score_by_hand():
    """τ = diag(2, 1), s = diag(3, 0), k = 1: C = D = 1, I = c/4 · (3 + 2)."""
    task, safety = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([3.0, 0.0]))
    assert fast_score(task, safety, sharpness=0.2) == pytest.approx(0.25)
    turned = torch.tensor([[3.0, 0.0], [3.0, 0.0]]) / math.sqrt(2)
    assert fast_score(task, turned, sharpness=0.2) == pytest.approx(0.25 / math.sqrt(2))
    assert fast_score(task, torch.diag(torch.tensor([0.0, 3.0])), sharpness=0.2) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (1, 9), (9, 1)])
def test_thin_svd_agrees_with_the_full_one(m, n):
    matrix = gaussian(m, n, m)
    found = thin_svd(matrix, min(m, n))
    _, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(found.s.double(), s, rtol=1e-5)
    assert torch.allclose((found.u * found.s) @ found.v.T, matrix, atol=1e-8)


def test_thin_svd_of_nothing():
    found = thin_svd(torch.zeros(4, 3), 2)
    assert found.s.numel() == 0
    assert found.complete
    assert crosstalk(found, thin_svd(torch.ones(4, 3), 1), 1, 200.0) == 0.0


def test_rank_deficient_svd_keeps_only_real_directions():
    found = thin_svd(gaussian(50, 4, 1) @ gaussian(4, 60, 2, 1.0), 25)
    assert found.s.numel() == 4
    assert found.complete


def test_low_rank_norm_and_svd():
    low = LowRank(gaussian(30, 5, 3, 1.0), gaussian(20, 5, 4, 1.0))
    assert low.norm() == pytest.approx(float(low.dense().norm()), rel=1e-6)
    found = low.svd()
    assert torch.allclose((found.u * found.s) @ found.v.T, low.dense(), atol=1e-5)


def test_overlap_is_one_inside_and_zero_outside():
    eye = torch.eye(4)
    inside = Svd(eye[:, :2], torch.ones(2), eye[:, :2])
    assert overlap(inside, torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]))) == pytest.approx(1.0)
    assert overlap(inside, torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0]))) == 0.0
    assert overlap(inside, torch.zeros(4, 4)) == 0.0


def test_sum_of_squares_is_accurate_over_many_elements():
    many = torch.full((3_000_001,), 1e-3)
    assert sum_of_squares(many) == pytest.approx(3.000001, rel=1e-5)
