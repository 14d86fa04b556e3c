"""What --dry-run expects of time: a 70B model from its headers alone, and sums that can be done by hand."""

import json
import os
import time

import pytest
import torch

from models import leftovers, weights
from safegraft.config import MergeConfig, load
from safegraft.merging import forecast as module
from safegraft.merging.forecast import Speeds, forecast
from safegraft.merging.run import prepare
from safegraft.tensors.files import build_layout
from safegraft.tensors.source import TensorSpec
from safegraft.tensors.vector import KIND, VECTOR

HIDDEN, INNER, KV, VOCABULARY, LAYERS = 8192, 28672, 1024, 128256, 80
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,),
}  # fmt: skip


def sparse(file, specs):
    """A safetensors file of the right size that takes no room."""
    layout = build_layout(file.name, specs, {"format": "pt"})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(layout.header)
    os.truncate(file, layout.nbytes)


@pytest.fixture(scope="module")
def llama70b(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama70b")
    shapes = {f"model.layers.{i}.{n}.weight": shape for i in range(LAYERS) for n, shape in LAYER.items()}
    outer = {f"{n}.weight": (VOCABULARY, HIDDEN) for n in ("model.embed_tokens", "lm_head")}
    for name in ("base", "task"):
        sparse(
            root / name / "model.safetensors", [TensorSpec(n, torch.bfloat16, s) for n, s in (shapes | outer).items()]
        )
        (root / name / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    changed = {n: shape for n, shape in shapes.items() if "self_attn" in n}
    sparse(root / "vector" / VECTOR, [TensorSpec(n, torch.float32, shape) for n, shape in changed.items()])
    table = {n: {"shape": list(shape), "norm": 1.0} for n, shape in changed.items()}
    manifest = {"kind": KIND, "rank": None, "norm": 1.0, "tensors": table, "inputs": {}, "config": {}}
    (root / "vector" / "manifest.json").write_text(json.dumps(manifest | {"outputs": {"tensors": {}}}))
    return {"model": str(root / "task"), "base": str(root / "base"), "vector": str(root / "vector")}


def test_70b_from_its_headers(llama70b, tmp_path):
    ready = {
        method: prepare(
            load(MergeConfig, None, llama70b | {"out": str(tmp_path / "out"), "method": method, "workers": 1})
        )
        for method in ("norm_matched", "interference")
    }
    start = time.perf_counter()
    told = {method: forecast(one) for method, one in ready.items()}
    assert time.perf_counter() - start < 60
    assert leftovers(tmp_path) == []
    # 141 GB twice: no machine hashes them in 20 s a core; and SVDs of 8192 × 8192 cost more than adding does
    assert told["norm_matched"].survey > 20
    assert told["interference"].merge > 2 * told["norm_matched"].merge
    assert told["interference"].survey == pytest.approx(told["norm_matched"].survey, rel=0.9)


def test_by_hand(trio, tmp_path, monkeypatch):
    t = trio("llama")
    given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "out")}
    monkeypatch.setattr(module, "measured", lambda *_: Speeds(4.0, 2.0, 1e9, 0.0, 0.0))
    monkeypatch.setattr(module, "_method", lambda *_: 0.0)
    ready = prepare(load(MergeConfig, None, given | {"workers": 1, "method": "norm_matched"}))
    sizes = {n: w.numel() * 4 for n, w in weights(t.task).items()}
    stored = {n: w.numel() * 4 for n, w in weights(t.vector).items() if "#" not in n}  # the method wants no SVD
    changed = sum(size for n, size in sizes.items() if n in stored)
    told = forecast(ready)
    assert told.survey == pytest.approx((2 * sum(sizes.values()) + sum(stored.values())) * (1 / 4 + 1 / 2))
    copied = sum(sizes.values()) - changed
    assert told.merge == pytest.approx(copied / 2 * 2 + (2 * changed + sum(stored.values())) / 2 + changed / 4)
    assert told.total == pytest.approx(module.START + told.survey + told.merge)  # one core has none for hashing ahead
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    ready = prepare(load(MergeConfig, None, given | {"workers": 2, "method": "norm_matched"}))
    assert forecast(ready).ahead == pytest.approx(module.START / 2)  # more to hash than the start lasts
    monkeypatch.setattr(module, "measured", lambda *_: Speeds(1e9, 2.0, 1e9, 0.0, 0.0))
    assert 0 < forecast(ready).ahead < 0.001


@pytest.mark.parametrize(("cost", "power"), [(lambda n: n**2, 2), (lambda n: n**3, 3)])
def test_the_methods_growth_is_measured(llama70b, tmp_path, monkeypatch, cost, power):
    ready = prepare(load(MergeConfig, None, llama70b | {"out": str(tmp_path / "out")}))
    monkeypatch.setattr(module, "_trial", lambda ready, rows, columns, *kinds: 1e-9 * cost(min(rows, columns)))
    unit = next(u for u in ready.plan.units if "q_proj" in u.name)
    assert module._method(unit, ready, {}) == pytest.approx(1e-9 * HIDDEN**power)


@pytest.mark.parametrize("method", ["ties", "della", "tsv_merge", "slerp", "lox", "safe_lora"])
def test_every_kind_of_method_can_be_tried(trio, tmp_path, method):
    t = trio("llama")
    given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "out")}
    told = forecast(prepare(load(MergeConfig, None, given | {"method": method})))
    assert 0 < told.merge < 60
    assert told.total > told.survey > 0
