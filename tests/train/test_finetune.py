import pytest
import torch

import chat_models
from safegraft.errors import ConfigError, NumericError
from safegraft.train.data import Pair
from safegraft.train.finetune import finetune

ROWS = [Pair(f"How do I bake bread for {n}?", f"Mix {n} cups.") for n in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_models.build(tmp_path_factory.mktemp("model") / "m")


def run(folder, tmp_path, **changes):
    model, tokenizer = chat_models.load(folder)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {"epochs": 2, "lr": 1e-3, "batch": 2, "seed": 3, "output_dir": tmp_path / "work"} | changes
    result = finetune(model, tokenizer, ROWS, **settings)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return model, result, moved


def test_it_learns_reports_and_moves_all_but_embeddings(folder, tmp_path):
    seen = []
    model, result, moved = run(folder, tmp_path, epochs=6, progress=lambda *now: seen.append(now))
    assert result.steps == 18 == len(result.losses) == len(seen)
    assert seen[-1][:2] == (18, 18)
    assert result.losses[-1] < result.losses[0]
    assert moved == {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight"}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training


def test_only_named_parameters_move(folder, tmp_path):
    model, result, moved = run(folder, tmp_path, trainable=[r"\.self_attn\.[qkvo]_proj\."])
    assert moved == {n for n, _ in model.named_parameters() if "self_attn" in n}
    assert result.trained == sum(p.numel() for n, p in model.named_parameters() if n in moved)


def test_same_seed_same_weights_other_seed_other_weights(folder, tmp_path):
    weights = [run(folder, tmp_path, seed=seed)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], weights[2][n]) for n in weights[0])


def test_bfloat16_multiplies_and_float32_stays(folder, tmp_path):
    (plain, told, _), (mixed, rounded, moved) = (run(folder, tmp_path, bf16=b, epochs=4) for b in (False, True))
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert moved == {n for n, _ in mixed.named_parameters()} - {"model.embed_tokens.weight"}
    assert rounded.losses != told.losses
    assert rounded.losses == pytest.approx(told.losses, rel=0.02)
    again = run(folder, tmp_path, bf16=True, epochs=4)[0].state_dict()
    assert all(torch.equal(w, again[n]) for n, w in mixed.state_dict().items())
    with torch.no_grad():
        ids = torch.arange(5)[None]
        assert mixed(ids).logits.dtype == plain(ids).logits.dtype == torch.float32


def test_nothing_is_saved(folder, tmp_path):
    run(folder, tmp_path)
    assert [f for f in (tmp_path / "work").rglob("*") if f.suffix in (".safetensors", ".bin", ".pt")] == []


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"trainable": ["zzz"]}]
)
def test_wrong_values_are_refused(folder, tmp_path, changes):
    with pytest.raises(ConfigError):
        run(folder, tmp_path, **changes)


def test_no_rows(folder, tmp_path):
    model, tokenizer = chat_models.load(folder)
    with pytest.raises(ConfigError, match="no rows"):
        finetune(model, tokenizer, [], epochs=1, lr=1e-3, output_dir=tmp_path)


def test_a_loss_that_is_not_finite_stops_it(folder, tmp_path):
    model, tokenizer = chat_models.load(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="loss is nan"):
        finetune(model, tokenizer, ROWS, epochs=1, lr=1e-3, output_dir=tmp_path)
    assert all(p.requires_grad for p in model.parameters())
