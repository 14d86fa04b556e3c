"""LoRA adapters saved by peft: the delta we see is the change peft makes, and what is no plain LoRA is refused."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import noise, silence, weights
from safegraft import merge
from safegraft.errors import CheckpointError, MismatchError, NumericError
from safegraft.tensors.adapter import Adapter, is_adapter, open_base_of
from safegraft.tensors.checkpoint import Checkpoint
from safegraft.tensors.finetune import FineTune
from safegraft.tensors.source import TensorSource

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """``lora(base, **config)``: an adapter with random factors, saved by peft, and the change merging it makes."""
    root, made = tmp_path_factory.mktemp("lora"), {}

    def get(base, *, merged=True, **config):
        key = (base, merged, repr(sorted(config.items())))
        if key in made:
            return made[key]
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        silence()
        out = root / str(len(made))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            before = {n: t.detach().clone() for n, t in model.state_dict().items()}
            adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7} | config))
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * noise(name, parameter.shape, 3)
            adapted.save_pretrained(out)
            change = {}
            if merged:
                after = adapted.merge_and_unload().state_dict()
                change = {n: after[n] - t for n, t in before.items() if not torch.equal(after[n], t)}
        made[key] = out, change
        return made[key]

    return get


PATTERNS = {
    "rank_pattern": {"q_proj": 5, "layers.1.self_attn.v_proj": 2},
    "alpha_pattern": {r"layers\.0\..*q_proj": 11},
}
KINDS = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "rank and alpha patterns": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"], **PATTERNS}),
    "rsLoRA": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
    "rsLoRA with patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, **PATTERNS}),
    "modules to save": (
        "llama",
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "embeddings named otherwise": ("gpt_neox", {"target_modules": ["query_key_value", "embed_in"]}),
    "one layer": ("qwen2", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "mixture of experts": ("mixtral", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "tied, trained as tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied base, other layers": ("gemma2", {"target_modules": ["q_proj", "down_proj"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_what_peft_merges(tiny, lora, kind):
    family, config = KINDS[kind]
    folder, change = lora(tiny(family), **config)
    base = Checkpoint.open(tiny(family))
    adapter = Adapter(folder, base)
    assert isinstance(adapter, TensorSource)
    if base.ties_head:
        change.pop(HEAD, None)
    assert sorted(adapter.names()) == sorted(change)
    for name, expected in change.items():
        assert float(expected.abs().max()) > 1e-3
        assert adapter.spec(name).shape == tuple(expected.shape)
        assert torch.allclose(adapter.read(name), expected, atol=1e-6), name
        delta = adapter.delta(name, base.read(name).float())
        assert torch.allclose(delta.dense(), expected, atol=1e-6), name
        assert delta.norm() == pytest.approx(float(expected.norm()), rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "embeddings", "head", "Conv1D"])
def test_low_rank_stays_factors(tiny, lora, kind):
    family, config = KINDS[kind]
    folder, change = lora(tiny(family), **config)
    adapter = Adapter(folder, Checkpoint.open(tiny(family)))
    for name in change:
        delta = adapter.delta(name, None)
        assert delta.full is None
        assert delta.low.rank == 3


def test_a_trained_layer_below_a_lora_counts_too(tiny, lora, tmp_path):
    """peft stores the embedding beneath its LoRA; where that is not the base's, both changes add up."""
    source, change = lora(tiny("llama"), **KINDS["embeddings"][1])
    folder = Path(shutil.copytree(source, tmp_path / "a"))
    stored = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(stored | {key: stored[key] + 0.5}, folder / "adapter_model.safetensors")
    found = Adapter(folder, Checkpoint.open(tiny("llama"))).read(EMBED)
    assert torch.allclose(found, change[EMBED] + 0.5, atol=1e-6)


def test_bfloat16_factors(tiny, lora, tmp_path):
    source, change = lora(tiny("llama"), **KINDS["plain"][1])
    folder = Path(shutil.copytree(source, tmp_path / "a"))
    stored = load_file(folder / "adapter_model.safetensors")
    save_file({k: t.bfloat16() for k, t in stored.items()}, folder / "adapter_model.safetensors")
    found = Adapter(folder, Checkpoint.open(tiny("llama"))).read(Q0)
    assert torch.allclose(found, change[Q0], atol=2e-2)
    prefix = "base_model.model." + Q0.removesuffix(".weight")
    a, b = (stored[f"{prefix}.lora_{x}.weight"].bfloat16().float() for x in "AB")
    assert torch.allclose(found, 7 / 3 * b @ a, atol=1e-6)


def test_a_linear_layer_with_embedding_in_its_name_is_linear(tmp_path, tiny):
    base = Path(shutil.copytree(tiny("llama"), tmp_path / "base"))
    save_file(weights(base) | {"model.embedding_proj.weight": torch.zeros(6, 4)}, base / "model.safetensors")
    folder = tmp_path / "a"
    folder.mkdir()
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    key = "base_model.model.model.embedding_proj.lora_{}.weight"
    save_file({key.format("A"): a, key.format("B"): b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    found = Adapter(folder, Checkpoint.open(base)).read("model.embedding_proj.weight")
    assert torch.allclose(found, b @ a, atol=1e-6)


class TestTied:
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["lm_head"]},
            {"target_modules": ["embed_tokens"]},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("stored", ["once", "twice"])
    def test_one_end_alone_is_refused(self, tiny, lora, tmp_path, config, stored):
        """The result is tied, so it could not hold a head that differs from the embedding."""
        folder, _ = lora(tiny("llama-tied"), merged=False, **config)
        base = Path(shutil.copytree(tiny("llama-tied"), tmp_path / "base"))
        if stored == "twice":
            tensors = weights(base)
            save_file(tensors | {HEAD: tensors[EMBED].clone()}, base / "model.safetensors")
        with pytest.raises(CheckpointError, match="ensure_weight_tying") as told:
            Adapter(folder, Checkpoint.open(base))
        assert "tie_word_embeddings=False" in told.value.hint

    def test_lora_trained_as_tied_is_applied_once(self, tiny, lora):
        """peft 0.21's merge_and_unload adds it twice, to the one weight under both names; its forward pass does not."""
        config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
        folder, _ = lora(tiny("llama-tied"), merged=False, **config)
        stored = load_file(folder / "adapter_model.safetensors")
        prefix = "base_model.model.model.embed_tokens.lora_embedding_"
        expected = 7 / 3 * (stored[prefix + "B"] @ stored[prefix + "A"]).T
        adapter = Adapter(folder, Checkpoint.open(tiny("llama-tied")))
        assert list(adapter.names()) == [EMBED]
        assert torch.allclose(adapter.read(EMBED), expected, atol=1e-6)


class TestRefused:
    @pytest.fixture
    def adapter(self, tiny, lora, tmp_path):
        return Path(shutil.copytree(lora(tiny("llama"), **KINDS["plain"][1])[0], tmp_path / "adapter"))

    def configure(self, folder, **changes):
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"use_dora": True}, "DoRA"),
            ({"peft_type": "IA3"}, "IA3"),
            ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
            ({"bias": "all"}, "bias='all'"),
            ({"bias": "lora_only"}, "bias='lora_only'"),
            ({"lora_bias": True}, "lora_bias=True"),
            ({"use_qalora": True}, "QA-LoRA"),
            ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
            ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
            ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
            ({"trainable_token_indices": [3]}, "trainable tokens"),
            ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
            ({"init_lora_weights": "olora"}, "olora"),
            ({"init_lora_weights": "loftq"}, "loftq"),
        ],
        ids=lambda v: str(v) if isinstance(v, dict) else "",
    )
    def test_by_name(self, tiny, adapter, changes, named):
        self.configure(adapter, **changes)
        with pytest.raises(CheckpointError) as told:
            Adapter(adapter, Checkpoint.open(tiny("llama")), label="mine")
        assert named in str(told.value)
        assert "mine" in str(told.value)
        assert "peft" in told.value.hint

    @pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
    def test_starts_that_leave_the_base_alone_are_fine(self, tiny, adapter, start):
        self.configure(adapter, init_lora_weights=start)
        assert Q0 in Adapter(adapter, Checkpoint.open(tiny("llama")))

    @pytest.mark.parametrize("config", [{"init_lora_weights": "pissa"}, {"use_dora": True}], ids=str)
    def test_as_peft_itself_saves_them(self, tiny, lora, config):
        folder, _ = lora(tiny("llama"), merged=False, target_modules=["q_proj"], **config)
        with pytest.raises(
            CheckpointError, match=str(next(iter(config.values()))) if "init" in str(config) else "DoRA"
        ):
            Adapter(folder, Checkpoint.open(tiny("llama")))

    def test_pickle(self, tiny, adapter):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="pickle"):
            Adapter(adapter, Checkpoint.open(tiny("llama")))

    def test_no_weights(self, tiny, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
            Adapter(adapter, Checkpoint.open(tiny("llama")))

    def test_damaged_config(self, tiny, adapter):
        (adapter / "adapter_config.json").write_text("{")
        with pytest.raises(CheckpointError, match="not readable JSON"):
            Adapter(adapter, Checkpoint.open(tiny("llama")))

    def test_wrong_base(self, tiny, adapter):
        with pytest.raises(MismatchError) as told:
            Adapter(adapter, Checkpoint.open(tiny("gpt_neox")), label="mine")
        assert "the adapter mine does not fit" in str(told.value)
        assert "the adapter changes model.layers.0.self_attn.q_proj.weight" in str(told.value)
        assert str(tiny("llama")) in told.value.hint

    def test_base_of_another_size(self, tiny, adapter):
        with pytest.raises(MismatchError) as told:
            Adapter(adapter, Checkpoint.open(tiny("llama", hidden_size=32)))
        assert str(told.value).count("update [") == 4

    def test_rank_other_than_its_config_says(self, tiny, adapter):
        self.configure(adapter, r=4)
        with pytest.raises(CheckpointError, match="stored with rank 3, its config says 4"):
            Adapter(adapter, Checkpoint.open(tiny("llama")))

    @pytest.mark.parametrize("half", "AB")
    def test_half_a_pair(self, tiny, adapter, half):
        stored = load_file(adapter / "adapter_model.safetensors")
        del stored["base_model.model.model.layers.0.self_attn.q_proj.lora_" + half + ".weight"]
        save_file(stored, adapter / "adapter_model.safetensors")
        with pytest.raises(MismatchError, match="factor beside it"):
            Adapter(adapter, Checkpoint.open(tiny("llama")))

    def test_an_unknown_kind_of_entry(self, tiny, adapter):
        stored = load_file(adapter / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
        save_file(stored | {key: torch.ones(16)}, adapter / "adapter_model.safetensors")
        with pytest.raises(MismatchError, match="lora_magnitude_vector is of a kind that is not handled"):
            Adapter(adapter, Checkpoint.open(tiny("llama")))

    def test_nan(self, tiny, adapter):
        stored = load_file(adapter / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        stored[key][0, 0] = torch.nan
        save_file(stored, adapter / "adapter_model.safetensors")
        with pytest.raises(NumericError, match=r"q_proj\.lora_B"):
            Adapter(adapter, Checkpoint.open(tiny("llama"))).read(Q0)


class TestBase:
    @pytest.fixture
    def adapter(self, tiny, lora, tmp_path):
        return Path(shutil.copytree(lora(tiny("llama"), **KINDS["plain"][1])[0], tmp_path / "adapter"))

    def test_is_read_from_the_config(self, tiny, adapter):
        assert is_adapter(adapter)
        assert open_base_of(adapter, None).path == tiny("llama")
        fine = FineTune.open(adapter, None, None)
        assert fine.base.path == fine.layout.path == tiny("llama")
        assert fine.label == str(adapter)

    def test_given_wins(self, tiny, adapter, tmp_path):
        other = Path(shutil.copytree(tiny("llama"), tmp_path / "other"))
        assert open_base_of(adapter, other).path == other

    def test_named_nowhere(self, adapter):
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="does not say what it was trained on") as told:
            open_base_of(adapter, None)
        assert "--base" in told.value.hint

    def test_its_revision_counts(self, tiny, adapter, tmp_path, monkeypatch):
        from huggingface_hub import constants

        for commit, ref, family in (("a" * 40, "main", "qwen2"), ("b" * 40, "v2", "llama")):
            repo = tmp_path / "cache" / "models--owner--name"
            shutil.copytree(tiny(family), repo / "snapshots" / commit)
            (repo / "refs").mkdir(exist_ok=True)
            (repo / "refs" / ref).write_text(commit)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        config = json.loads((adapter / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "owner/name", "revision": "v2"}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        assert open_base_of(adapter, None).config["model_type"] == "llama"

    def test_an_adapter_is_no_base(self, tiny, adapter, tmp_path, trio):
        with pytest.raises(CheckpointError, match="is an adapter, not a whole model"):
            merge(trio("llama").task, trio("llama").vector, tmp_path / "out", base=adapter)
