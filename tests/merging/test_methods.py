"""Golden numbers for every method, worked out by hand."""

import math

import pytest
import torch

from safegraft.errors import ConfigError, NumericError
from safegraft.merging import entries
from safegraft.merging import methods as _methods
from safegraft.merging.execute import generator, merge_tensor
from safegraft.merging.linalg import opposition, polar_factor
from safegraft.merging.method import METHODS, GlobalStats
from safegraft.tensors.lowrank import Delta, leading_svd

STATS = GlobalStats(1.0, 1.0, 1.0)
TASK, SAFETY = [[4.0, -1.0], [2.0, 0.0]], [[1.0, 0.5], [-3.0, 2.0]]
assert _methods


def merged(name, tasks, safety, weights=None, **params):
    method = METHODS.get(name)
    tasks = [torch.tensor(t) for t in tasks]
    shape = tuple(tasks[0].shape)
    return merge_tensor(
        method, method.parameters(params), STATS, name="w", base=torch.zeros(shape),
        tasks=[Delta(shape, full=t) for t in tasks], weights=weights or [1.0] * len(tasks),
        safety=Delta(shape) if safety is None else Delta(shape, full=torch.tensor(safety)),
    )  # fmt: skip


def check(out, expected):
    assert torch.allclose(out.dense(), torch.tensor(expected), atol=1e-6), out.dense()


@pytest.mark.parametrize("name", ["norm_matched", "task_arithmetic", "resta"])
def test_sums(name):
    check(merged(name, [TASK], SAFETY), [[5.0, -0.5], [-1.0, 2.0]])


def test_task_arithmetic_weighs_every_fine_tune():
    check(merged("task_arithmetic", [[1.0, 2.0], [10.0, 0.0]], [0.5, 0.5], [2.0, 0.1]), [3.5, 4.5])
    check(merged("task_arithmetic", [[1.0, 2.0], [10.0, 0.0]], None, [2.0, 0.1]), [3.0, 4.0])


def test_ties():
    """Kept: τ (4, ·, 2, ·), s (·, ·, −3, 2); the third sum is −1, so τ's 2 there is left out."""
    check(merged("ties", [TASK], SAFETY, density=0.5), [[4.0, 0.0], [-3.0, 2.0]])


def test_ties_averages_by_weight():
    """Both positive in the first entry: (1·2 + 3·6)/4; in the second −1·1 + 3·2 > 0 leaves the 2."""
    check(merged("ties", [[2.0, -1.0], [6.0, 2.0]], None, [1.0, 3.0], density=1.0), [5.0, 2.0])


def test_breadcrumbs():
    """A quarter, the largest, goes; of the rest the larger two stay: τ (−1, 2), s (1, 2)."""
    check(merged("breadcrumbs", [TASK], SAFETY, density=0.5, outliers=0.25), [[1.0, -1.0], [2.0, 2.0]])


@pytest.mark.parametrize(("name", "params"), [("dare", {"drop": 0.0}), ("dare_ties", {"drop": 0.0})])
def test_dare_without_dropping(name, params):
    expected = [[5.0, -0.5], [-1.0, 2.0]] if name == "dare" else [[2.5, -1.0], [-3.0, 2.0]]
    check(merged(name, [TASK], SAFETY, **params), expected)


@pytest.mark.parametrize("drop", [0.2, 0.9])
def test_dropping_keeps_the_expectation(drop):
    ones = torch.ones(100_000)
    out = entries.dropped(ones, drop, generator(0, "a"))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - drop)])
    assert float(out.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(drop / (1 - drop) / 1e5))
    assert torch.equal(out, entries.dropped(ones, drop, generator(0, "a")))
    assert not torch.equal(out, entries.dropped(ones, drop, generator(1, "a")))


def test_pruning_by_rank_keeps_large_entries_more_often_and_the_expectation():
    row = torch.tensor([[3.0, 1.0, 2.0]]).repeat(60_000, 1)
    out = entries.pruned_by_rank(row, 0.5, 0.3, generator(0, "a"))
    assert torch.allclose((out != 0).float().mean(0), torch.tensor([0.8, 0.2, 0.5]), atol=0.01)
    assert torch.allclose(out.mean(0), torch.tensor([3.0, 1.0, 2.0]), rtol=0.03)


def test_model_stock():
    """cos = 24/25, t = 2·0.96/1.96."""
    out = merged("model_stock", [[3.0, 4.0]], [4.0, 3.0])
    check(out, [3.5 * 1.92 / 1.96] * 2)
    check(merged("model_stock", [[1.0, 0.0]], [-1.0, 0.1]), [0.0, 0.0])


def test_model_stock_of_three():
    """Cosines 0, 1/√2, 1/√2: c = √2/3, t = 3c/(1 + 2c)."""
    c = math.sqrt(2) / 3
    t = 3 * c / (1 + 2 * c)
    check(merged("model_stock", [[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0]), [t * 2 / 3] * 2)


def test_slerp():
    check(merged("slerp", [[1.0, 0.0]], [0.0, 1.0], fraction=1 / 3), [math.cos(math.pi / 6), 0.5])
    check(merged("slerp", [[2.0, 0.0]], [4.0, 0.0], fraction=0.5), [3.0, 0.0])


def test_slerp_refuses_a_zero_delta():
    with pytest.raises(NumericError, match="delta is zero"):
        merged("slerp", [[0.0, 0.0]], [0.0, 1.0])


def test_tsv_merge():
    """Disjoint directions add up; one shared direction is averaged: polar([e e]) = e·[1 1]/√2."""
    check(merged("tsv_merge", [[[2.0, 0.0], [0.0, 0.0]]], [[0.0, 0.0], [0.0, 3.0]]), [[2.0, 0.0], [0.0, 3.0]])
    check(merged("tsv_merge", [[[2.0, 0.0], [0.0, 0.0]]], [[3.0, 0.0], [0.0, 0.0]]), [[2.5, 0.0], [0.0, 0.0]])
    check(merged("tsv_merge", [[2.0, 0.0]], [4.0, 1.0]), [3.0, 0.5])


def test_polar_factor_has_orthonormal_columns():
    q = polar_factor(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(q.T @ q, torch.eye(6), atol=1e-5)


@pytest.mark.parametrize(
    ("task", "projector", "expected"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], "published", [[1.0, 0.0], [1.0, 0.0]]),
        ([[1.0, 0.0], [3.0, 0.0]], "published", [[2.0, 0.0], [0.0, 0.0]]),
        ([[1.0, 0.0], [3.0, 0.0]], "orthogonal", [[1.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_safe_lora(task, projector, expected):
    """Δ = diag(2, 0): C = diag(2, 0), UUᵀ = diag(1, 0); the cosines are 1/√2 and 1/√10."""
    check(merged("safe_lora", [task], [[2.0, 0.0], [0.0, 0.0]], projector=projector), expected)


def test_lox_adds_the_leading_directions():
    check(merged("lox", [[[1.0, 0.0], [0.0, 1.0]]], [[3.0, 0.0], [0.0, 1.0]], directions=1), [[4.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("damp", "expected"),
    [
        ("tensor", [[3.0, 1.0], [1.0, 1.0]]),
        ("subspace", [[2.0, 1.0], [1.0, 1.0]]),
        ("input", [[2.0, 1.0], [0.0, 1.0]]),
    ],
)
def test_damping_without_a_score(damp, expected):
    out = merged("interference", [[[2.0, 0.0], [0.0, 0.0]]], [[1.0, 1.0], [1.0, 1.0]], score="none", damp=damp)
    check(out, expected)
    part = torch.tensor(expected) - torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert out.figures["kept"] == pytest.approx(float(part.norm()) / 2)


def test_damping_by_the_scale_free_score():
    """s against τ: o = 1, a = −1, I = 2; what is left of s in the subspace is w of it."""
    weight = math.exp(-2)
    for damp in ("tensor", "subspace", "input"):
        out = merged("interference", [[[2.0, 0.0], [0.0, 0.0]]], [[-3.0, 0.0], [0.0, 0.0]],
                     score="scale-free", damp=damp)  # fmt: skip
        assert out.figures["weight"] == pytest.approx(weight)
        check(out, [[2 - 3 * weight, 0.0], [0.0, 0.0]])


def normal(seed, m=12, n=9):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def score(task, safety):
    return opposition(leading_svd(task, 0.9), safety, 1.0)


def test_the_scale_free_score_does_not_change_with_scale_or_rotation():
    task, safety = normal(0), normal(1)
    expected = score(task, safety)
    assert expected > 0
    assert score(7 * task, 7 * safety) == pytest.approx(expected, rel=1e-4)
    assert score(1e-3 * task, 50 * safety) == pytest.approx(expected, rel=1e-4)
    left, right = torch.linalg.qr(normal(2, 12, 12)).Q, torch.linalg.qr(normal(3, 9, 9)).Q
    assert score(left @ task @ right, left @ safety @ right) == pytest.approx(expected, rel=1e-4)


def test_the_scale_free_score_sees_overlap_and_sign():
    u, _, vh = torch.linalg.svd(normal(4), full_matrices=False)
    task, outside = u[:, :2] @ vh[:2], u[:, 5:7] @ vh[5:7]
    against = [score(task, outside - share * task) for share in (0.0, 0.5, 1.0, 2.0)]
    assert against[0] == pytest.approx(0.0, abs=1e-5)
    assert against == sorted(against)
    assert against[-1] > 1
    along, across = score(task, outside + task), score(task, outside + u[:, :2] @ vh[:2].flip(0))
    assert along == pytest.approx(0.0, abs=1e-5)
    assert along < across < against[2]


def test_parameters_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"density 0.1 ± spread 0.15"):
        METHODS.get("della").parameters({"density": 0.1})
    with pytest.raises(ConfigError, match="score"):
        METHODS.get("interference").parameters({"score": "best"})
