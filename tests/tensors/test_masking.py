"""Masks: numbers by hand, gradients against finite differences, draws, and the folder on disk."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safegraft.errors import CheckpointError, MismatchError
from safegraft.tensors.mask import FILE, Mask, write_mask
from safegraft.tensors.masking import Grain, Logits, deployed, relaxed
from safegraft.tensors.randomness import generator
from safegraft.tensors.source import TensorSource, Workspace

GRAINS = [Grain(), Grain("row"), Grain("block", 2)]
SHAPES = [(1,), (5,), (1, 1), (3, 5), (4, 6)]


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("grain", "weight", "logits"),
    [
        (Grain(), (3, 5), (3, 5)),
        (Grain("row"), (3, 5), (3,)),
        (Grain("row"), (5,), (5,)),
        (Grain("block", 2), (3, 5), (2, 3)),
        (Grain("block", 4), (5,), (2,)),
    ],
)
def test_shapes_of_logits(grain, weight, logits):
    assert grain.shape(weight) == logits


def test_blocks_by_hand():
    """Blocks of 2 × 2 in 3 × 3 have 4, 2, 2 and 1 entries: mean (4·1 + 2·0 + 2·0.5 + 1·1)/9 = 6/9."""
    grain, m = Grain("block", 2), torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    assert float(grain.mean(m, (3, 3))) == pytest.approx(6 / 9)
    expected = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0.5, 0.5, 1]]) * 9 / 6
    assert torch.allclose(Logits(m, (3, 3), grain).gate(m), expected)


@pytest.mark.parametrize("grain", GRAINS, ids=lambda g: g.granularity)
@pytest.mark.parametrize("weight", SHAPES, ids=str)
def test_a_gate_has_mean_one_whatever_the_grain(grain, weight):
    mask = torch.rand(grain.shape(weight), generator=torch.Generator().manual_seed(0))
    gate = Logits(mask, weight, grain).gate(mask)
    assert gate.shape == weight
    assert float(gate.mean()) == pytest.approx(1, rel=1e-6)
    assert float(grain.mean(mask, weight)) == pytest.approx(float(grain.expand(mask, weight).mean()), rel=1e-6)


@given(st.integers(1, 3000), st.integers(1, 40))
def test_the_gate_of_ones_is_one_exactly(rows, columns):
    for grain in (Grain(), Grain("row"), Grain("block", 7)):
        ones = torch.ones(grain.shape((rows, columns)))
        assert torch.equal(Logits(ones, (rows, columns), grain).gate(ones), torch.ones(rows, columns))


def test_extreme_logits():
    """+∞: every m is 1 and the gate too. −∞: every m is 0, and so is the gate, by our definition of 0/0."""
    for grain in GRAINS:
        for value, expected in ((torch.inf, 1.0), (-torch.inf, 0.0), (1e4, 1.0), (-1e4, 0.0)):
            s = torch.full(grain.shape((4, 6)), value)
            for kind in ("continuous", "binary"):
                m = deployed(s, kind)
                assert torch.equal(Logits(s, (4, 6), grain).gate(m), torch.full((4, 6), expected))
            drawn = relaxed(s, 0.5, generator(0, "x"))
            assert torch.equal(drawn, torch.full_like(s, expected))


def test_deployed_masks_by_hand():
    s = torch.tensor([-1.0, 0.0, 1e-9, 2.0])
    assert deployed(s, "binary").tolist() == [0, 0, 1, 1]
    assert torch.allclose(deployed(s, "continuous"), torch.tensor([0.26894, 0.5, 0.5, 0.88080]), atol=1e-5)
    assert torch.equal(deployed(s, "binary"), deployed(s, "binary"))


def test_draws_are_those_of_their_distribution_and_seed():
    """P(m > ½) = σ(s) for a relaxed Bernoulli of any temperature; a seeded draw is the same again."""
    s = torch.full((200_000,), 0.7)
    for temperature in (0.1, 0.5, 2.0):
        m = relaxed(s, temperature, generator(3, "a"))
        assert float((m > 0.5).float().mean()) == pytest.approx(float(torch.sigmoid(s[0])), abs=4e-3)
        assert torch.equal(m, relaxed(s, temperature, generator(3, "a")))
        assert not torch.equal(m, relaxed(s, temperature, generator(3, "b")))
        assert not torch.equal(m, relaxed(s, temperature, generator(4, "a")))
    hard = deployed(s, "binary", rng=generator(0, "w"))
    assert set(hard.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("grain", GRAINS, ids=lambda g: g.granularity)
@pytest.mark.parametrize("weight", [(5,), (3, 5)], ids=str)
def test_gradients_through_draw_and_mean_against_finite_differences(grain, weight):
    """d/ds of Σ G∘(δ·m/mean(m)), by central differences of the formula written out in float64."""
    s, delta, g = (normal(shape, i, torch.float64) for i, shape in enumerate((grain.shape(weight), weight, weight)))
    u = torch.rand(s.shape, generator=generator(1, "u"))

    def by_hand(s):
        m = grain.expand(torch.sigmoid((s + torch.log(u.double()) - torch.log1p(-u.double())) / 0.5), weight)
        return float((g * delta * m / m.mean()).sum())

    logits = s.float().requires_grad_()
    mask = relaxed(logits, 0.5, generator(1, "u"))
    (g.float() * delta.float() * Logits(logits, weight, grain).gate(mask)).sum().backward()
    for at in range(s.numel()):
        step = torch.zeros_like(s).reshape(-1)
        step[at] = 1e-5
        numeric = (by_hand(s + step.view_as(s)) - by_hand(s - step.view_as(s))) / 2e-5
        assert float(logits.grad.reshape(-1)[at]) == pytest.approx(numeric, rel=2e-4, abs=2e-5)


CONFIG = {"granularity": "row", "block": 64, "mask_factors": False, "temperature": 0.5}
REST = {"inputs": {}, "fusion": {"kind": "sum", "scale": 1.0, "density": 0.2, "drop": 0.2}, "kind": "safegraft mask"}


def stored(out):
    logits = {"a.weight": normal((3,), 0), "b.bias": normal((5,), 1).bfloat16()}
    tensors = {"a.weight": {"shape": [3, 4]}, "b.bias": {"shape": [5]}}
    return write_mask(out, logits, {**REST, "config": CONFIG, "tensors": tensors}, force=False), logits


def test_a_mask_on_disk_is_a_tensor_source(tmp_path):
    made, logits = stored(tmp_path / "mask")
    assert isinstance(made, TensorSource)
    assert list(made.names()) == list(made.weights) == ["a.weight", "b.bias"]
    assert made.spec("b.bias").dtype == torch.bfloat16
    assert all(torch.equal(made.read(n), s) for n, s in logits.items())
    found = made.masking("a.weight", Workspace())
    assert (found.shape, found.grain.granularity) == ((3, 4), "row")
    assert torch.equal(found.values, logits["a.weight"])


def test_what_is_no_mask_or_damaged_is_refused(tmp_path, tiny):
    made, _ = stored(tmp_path / "mask")
    with pytest.raises(CheckpointError, match="somf train"):
        Mask(tmp_path)
    data = bytearray((made.path / FILE).read_bytes())
    data[-1] ^= 1
    (made.path / FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match="changed or damaged"):
        Mask(made.path).masking("b.bias", Workspace())
    told = json.loads((made.path / "manifest.json").read_text())
    told["tensors"]["a.weight"]["shape"] = [4, 4]
    (made.path / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"no logits a\.weight"):
        Mask(made.path)
    from safegraft import Checkpoint

    with pytest.raises(MismatchError, match="not there"):
        made.check_base(Checkpoint.open(tiny("llama")))
