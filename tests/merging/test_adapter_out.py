"""Merges whose output is an adapter: loaded by peft, they give what the full merge gives."""

import json
import warnings

import pytest
import torch

from models import noise, rewritten, silence, weights
from safegraft import merge, subtract
from safegraft.errors import ConfigError, OutputError
from safegraft.merging.adapters import piece
from safegraft.tensors.lowrank import LowRank

PROMPT = torch.tensor([[5, 9, 12, 3, 40]])


@pytest.fixture(scope="module")
def parts(tiny, tmp_path_factory):
    """base, adapter (ranks differ), full fine-tune, and a dense and a low-rank vector of attention scope."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    silence()
    root = tmp_path_factory.mktemp("parts")
    base = tiny("qwen3")
    low = {}

    def away(name, tensor):
        if "self_attn" in name and name.endswith("_proj.weight"):
            left, right = noise(name, (tensor.shape[0], 2), 4), noise(name, (tensor.shape[1], 2), 5)
            low[name] = 0.02 * left @ right.T
            return tensor - low[name]
        return tensor

    unaligned = rewritten(base, root / "unaligned", away)
    subtract(base, unaligned, root / "dense")
    subtract(base, unaligned, root / "low", rank=2)
    task = rewritten(base, root / "task", lambda n, t: t + 0.01 * noise(n, t.shape, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=9, rank_pattern={"v_proj": 2},
                            target_modules=["q_proj", "v_proj", "up_proj"])  # fmt: skip
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * noise(name, parameter.shape, 3)
        tuned.save_pretrained(root / "adapter")
    return root, base, task


def logits(folder, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(PROMPT).logits


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": "norm_matched"},
        {"params": {"damp": "subspace", "score": "none"}},
        {"params": {"damp": "input", "score": "scale-free"}},
        {"method": "lox", "params": {"directions": 1}},
    ],
    ids=str,
)
def test_adapter_and_low_rank_vector_exactly(parts, tmp_path, how):
    root, base, _ = parts
    done = merge(root / "adapter", root / "low", tmp_path / "out", base=base, strength=0.6, as_adapter=True, **how)
    merge(root / "adapter", root / "low", tmp_path / "full", base=base, strength=0.6, **how)
    assert {f["truncation"] for f in done.tensors.values()} == {0.0}
    assert torch.allclose(logits(base, tmp_path / "out"), logits(tmp_path / "full"), atol=2e-5)
    assert not torch.allclose(logits(base, tmp_path / "out"), logits(base, root / "adapter"), atol=1e-3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    merge(tmp_path / "out", root / "low", tmp_path / "again", base=base, strength=0.0)
    ours, full = weights(tmp_path / "again"), weights(tmp_path / "full")
    assert all(torch.allclose(ours[n], full[n], atol=2e-6) for n in full)


def test_a_rank_truncates_and_tells_what_it_lost(parts, tmp_path):
    root, base, _ = parts
    full = merge(root / "adapter", root / "low", tmp_path / "full", base=base, strength=0.6)
    done = merge(root / "adapter", root / "low", tmp_path / "out", base=base, strength=0.6, as_adapter=True, rank=3)
    base_weights, merged = weights(base), weights(tmp_path / "full")
    assert full.alpha == pytest.approx(done.alpha)
    for name, figures in done.tensors.items():
        update = (merged[name] - base_weights[name]).double()
        s = torch.linalg.svdvals(update)
        expected = float(s[3:].norm() / s.norm())
        assert figures["truncation"] == pytest.approx(expected, abs=2e-5), name
    assert max(f["truncation"] for f in done.tensors.values()) > 0.01


def test_adapter_and_dense_vector_need_a_rank(parts, tmp_path):
    root, base, _ = parts
    with pytest.raises(ConfigError, match="--rank"):
        merge(root / "adapter", root / "dense", tmp_path / "out", base=base, as_adapter=True)
    assert not (tmp_path / "out").exists()
    merge(root / "adapter", root / "dense", tmp_path / "out", base=base, strength=0.6, as_adapter=True, rank=16)
    merge(root / "adapter", root / "dense", tmp_path / "full", base=base, strength=0.6)
    assert torch.allclose(logits(base, tmp_path / "out"), logits(tmp_path / "full"), atol=2e-5)


@pytest.mark.parametrize(("vector", "rank"), [("low", None), ("dense", 2), ("dense", 16)])
def test_the_patch_of_a_full_fine_tune(parts, tmp_path, vector, rank):
    """What the vector adds, alone, to put beside the fine-tune and to take off again."""
    root, base, task = parts
    done = merge(task, root / vector, tmp_path / "out", base=base, strength=0.6, as_adapter=True, rank=rank)
    merge(task, root / vector, tmp_path / "full", base=base, strength=0.6)
    assert torch.allclose(logits(task, tmp_path / "out"), logits(tmp_path / "full"), atol=5e-5)
    assert max(f["truncation"] for f in done.tensors.values()) < 1e-2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(task)
    assert all("self_attn" in module for module in config["target_modules"])


def test_what_an_adapter_cannot_carry_is_refused(parts, trio, tiny, tmp_path):
    root, base, task = parts
    whole = trio("qwen3", scope="all")
    with pytest.raises(ConfigError, match=r"no matrix of a linear layer[\s\S]*leave out --as-adapter"):
        merge(whole.task, whole.vector, tmp_path / "out", base=whole.base, as_adapter=True, rank=4)
    with pytest.raises(ConfigError, match="as_adapter"):
        merge(task, root / "dense", tmp_path / "out", base=base, rank=4)
    with pytest.raises(ConfigError, match="change nothing"):
        merge(task, root / "dense", tmp_path / "out", base=base, as_adapter=True, rank=4, strength=0)
    for more, said in (({"device": "cuda"}, "on processors"), ({"resume": True}, "in one go")):
        with pytest.raises(ConfigError, match=said):
            merge(task, root / "dense", tmp_path / "out", base=base, as_adapter=True, rank=4, **more)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        merge(task, root / "dense", tmp_path / "out", base=base, as_adapter=True, rank=4)


@pytest.mark.parametrize("which", ["adapter", "task"])
def test_a_method_without_factors_needs_a_rank(parts, tmp_path, which):
    root, base, task = parts
    model = task if which == "task" else root / "adapter"
    with pytest.raises(ConfigError, match="--rank"):
        merge(model, root / "low", tmp_path / "out", base=base, method="ties", as_adapter=True)
    done = merge(model, root / "low", tmp_path / "out", base=base, method="ties", as_adapter=True, rank=4)
    assert max(f["truncation"] for f in done.tensors.values()) > 0.01


def test_a_piece_keeps_the_best_directions():
    left, right = (torch.linalg.qr(noise(n, (9, 3), 1)).Q for n in "ab")
    s = torch.tensor([4.0, 3.0, 1.0])
    update = LowRank(left * s, right)
    for given in (update, update.dense()):
        kept = piece("w", given, 2, {})
        assert torch.allclose(kept.factors.dense(), (left[:, :2] * s[:2]) @ right[:, :2].T, atol=1e-5)
        assert kept.figures["truncation"] == pytest.approx((1 / 26) ** 0.5, abs=1e-4)
    assert piece("w", update, None, {}).factors is update
