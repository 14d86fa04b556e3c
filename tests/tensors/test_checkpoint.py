"""Opening a model's folder: every layout that is read, every kind that is refused and what the refusal says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import build, weights
from safegraft.errors import CheckpointError
from safegraft.tensors.checkpoint import INDEX, Checkpoint, fingerprint, resolve
from safegraft.tensors.source import TensorSource, Workspace


@pytest.fixture
def model(tiny, tmp_path):
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded_model(tiny):
    folder = tiny("llama", shard="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def sharded(sharded_model, tmp_path):
    return Path(shutil.copytree(sharded_model, tmp_path / "model"))


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, *sentences):
    with pytest.raises(CheckpointError) as told:
        Checkpoint.open(folder)
    for sentence in sentences:
        assert sentence in str(told.value)
    return told.value


def same_as_library(folder):
    opened, expected = Checkpoint.open(folder), weights(folder)
    assert set(opened.names()) == set(expected)
    assert all(torch.equal(opened.read(n), t) for n, t in expected.items())
    return opened


def test_single_file(model):
    opened = same_as_library(model)
    assert isinstance(opened, TensorSource)
    assert list(opened.shards) == ["model.safetensors"]
    assert opened.index is None
    assert opened.nbytes == (model / "model.safetensors").stat().st_size
    assert opened.label == str(model)
    assert opened.config["model_type"] == "llama"


def test_sharded_with_index(sharded):
    opened = same_as_library(sharded)
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert {n: opened.shard_of(n) for n in opened.names()} == listed
    assert opened.nbytes == sum(f.stat().st_size for f in sharded.glob("*.safetensors"))


def test_sharded_without_index(sharded):
    (sharded / INDEX).unlink()
    opened = same_as_library(sharded)
    assert len(opened.shards) > 2
    assert opened.index is None


def test_any_file_name(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert list(same_as_library(model).shards) == ["weights.safetensors"]


def test_opening_reads_no_weight(model, monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("safegraft.tensors.files.os.preadv", refuse)
    opened = Checkpoint.open(model)
    assert opened.spec("lm_head.weight").shape == (64, 16)
    with pytest.raises(AssertionError, match="a weight was read"):
        opened.read("lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_read_float_and_chunks(tiny, dtype, monkeypatch):
    folder = tiny("llama", dtype=dtype)
    opened, expected, workspace = Checkpoint.open(folder), weights(folder), Workspace()
    monkeypatch.setattr("safegraft.tensors.checkpoint.CHUNK", 100)
    for name, tensor in expected.items():
        found = opened.read_float(name, workspace, "a")
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor.float())
        parts = [p.clone() for p in opened.chunks(name, workspace, "b")]
        assert len(parts) == -(-tensor.numel() // 100)
        assert torch.equal(torch.cat(parts), tensor.reshape(-1))


def test_index_naming_a_missing_file(sharded):
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(sharded, "the index names 1 file(s) that are not there", lost.name, "fetch the missing files")


def test_index_placing_a_tensor_wrongly(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    name = next(n for n, f in index["weight_map"].items() if f == first)
    index["weight_map"][name] = last
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "places 1 tensor(s) where they are not", name, last)


def test_index_naming_a_tensor_that_is_nowhere(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "ghost.weight")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/etc/passwd"])
def test_index_pointing_out_of_the_folder(sharded, tmp_path, place):
    """A downloaded index must not make us read, or later write, elsewhere."""
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a": torch.ones(2)}, other / "model.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": place}}))
    refused(sharded, place)


def test_a_tensor_in_two_shards(sharded):
    (sharded / INDEX).unlink()
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    refused(sharded, f"{name} is in both {first.name} and {second.name}")


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    refused(sharded, str(shard), "truncated")


def test_damaged_config(model):
    (model / "config.json").write_text("{")
    refused(model, str(model / "config.json"), "not readable JSON")


def test_pickle_is_refused_with_the_command(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    told = refused(tmp_path, "pickle", "save_pretrained")
    assert "python -c" in told.hint
    assert str(tmp_path) in told.hint


def test_pickle_beside_safetensors_is_not_opened(model):
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "lm_head.weight" in Checkpoint.open(model)


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model-Q8_0.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "GGUF", "gguf_file=")


def test_nothing_there(tmp_path):
    refused(tmp_path, "holds no *.safetensors")


@pytest.mark.parametrize(
    ("quantisation", "step"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "dequantize()"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "dequantize()"),
        ({"load_in_4bit": True}, "dequantize()"),
        ({"quant_method": "gptq", "bits": 4}, "quantise the result again"),
        ({"quant_method": "awq", "bits": 4}, "quantise the result again"),
        ({"quant_method": "fp8"}, "dtype=torch.bfloat16"),
        ({"quant_method": "fbgemm_fp8"}, "dtype=torch.bfloat16"),
        ({"quant_method": "compressed-tensors"}, "dequantise it with the tool"),
    ],
    ids=lambda v: str(v.get("quant_method", sorted(v))) if isinstance(v, dict) else "",
)
def test_quantised_is_refused_with_the_step(model, quantisation, step):
    configure(model, quantization_config=quantisation)
    told = refused(model, "quantised")
    assert step in told.hint


def test_quantised_text_part_is_refused(model):
    configure(model, text_config={"quantization_config": {"quant_method": "gptq"}})
    refused(model, "quantised (gptq)")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights_are_refused(model, dtype):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, model / "model.safetensors")
    refused(model, "fp8", name, "dtype=torch.bfloat16")


def test_adapter_in_place_of_a_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "is an adapter, not a whole model", "--model")


def test_a_file_is_not_a_folder(model):
    refused(model / "model.safetensors", "is a file", "folder")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "~/nowhere-at-all"])
def test_no_such_folder(name):
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(name)


def test_stored_tied_head_is_recognised(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llama-tied"), tmp_path / "m"))
    assert Checkpoint.open(folder).tied == {}
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(folder).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    configure(folder, tie_word_embeddings=False)
    assert Checkpoint.open(folder).tied == {}


def test_counterpart_of_a_head(tiny):
    tied, untied = Checkpoint.open(tiny("llama-tied")), Checkpoint.open(tiny("llama"))
    assert tied.counterpart("lm_head.weight") == "model.embed_tokens.weight"
    assert untied.counterpart("lm_head.weight") == "lm_head.weight"
    assert tied.counterpart("model.nothing.weight") is None


def test_sidecars_are_everything_but_weights_and_our_own(model):
    for name in ("extra.txt", "notes/deep.txt", "training_args.bin", "README.md", "manifest.json", ".hidden", "v.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").write_text("x")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights(model), "model.safetensors")}))
    listed = [str(p) for p in Checkpoint.open(model).sidecars()]
    assert listed == sorted(listed)
    assert set(listed) == {
        "chat_template.jinja", "config.json", "extra.txt", "generation_config.json", "notes/deep.txt",
        "tokenizer.json", "tokenizer_config.json", "v.json",
    }  # fmt: skip


def test_fingerprint_notices_a_change(model):
    before = fingerprint(model)
    assert before == fingerprint(model)
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert fingerprint(model) != before


# The Hub: a cache as huggingface_hub lays it out, and no network.


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for seed, (commit, ref) in enumerate([("a" * 40, "main"), ("b" * 40, "v2")]):
        source = build("llama", root / f"source{seed}", seed=seed)
        repo = root / "cache" / "models--owner--name"
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        for file in source.iterdir():
            blob = repo / "blobs" / f"{seed}-{file.name}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return root


@pytest.fixture
def offline(cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_hub_id_from_the_cache(offline):
    opened = Checkpoint.open("owner/name")
    assert opened.label == "owner/name"
    assert opened.path.name == "a" * 40
    expected = load_file(offline / "source0" / "model.safetensors")
    assert all(torch.equal(opened.read(n), t) for n, t in expected.items())
    assert Path("tokenizer.json") in opened.sidecars()


@pytest.mark.parametrize("reference", ["owner/name@v2", "owner/name@" + "b" * 40])
def test_hub_revision(offline, reference):
    opened = Checkpoint.open(reference)
    expected = load_file(offline / "source1" / "model.safetensors")
    assert all(torch.equal(opened.read(n), t) for n, t in expected.items())
    assert Checkpoint.open("owner/name", revision="v2").path == opened.path


@pytest.mark.parametrize("reference", ["owner/other", "owner/name@v3", "gpt-none", "owner/na me"])
def test_hub_id_that_is_not_in_the_cache(offline, reference):
    with pytest.raises(CheckpointError) as told:
        Checkpoint.open(reference)
    assert reference in str(told.value)
    assert "offline, download it first" in told.value.hint


def test_a_folder_wins_over_a_hub_id(offline, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny("qwen2"), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open("owner/name").config["model_type"] == "qwen2"


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_users_cache_settings_are_honoured(cache, tmp_path, variable):
    """In a process of its own, for huggingface_hub reads its environment once."""
    if variable == "HF_HOME":
        (tmp_path / "hub").symlink_to(cache / "cache")
    place = tmp_path if variable == "HF_HOME" else cache / "cache"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    code = "from safegraft import Checkpoint; print(len(Checkpoint.open('owner/name').names()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {variable: str(place), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "21"), done.stderr
