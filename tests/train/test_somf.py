"""The masked model and its training: gradients against finite differences, what moves and what does not."""

import math

import pytest
import torch

import chat_models
import models
from safegraft.tensors.masking import Grain
from safegraft.tensors.randomness import generator
from safegraft.train.data import encode
from safegraft.train.masked import MaskedModel, PairCollator, dpo_loss, pair_log_probs
from safegraft.train.preferences import EncodedPair
from safegraft.train.somf import SomfRecipe, learn, rounded_at_random

NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]


class Plain:
    """A change that is one tensor."""

    def __init__(self, tensor):
        self.tensor, self.masked = tensor, {"": tuple(tensor.shape)}

    def __call__(self, gates):
        return self.tensor if gates is None else self.tensor * gates[0]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return chat_models.build(tmp_path_factory.mktemp("chat") / "base")


def masked(chat, grain=None, *, dtype=torch.float32, scale=0.05):
    model, tokenizer = chat_models.load(chat)
    own = dict(model.named_parameters())
    changes = {n: Plain(scale * models.noise(n, own[n].shape, 3)) for n in NAMES}
    return MaskedModel(model, changes, {}, grain or Grain(), temperature=0.5, seed=7, dtype=dtype), tokenizer


def pairs_of(tokenizer, count=6):
    def side(i, text):
        return encode(tokenizer, f"Question {i}?", text)

    return [EncodedPair(side(i, "No, sorry."), side(i, f"Sure: {i}!")) for i in range(count)]


def test_weights_are_installed_to_generate_with_and_taken_out_again(chat):
    made, tokenizer = masked(chat)
    own = {n: p.detach().clone() for n, p in made.frozen.named_parameters()}
    ids = torch.tensor([tokenizer("Hi there")["input_ids"]])
    with made.installed(made.plain()) as model, torch.no_grad():
        found = model(input_ids=ids).logits
    other, _ = chat_models.load(chat)
    with torch.no_grad():
        for name, change in made.changes.items():
            other.get_parameter(name).add_(change.tensor)
        assert torch.equal(found, other(input_ids=ids).logits)
    with pytest.raises(ZeroDivisionError), made.installed(made.plain()):
        raise ZeroDivisionError
    assert all(torch.equal(p, own[n]) for n, p in made.frozen.named_parameters())
    assert not torch.equal(found, made.frozen(input_ids=ids).logits)


def test_dpo_by_hand():
    """Margins 1 and −1 against the reference's 0 and 2: −log σ(0.1·1) and −log σ(0.1·(−3))."""
    found = dpo_loss(torch.tensor([-1.0, -3.0, -2.0, -2.0]), torch.tensor([[-5.0, -1.0], [-5.0, -3.0]]), 0.1)
    expected = (math.log1p(math.exp(-0.1)) + math.log1p(math.exp(0.3))) / 2
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_log_probabilities_are_the_models(chat):
    """Sum over the answer's tokens, padded or not, with tied embeddings replaced at both ends."""
    made, tokenizer = masked(chat)
    pairs = pairs_of(tokenizer)
    found = pair_log_probs(made, tokenizer, {}, pairs, at_a_time=4)
    model, _ = chat_models.load(chat)
    for pair, got in zip(pairs, found, strict=True):
        for side, value in zip((pair.chosen, pair.rejected), got, strict=True):
            logits = model(input_ids=torch.tensor([side.ids])).logits[0].detach().log_softmax(-1)
            scored = [float(logits[i - 1, t]) for i, t in enumerate(side.labels) if t >= 0]
            assert value == pytest.approx(sum(scored), rel=1e-4)
    embedding = "model.embed_tokens.weight"
    other = dict(made.frozen.named_parameters())[embedding] * 1.1
    changed = pair_log_probs(made, tokenizer, {embedding: other}, pairs[:1], at_a_time=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    same = MaskedModel(model, {}, {}, Grain(), temperature=0.5, seed=0)
    assert changed[0] == pytest.approx(pair_log_probs(same, tokenizer, {}, pairs[:1], at_a_time=1)[0], rel=1e-5)


@pytest.mark.parametrize("grain", [Grain(), Grain("row"), Grain("block", 8)], ids=lambda g: g.granularity)
def test_the_gradient_of_the_loss_against_finite_differences(chat, grain):
    """Of DPO's loss through the model, the change, the mean and the draw, in the directions of random logits."""
    made, tokenizer = masked(chat, grain, scale=0.3)
    batch = PairCollator(tokenizer, made.frozen)([(p, (-30.0, -31.0)) for p in pairs_of(tokenizer, 3)])
    for i, s in enumerate(made.logits):
        s.data = models.noise(str(i), s.shape, 1)

    def loss():
        return dpo_loss(made(batch["batch"], "3/0"), batch["reference"], 0.5)

    loss().backward()
    for i, s in enumerate(made.logits):
        direction, start = models.noise(f"d{i}", s.shape, 2), s.data.clone()
        exact = float((s.grad * direction).sum())
        ends = []
        for step in (3e-3, -3e-3):
            s.data = start + step * direction
            ends.append(float(loss().detach()))
        s.data = start
        assert exact == pytest.approx((ends[0] - ends[1]) / 6e-3, rel=3e-2, abs=2e-4)
    assert all(p.grad is None for p in made.frozen.parameters())


def test_every_draw_is_fresh_and_comes_again_by_its_name(chat):
    made, tokenizer = masked(chat)
    batch = PairCollator(tokenizer, made.frozen)([(p, (0.0, 0.0)) for p in pairs_of(tokenizer, 2)])["batch"]
    first, second, again = (made(batch, draw).detach() for draw in ("0/0", "0/1", "0/0"))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("how", [{}, {"optimizer": "adafactor"}, {"micro_batch": 2}], ids=str)
def test_only_the_logits_move_and_the_reference_never(chat, tmp_path, how):
    made, tokenizer = masked(chat, scale=0.5)
    pairs = pairs_of(tokenizer, 8)
    before = {n: p.clone() for n, p in made.frozen.named_parameters()}
    reference = pair_log_probs(made, tokenizer, {}, pairs, at_a_time=4)
    recipe = SomfRecipe(**{"lr": 0.05, "batch": 4, "steps": 12, "save_steps": 5, **how})
    losses = learn(made, tokenizer, pairs, reference, recipe, tmp_path)
    assert len(losses) == 12
    assert all(bool(s.detach().any()) for s in made.logits)
    assert all(torch.equal(p, before[n]) for n, p in made.frozen.named_parameters())
    assert all(not p.requires_grad for p in made.frozen.parameters())
    assert pair_log_probs(made, tokenizer, {}, pairs, at_a_time=4) == reference
    held = torch.load(tmp_path / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert set(held["state"]) == {0, 1, 2}

    def loss(weights):
        sides = torch.tensor(pair_log_probs(made, tokenizer, weights, pairs, at_a_time=4)).T.reshape(-1)
        return float(dpo_loss(sides, torch.tensor(reference).T, recipe.beta))

    assert loss(made.deployed("continuous")) < loss(made.plain())
    assert loss(made.deployed("binary")) < loss(made.plain())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(chat, tmp_path, dtype, optimizer):
    recipe = SomfRecipe(lr=0.05, batch=4, micro_batch=2, steps=7, save_steps=3, optimizer=optimizer)

    def attempt(folder, **how):
        made, tokenizer = masked(chat, scale=0.5, dtype=dtype)
        pairs = pairs_of(tokenizer)
        losses = learn(made, tokenizer, pairs, [(-20.0, -20.0)] * len(pairs), recipe, folder, **how)
        return made, losses

    class StopError(Exception):
        pass

    def stop(step, steps, loss):
        if step == 5:
            raise StopError

    whole, losses = attempt(tmp_path / "whole")
    with pytest.raises(StopError):
        attempt(tmp_path / "cut", progress=stop)
    seen = []
    resumed, again = attempt(tmp_path / "cut", resume=True, progress=lambda step, *_: seen.append(step))
    assert seen[0] == 4
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.logits, resumed.logits, strict=True))
    assert all(s.dtype == dtype for s in resumed.logits)


def test_rounding_at_random_keeps_the_mean():
    """0.5 + 1e-3 lies a quarter of the way between two bfloat16 numbers; rounded to the nearest it would stay 0.5."""
    values = torch.full((100_000,), 0.501)
    found = rounded_at_random(values, generator(0, "r"))
    assert found.dtype == torch.bfloat16
    assert set(found.unique().float().tolist()) == {0.5, 0.50390625}
    assert float(found.float().mean()) == pytest.approx(0.501, abs=3e-5)
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, 1e-30]).bfloat16().float()
    assert torch.equal(rounded_at_random(exact, generator(0, "r")).float(), exact)


def test_bfloat16_logits_take_steps_below_their_resolution(chat, tmp_path):
    """40 steps of at most 1e-3 from ½ on move the logits as float32 ones, but for rounding noise."""
    recipe = SomfRecipe(lr=1e-3, batch=2, steps=40, save_steps=100)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        made, tokenizer = masked(chat, scale=0.5, dtype=dtype)
        for s in made.logits:
            s.data.fill_(0.5)
        pairs = pairs_of(tokenizer, 2)
        learn(made, tokenizer, pairs, [(-20.0, -20.0)] * 2, recipe, tmp_path / str(dtype))
        moved[dtype] = made.logits[0].detach().float() - 0.5
    wide, narrow = moved[torch.float32], moved[torch.bfloat16]
    assert float(wide.abs().mean()) > 3e-3
    cosine = float((wide * narrow).sum() / (wide.norm() * narrow.norm()))
    assert cosine > 0.6
    assert float((narrow != 0).float().mean()) > 0.5
