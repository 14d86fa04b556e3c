"""What every registered merge method must do, whatever it computes."""

import pytest
import torch

from safegraft.merging import methods as _methods
from safegraft.merging.execute import generator, merge_tensor
from safegraft.merging.method import METHODS, GlobalStats, TensorTriple
from safegraft.tensors.lowrank import Delta, LowRank
from safegraft.tensors.masking import Grain, Logits

ALL = [method for _, method in METHODS]
SHAPES = [(1,), (7,), (1, 1), (1, 5), (5, 1), (2, 2), (6, 4), (4, 6), (3, 4, 5)]
KEEP_VECTORS = ("safe_lora", "lox", "safe_delta")
"""These are about matrices and leave tensors of one dimension to the fine-tune."""
STATS = GlobalStats(task_norm=1.0, safety_norm=1.0, alpha=1.0)

pytestmark = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
assert _methods


def normal(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(method, base, task, safety, name="layers.0.q_proj.weight"):
    if method.needs == "vector":
        return merge_tensor(method, method.parameters({}), STATS, name=name, base=base, tasks=[task], safety=safety)
    if method.needs == "mask":
        shape = tuple(base.shape)
        logits = Logits(normal(shape, 4), shape, Grain()) if base.dim() < 3 else None
        return merge_tensor(
            method, method.parameters({}), GlobalStats(1.0, 0.0, 1.0), name=name, base=base, tasks=[task],
            safety=Delta(shape), mask=logits,
        )  # fmt: skip
    hessian = None
    if base.dim() == 2:
        inputs = normal((9, base.shape[1]), 3)
        hessian = inputs.T @ inputs / 9
    return merge_tensor(
        method, method.parameters({}), GlobalStats(1.0, 0.0, 0.3), name=name, base=base, tasks=[task],
        safety=Delta(tuple(base.shape)), hessian=hessian,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_dtype_and_finite(method, shape):
    merged = run(method, normal(shape, 0), Delta(shape, full=normal(shape, 1)), Delta(shape, full=normal(shape, 2)))
    if merged is None:
        assert method.name in KEEP_VECTORS or method.needs == "mask"
        assert len(shape) == 1 or method.needs == "calibration" or (method.needs == "mask" and len(shape) == 3)
        return
    assert merged.dense().shape == shape
    assert merged.dense().dtype == torch.float32
    assert torch.isfinite(merged.dense()).all()


def test_inputs_are_not_changed(method):
    base, task, safety = normal((6, 4), 0), normal((6, 4), 1), normal((6, 4), 2)
    before = [t.clone() for t in (base, task, safety)]
    run(method, base, Delta((6, 4), full=task), Delta((6, 4), full=safety).scaled(0.5))
    for now, then in zip((base, task, safety), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_zero_vector_keeps_the_fine_tune(method, shape):
    if method.needs != "vector":
        pytest.skip("it takes no vector")
    task = Delta(shape, full=normal(shape, 1))
    assert run(method, normal(shape, 0), task, Delta(shape)) is None
    assert run(method, normal(shape, 0), task, Delta(shape, full=normal(shape, 2)).scaled(0.0)) is None


def test_same_inputs_same_result_in_any_order(method):
    tensors = {
        f"layers.{i}.weight": (normal((6, 4), i), normal((6, 4), 10 + i), normal((6, 4), 20 + i)) for i in range(4)
    }

    def every(names):
        out = {}
        for name in names:
            base, task, safety = tensors[name]
            out[name] = run(method, base, Delta((6, 4), full=task), Delta((6, 4), full=safety), name).dense()
        return out

    first, second = every(tensors), every(reversed(tensors))
    assert all(torch.equal(first[n], second[n]) for n in tensors)


def test_an_unchanged_tensor_still_gets_the_vector(method):
    if method.name in ("slerp", "safe_lora") or method.needs != "vector":
        pytest.skip("slerp refuses a zero delta; safe_lora and what takes no vector are about the fine-tune's alone")
    merged = run(method, normal((6, 4), 0), Delta((6, 4)), Delta((6, 4), full=normal((6, 4), 2)))
    assert merged is not None
    assert float(merged.dense().norm()) > 0


def test_low_rank_inputs_give_what_dense_ones_give(method):
    task, safety = (LowRank(normal((9, 2), s), normal((7, 2), s + 1)) for s in (3, 5))
    low = run(method, normal((9, 7), 0), Delta((9, 7), low=task), Delta((9, 7), low=safety))
    dense = run(method, normal((9, 7), 0), Delta((9, 7), full=task.dense()), Delta((9, 7), full=safety.dense()))
    assert torch.allclose(low.dense(), dense.dense(), atol=1e-5)


def test_says_whether_it_asks_for_the_vector_s_directions(method, monkeypatch):
    if method.needs != "vector":
        pytest.skip("it takes no vector")
    safety, asked = Delta((6, 4), full=normal((6, 4), 2)), []
    real = Delta.svd

    def svd(self, k):
        asked.append(self.full is safety.full)
        return real(self, k)

    monkeypatch.setattr(Delta, "svd", svd)
    task = Delta((6, 4), full=normal((6, 4), 1))
    for params in ({}, {"score": "paper"}, {"score": "scale-free"}, {"projector": "orthogonal"}):
        if set(params) <= set(method.params.model_fields):
            settings = method.parameters(params)
            asked.clear()
            merge_tensor(method, settings, STATS, name="w", base=normal((6, 4), 0), tasks=[task], safety=safety)
            assert any(asked) == method.directions(settings), params


def test_bfloat16_inputs_taken_to_float32(method):
    base, task, safety = (normal((6, 4), s).bfloat16().float() for s in (0, 1, 2))
    merged = run(method, base, Delta((6, 4), full=task), Delta((6, 4), full=safety))
    assert torch.isfinite((base + merged.dense()).bfloat16()).all()


def test_described(method):
    assert method.summary
    assert method.paper
    for name, info in method.params.model_fields.items():
        assert info.description, name


def test_randomness_is_per_tensor(method):
    triple = TensorTriple("a", normal((2, 2), 0), (Delta((2, 2)),), (1.0,), Delta((2, 2)), generator(0, "a"))
    assert triple.rng.initial_seed() == generator(0, "a").initial_seed()
    assert triple.rng.initial_seed() != generator(0, "b").initial_seed()
    assert triple.rng.initial_seed() != generator(1, "a").initial_seed()
