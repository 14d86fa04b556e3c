"""Tiny models of real architectures, written by transformers, and what tests do to their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from safegraft import merge
from safegraft.tensors.files import build_layout
from safegraft.tensors.scopes import in_scope
from safegraft.tensors.shards import sha256
from safegraft.tensors.source import TensorSpec, as_bytes
from safegraft.tensors.vector import KIND, VECTOR
from safegraft.tensors.writer import JOURNAL, OutputFolder

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES: dict[str, dict] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral"},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 4, "sliding_window": 16},
    "gemma3_text": {"model_type": "gemma3_text", "query_pre_attn_scalar": 4, "sliding_window": 16},
    "phi3": {"model_type": "phi3"},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None, "head_dim": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16},
}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}

quiet = {"disable_progress_bar", "set_verbosity_error"}


def silence() -> None:
    """No progress bars and no advice from transformers, which would only hide what a test says."""
    from transformers.utils import logging

    for name in quiet:
        getattr(logging, name)()


def build(family: str, out: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes):
    """Save a random model of ``family`` to ``out``; norms and biases are random too, or no test would see them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    silence()
    settings = {**GPT2} if family == "gpt2" else {**COMMON, **FAMILIES[family]}
    settings |= changes
    kind = settings.pop("model_type")
    config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if v is not None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.05 * torch.randn(parameter.shape, generator=rng)).to(dtype)
    model.save_pretrained(out, max_shard_size=shard)
    tokenizer(out, settings["vocab_size"])
    (out / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    return out


def tokenizer(out: Path, size: int, *, shift: int = 0) -> Path:
    """A real word-level tokenizer of ``size`` entries; ``shift`` moves the ids of its words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = [f"w{(i + shift) % (size - 3)}" for i in range(size - 3)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *words])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    made.save(str(out / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(kind))
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the safetensors library reads it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewritten(source: Path, out: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """A copy of ``source`` with ``change(name, tensor)`` in place of each tensor (None drops it)."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        kept = {name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}
        save_file(kept, out / file.name, metadata)
    return out


def noise(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Normal numbers that depend on the name and the seed only."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
    return torch.randn(tuple(shape), generator=rng)


def finetuned(source: Path, out: Path, *, seed: int = 1, scale: float = 1e-3) -> Path:
    """Every floating-point parameter moved a little."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return (tensor.float() + scale * noise(name, tensor.shape, seed)).to(tensor.dtype)

    return rewritten(source, out, change)


def unaligned(source: Path, out: Path, *, seed: int = 2, scale: float = 1e-3, scope: str = "attention") -> Path:
    """Only the parameters in ``scope`` moved."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if not in_scope(name, scope) or not tensor.is_floating_point():
            return tensor
        return (tensor.float() + scale * noise(name, tensor.shape, seed)).to(tensor.dtype)

    return rewritten(source, out, change)


def vector_by_hand(out: Path, deltas: dict[str, Tensor]) -> Path:
    """A vector folder with exactly these deltas, stored dense and without factors."""
    out.mkdir(parents=True)
    deltas = {n: d.float().contiguous() for n, d in deltas.items()}
    layout = build_layout(VECTOR, [TensorSpec(n, torch.float32, tuple(d.shape)) for n, d in deltas.items()])
    (out / VECTOR).write_bytes(layout.header + b"".join(bytes(as_bytes(d)) for d in deltas.values()))
    table = {n: {"shape": list(d.shape), "norm": float(d.norm())} for n, d in deltas.items()}
    norm = sum(t["norm"] ** 2 for t in table.values()) ** 0.5
    manifest = {"kind": KIND, "rank": None, "norm": norm, "tensors": table, "inputs": {}, "config": {}}
    (out / "manifest.json").write_text(json.dumps(manifest | {"outputs": {}}))
    signed_again(out)
    return out


def signed_again(vector: Path) -> None:
    """Give a vector's manifest the digests of the bytes that are there now."""
    manifest = json.loads((vector / "manifest.json").read_text())
    manifest["outputs"]["tensors"] = {n: sha256(as_bytes(t)) for n, t in load_file(vector / VECTOR).items()}
    (vector / "manifest.json").write_text(json.dumps(manifest))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path inside the folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def same_model(out: Path, expected: Path) -> None:
    """Every file but the manifest, byte for byte; of the manifest all but times and the settings of the attempt."""
    ours, theirs = files_of(out), files_of(expected)
    assert set(ours) == set(theirs)
    for name in set(ours) - {"manifest.json"}:
        assert ours[name] == theirs[name], name
    a, b = json.loads(ours["manifest.json"]), json.loads(theirs["manifest.json"])
    for key in ("kind", "outputs", "result", "inputs", "versions", "seed"):
        assert a[key] == b[key], key


class Stop(BaseException):
    """Stands for a kill where only what is left on the disk matters."""


def interrupted(out, monkeypatch, after, **settings):
    """Merge, and stop in the middle, once ``after`` tensors are done. Returns the unfinished output."""
    real = OutputFolder.done

    def done(self, *args):
        real(self, *args)
        if len(self.finished) == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "done", done)
        with pytest.raises(Stop):
            merge(out=out, workers=1, **settings)
    assert not out.exists()
    return out.with_name(out.name + ".partial")


def journalled(partial: Path) -> set[str]:
    """The tensors that an unfinished output's journal calls done."""
    lines = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines() if line]
    return {line["tensor"] for line in lines}


def leftovers(folder: Path) -> list[str]:
    """What lies in ``folder``, hidden files too."""
    return sorted(p.name for p in folder.iterdir())


def generates(folder: Path, tokens: int = 5) -> list[int]:
    """Load a folder as transformers does, with nothing missing or left over, and continue a prompt greedily."""
    from transformers import AutoModelForCausalLM

    silence()
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not told.get(kind), (kind, told[kind])
    prompt = torch.tensor([[3, 4, 5]])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return out[0, 3:].tolist()
