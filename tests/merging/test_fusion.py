"""Fusions of several changes: numbers by hand, and that their order is of no matter."""

import itertools

import pytest
import torch

from safegraft.merging.fusion import Fusion, fused, fused_delta, ordered, usual_fusion, usual_scale
from safegraft.tensors.lowrank import Delta, LowRank
from safegraft.tensors.randomness import generator

KINDS = ["sum", "task-arithmetic", "ties", "dare", "mean"]


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(tensor):
    return Delta(tuple(tensor.shape), full=tensor)


def test_by_hand():
    a, b = torch.tensor([[1.0, -2.0, 3.0, 0.0]]), torch.tensor([[2.0, 2.0, -1.0, 4.0]])
    both = [whole(a), whole(b)]

    def dense(**how):
        return fused_delta(both, (1.0, 3.0), Fusion(**how), generator(0, "w")).dense()

    assert torch.equal(dense(kind="sum"), a + 3 * b)
    assert torch.equal(dense(kind="task-arithmetic", scale=0.5), 0.5 * a + 1.5 * b)
    assert torch.equal(dense(kind="mean"), (a + 3 * b) / 4)
    # half of each: −2 and 3 of a; 2 and 4 of b (2 and 2 are equals, the first stays). None meets another.
    assert torch.equal(dense(kind="ties", density=0.5, scale=0.5), torch.tensor([[1.0, -1.0, 1.5, 2.0]]))


def test_usual_settings_are_the_papers():
    assert (usual_fusion(1), usual_fusion(3)) == ("sum", "task-arithmetic")
    scales = {kind: (usual_scale(kind, lora=True), usual_scale(kind, lora=False)) for kind in KINDS}
    assert scales == {
        "sum": (1.0, 1.0), "task-arithmetic": (0.3, 0.04), "ties": (0.4, 0.4), "dare": (0.3, 0.3), "mean": (1.0, 1.0),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_tasks_changes_no_bit(kind):
    tasks = [whole(normal((7, 5), i)) for i in range(4)] + [Delta((7, 5))]
    weights = (1.0, 0.5, 1.0, 2.0, 1.0)
    gate, how = normal((7, 5), 9).abs(), Fusion(kind, 0.3)

    def outcome(order):
        mine, own = [tasks[i] for i in order], [weights[i] for i in order]
        parts = [(d.dense(), w) for d, w in ordered(mine, own)]
        under = fused(parts, own, how, generator(0, "w"), gate) * gate
        return under, fused_delta(mine, own, how, generator(0, "w")).dense()

    first = outcome(range(5))
    for order in itertools.islice(itertools.permutations(range(5)), 1, None, 7):
        assert all(torch.equal(x, y) for x, y in zip(outcome(order), first, strict=True))


@pytest.mark.parametrize("kind", ["sum", "task-arithmetic", "mean"])
def test_low_rank_changes_stay_factors(kind):
    tasks = [Delta((7, 5), low=LowRank(normal((7, 2), i), normal((5, 2), i + 10))) for i in range(3)]
    how = Fusion(kind, 0.3)
    found = fused_delta(tasks, (1.0, 2.0, 1.0), how, generator(0, "w"))
    assert found.low is not None
    assert found.low.rank == 6
    expected = fused_delta([whole(t.dense()) for t in tasks], (1.0, 2.0, 1.0), how, generator(0, "w")).dense()
    assert torch.allclose(found.dense(), expected, atol=1e-6)
    again = fused_delta(tasks[::-1], (1.0, 2.0, 1.0), how, generator(0, "w"))
    assert torch.equal(again.dense(), found.dense())


def test_ties_under_a_gate_is_ties_of_masked_changes():
    tasks, gate = [normal((9, 8), i) for i in range(3)], normal((9, 8), 7).abs()
    how = Fusion("ties", 0.4, density=0.3)
    ones = [(t, 1.0) for t in tasks]
    under = fused(ones, (1.0,) * 3, how, generator(0, "w"), gate) * gate
    masked = fused([(t * gate, 1.0) for t in tasks], (1.0,) * 3, how, generator(0, "w"))
    assert torch.allclose(under, masked, atol=1e-6)
