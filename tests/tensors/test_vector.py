"""Safety vectors: what subtraction stores, what it reconstructs, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from models import build, files_of, finetuned, leftovers, rewritten, same_model, unaligned, weights
from safegraft import merge
from safegraft.errors import CheckpointError, ConfigError, LineageError, MismatchError, NumericError, OutputError
from safegraft.tensors.making import subtract
from safegraft.tensors.scopes import in_scope
from safegraft.tensors.source import TensorSource, Workspace
from safegraft.tensors.vector import VECTOR, SafetyVector, describe
from safegraft.tensors.writer import OutputFolder

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SCOPED = {
    "attention": lambda n: any(p in n for p in ATTENTION),
    "ffn": lambda n: any(p in n for p in MLP),
    "hybrid": lambda n: any(p in n for p in ATTENTION + MLP),
    "all": lambda n: True,
}


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return tiny("llama"), finetuned(tiny("llama"), root / "other", seed=7)


def triplets(vector, name):
    return (vector._get(f"{name}#{part}", Workspace(), part) for part in "usv")


@pytest.mark.parametrize("scope", SCOPED)
def test_scope_and_exact_values(pair, tmp_path, scope):
    aligned, other = (weights(p) for p in pair)
    vector = subtract(*pair, tmp_path / "v", scope=scope)
    assert isinstance(vector, TensorSource)
    assert set(vector.names()) == {n for n in aligned if SCOPED[scope](n)}
    for name in vector.names():
        assert torch.equal(vector.read(name), aligned[name] - other[name])
        assert vector.tensor_norm(name) == pytest.approx(float((aligned[name] - other[name]).norm()), rel=1e-6)
    total = math.sqrt(sum(float((aligned[n] - other[n]).double().norm()) ** 2 for n in vector.names()))
    assert vector.norm == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "qwen2_moe", "mixtral", "gpt_oss", "gpt2"])
def test_scopes_name_the_same_parts_in_every_family(tiny, family):
    names = list(weights(tiny(family)))
    attention = {n for n in names if in_scope(n, "attention")}
    ffn = {n for n in names if in_scope(n, "ffn")}
    assert attention
    assert ffn
    assert not attention & ffn
    assert {n for n in names if in_scope(n, "hybrid")} == attention | ffn
    rest = set(names) - attention - ffn
    assert all(any(w in n for w in ("norm", "ln_", "embed", "lm_head", "wte", "wpe", "sinks")) for n in rest)


def test_only_what_differs_is_stored(tiny, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    other = rewritten(tiny("llama"), tmp_path / "o", lambda n, t: t + 1 if n == name else t)
    assert list(subtract(tiny("llama"), other, tmp_path / "v").names()) == [name]


def test_the_sign_adds_safety(tiny, tmp_path):
    other = rewritten(tiny("llama"), tmp_path / "o", lambda n, t: t - 1 if n.endswith("q_proj.weight") else t)
    vector = subtract(tiny("llama"), other, tmp_path / "v")
    assert all(torch.allclose(vector.read(n), torch.tensor(1.0)) for n in vector.names())


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_stored_triplets_are_the_leading_ones(pair, tmp_path, keep):
    vector = subtract(*pair, tmp_path / "v", keep=keep)
    for name in vector.names():
        delta = vector.read(name).double()
        k = int(keep * min(delta.shape))
        u, s, v = triplets(vector, name)
        assert (u.shape, s.shape, v.shape) == ((delta.shape[0], k), (k,), (delta.shape[1], k))
        full = torch.linalg.svdvals(delta)
        assert torch.allclose(s.double(), full[:k], rtol=1e-5)
        left = float((delta - ((u * s) @ v.T).double()).norm())
        assert left == pytest.approx(float(full[k:].norm()), abs=1e-5 * float(full[0]))
        assert torch.allclose(u.T @ u, torch.eye(k), atol=1e-5)
        assert torch.allclose(v.T @ v, torch.eye(k), atol=2e-4)


@pytest.mark.parametrize("rank", [1, 3, 8, 1000])
def test_rank_is_the_best_approximation(pair, tmp_path, rank):
    """Eckart-Young: nothing of that rank is nearer, and the error is the norm of the directions left out."""
    aligned, other = (weights(p) for p in pair)
    vector = subtract(*pair, tmp_path / "v", rank=rank, scope="hybrid")
    assert vector.rank == rank
    for name in vector.names():
        delta = (aligned[name] - other[name]).double()
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        found = vector.read(name).double()
        error, least = float((delta - found).norm()), float(s[rank:].norm())
        assert error <= least * (1 + 1e-6) + 5e-6 * float(s[0])
        assert torch.allclose(found, best, atol=1e-5 * float(s[0]))
        assert int((torch.linalg.svdvals(found) > 1e-6 * s[0]).sum()) == min(rank, len(s))
        assert vector.tensor_norm(name) == pytest.approx(float(s[:rank].norm()), rel=1e-5)
        assert name not in vector.file.layout.entries
    held = float(torch.tensor([vector.tensor_norm(n) for n in vector.names()]).norm())
    assert vector.norm == pytest.approx(held, rel=1e-5)
    assert vector.manifest["full_norm"] >= vector.norm * (1 - 1e-6)


def test_low_rank_is_smaller(pair, tmp_path):
    dense, low = subtract(*pair, tmp_path / "d"), subtract(*pair, tmp_path / "l", rank=1)
    assert low.file.layout.nbytes < dense.file.layout.nbytes / 2


@pytest.mark.parametrize("scope", ["attention", "hybrid", "all"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "gpt_oss"])
def test_rank_with_vectors_rows_and_stacks(tiny, tmp_path, family, scope):
    """Biases, a matrix of one row (Qwen2-MoE's shared gate) and fused experts have no low-rank form here."""
    base = tiny(family)
    other = finetuned(base, tmp_path / "o", seed=5)
    vector = subtract(base, other, tmp_path / "v", rank=2, scope=scope)
    first, second = weights(base), weights(other)
    for name in vector.names():
        delta = first[name] - second[name]
        whole = delta.dim() != 2 or min(delta.shape) < 2
        found = vector.read(name)
        assert found.shape == delta.shape
        if whole:
            assert torch.equal(found, delta), name
        else:
            assert torch.linalg.matrix_rank(found) == 2
        assert vector.tensor_norm(name) == pytest.approx(float(found.norm()), rel=1e-5), name
    assert vector.norm == pytest.approx(sum(float(vector.read(n).norm()) ** 2 for n in vector.names()) ** 0.5, rel=1e-5)


def test_fused_experts_have_triplets_slice_by_slice(tiny, tmp_path):
    base = tiny("gpt_oss")
    vector = subtract(base, unaligned(base, tmp_path / "o", scope="ffn"), tmp_path / "v", scope="ffn")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    u, s, v = triplets(vector, name)
    assert s.shape == (3, 8)
    for i, delta in enumerate(vector.read(name)):
        assert torch.allclose(s[i], torch.linalg.svdvals(delta)[:8], rtol=1e-4)
        near = (u[i] * s[i]) @ v[i].T
        left = torch.linalg.svdvals(delta)[8:]
        assert float((delta - near).norm()) == pytest.approx(float(left.norm()), rel=1e-3)


def test_identical_models_have_no_vector(tiny, tmp_path):
    with pytest.raises(MismatchError, match="identical in scope 'attention'"):
        subtract(tiny("llama"), tiny("llama"), tmp_path / "v")
    assert leftovers(tmp_path) == []


def test_identical_in_scope_only(tiny, tmp_path):
    other = unaligned(tiny("llama"), tmp_path / "o", scope="ffn")
    with pytest.raises(MismatchError, match="identical in scope 'attention'"):
        subtract(tiny("llama"), other, tmp_path / "v")


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": -1}, {"keep": 0.0}, {"keep": 1.5}, {"keep": math.nan}, {"scope": "x"}]
)
def test_values_out_of_range(pair, tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        subtract(*pair, tmp_path / "v", **wrong)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("which", ["aligned", "unaligned"])
def test_nan_is_named(pair, tmp_path, which):
    name = "model.layers.0.self_attn.k_proj.weight"
    source = pair[0] if which == "aligned" else pair[1]
    bad = rewritten(source, tmp_path / "bad", lambda n, t: torch.full_like(t, math.nan) if n == name else t)
    models = (bad, pair[1]) if which == "aligned" else (pair[0], bad)
    with pytest.raises(NumericError, match=name):
        subtract(*models, tmp_path / "v")
    assert leftovers(tmp_path) == ["bad"]


def test_low_rank_and_dense_give_the_same_merge(tiny, tmp_path, trio):
    """A delta that has rank 2: factors are all there is to know of it."""
    base, task = trio("llama").base, trio("llama").task

    def change(name, tensor):
        if not in_scope(name, "attention"):
            return tensor
        rng = torch.Generator().manual_seed(len(name))
        return tensor + 0.01 * torch.randn(len(tensor), 2, generator=rng) @ torch.randn(2, 16, generator=rng)

    other = rewritten(base, tmp_path / "o", change)
    subtract(base, other, tmp_path / "dense")
    subtract(base, other, tmp_path / "low", rank=2)
    a = merge(task, tmp_path / "dense", tmp_path / "a", base=base, strength=0.7, method="enchtable", workers=1)
    b = merge(task, tmp_path / "low", tmp_path / "b", base=base, strength=0.7, method="enchtable", workers=1)
    assert a.alpha == pytest.approx(b.alpha, rel=1e-5)
    for name, figures in a.tensors.items():
        assert b.tensors[name]["interference"] == pytest.approx(figures["interference"], rel=1e-4)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(first[n], second[n], atol=1e-6) for n in first)


def test_bfloat16_models_subtract_in_float32(tiny, tmp_path):
    base = tiny("llama", dtype=torch.bfloat16)
    other = unaligned(base, tmp_path / "o", scale=1e-2)
    vector = subtract(base, other, tmp_path / "v")
    first, second = weights(base), weights(other)
    for name in vector.names():
        assert torch.equal(vector.read(name), first[name].float() - second[name].float())


def test_a_tied_head_stored_twice_is_subtracted_once(tiny, tmp_path):
    from safetensors.torch import save_file

    folders = []
    for i, source in enumerate((tiny("llama-tied"), finetuned(tiny("llama-tied"), tmp_path / "o"))):
        folder = Path(shutil.copytree(source, tmp_path / f"twice{i}"))
        tensors = weights(folder)
        both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(both, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    vector = subtract(*folders, tmp_path / "v", scope="all")
    assert "model.embed_tokens.weight" in vector
    assert "lm_head.weight" not in vector


def test_same_inputs_same_bytes(pair, tmp_path):
    subtract(*pair, tmp_path / "a")
    subtract(*pair, tmp_path / "b")
    assert (tmp_path / "a" / VECTOR).read_bytes() == (tmp_path / "b" / VECTOR).read_bytes()


def test_existing_vector_needs_force(pair, tmp_path):
    subtract(*pair, tmp_path / "v")
    before = files_of(tmp_path / "v")
    with pytest.raises(OutputError, match="exists already"):
        subtract(*pair, tmp_path / "v", scope="ffn")
    assert files_of(tmp_path / "v") == before
    subtract(*pair, tmp_path / "v", scope="ffn", force=True)
    assert SafetyVector(tmp_path / "v").manifest["scope"] == "ffn"
    assert leftovers(tmp_path) == ["v"]


def test_manifest_says_where_it_comes_from(pair, tmp_path):
    calls = []
    subtract(*pair, tmp_path / "v", provenance={"data": "abc"}, progress=lambda *a: calls.append(a))
    manifest = json.loads((tmp_path / "v" / "manifest.json").read_text())
    assert manifest["inputs"]["aligned"]["name"] == str(pair[0])
    assert manifest["inputs"]["unaligned"]["name"] == str(pair[1])
    assert len(manifest["inputs"]["aligned"]["sha256"]) == 64
    assert manifest["provenance"] == {"data": "abc"}
    assert manifest["config"] == {"scope": "attention", "rank": None, "keep": 0.5, "method": "subtract"}
    assert calls[-1][0] == calls[-1][1] > 0
    assert calls == sorted(calls)


def test_describe(pair, tmp_path):
    vector = subtract(*pair, tmp_path / "v", keep=1.0)
    rows = {row["name"]: row for row in describe(vector)}
    assert set(rows) == set(vector.names())
    for name, row in rows.items():
        delta = vector.read(name).double()
        share = torch.linalg.svdvals(delta) ** 2 / float(delta.norm()) ** 2
        assert row["effective_rank"] == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-4)
        assert row["rms"] == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-5)


class TestDamagedVectors:
    @pytest.fixture
    def vector(self, trio, tmp_path):
        return Path(shutil.copytree(trio("llama").vector, tmp_path / "v"))

    def refused(self, folder, sentence):
        with pytest.raises(CheckpointError) as told:
            SafetyVector(folder)
        assert sentence in str(told.value)
        assert str(folder) in str(told.value)

    def test_a_model_is_no_vector(self, trio):
        self.refused(trio("llama").base, "is not a safety vector")

    @pytest.mark.parametrize("name", [VECTOR, "manifest.json"])
    def test_a_file_missing(self, vector, name):
        (vector / name).unlink()
        self.refused(vector, "vector subtract ALIGNED UNALIGNED")

    @pytest.mark.parametrize("text", ["{", "[]", '{"kind": "something else"}'])
    def test_another_manifest(self, vector, text):
        (vector / "manifest.json").write_text(text)
        self.refused(vector, "is not readable JSON" if text == "{" else "is not a safety vector")

    @pytest.mark.parametrize("key", ["tensors", "rank", "norm", "inputs", "config", "outputs"])
    def test_manifest_lacking_a_part(self, vector, key):
        manifest = json.loads((vector / "manifest.json").read_text())
        del manifest[key]
        (vector / "manifest.json").write_text(json.dumps(manifest))
        self.refused(vector, "damaged")

    def test_manifest_naming_a_tensor_that_is_not_stored(self, vector):
        manifest = json.loads((vector / "manifest.json").read_text())
        manifest["tensors"]["ghost"] = {"shape": [2, 2], "norm": 1.0}
        (vector / "manifest.json").write_text(json.dumps(manifest))
        self.refused(vector, "lacks ghost")

    def test_manifest_with_another_shape(self, vector):
        manifest = json.loads((vector / "manifest.json").read_text())
        next(iter(manifest["tensors"].values()))["shape"] = [2, 2]
        (vector / "manifest.json").write_text(json.dumps(manifest))
        self.refused(vector, "damaged")

    def test_truncated(self, vector):
        (vector / VECTOR).write_bytes((vector / VECTOR).read_bytes()[:-4])
        self.refused(vector, "truncated")


def test_a_killed_subtraction_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    base = build("llama", tmp_path / "base")
    bad = unaligned(base, tmp_path / "bad")
    subtract(base, bad, tmp_path / "whole")
    real, seen = OutputFolder.done, []

    def dies(self, name, digest, figures=None):
        real(self, name, digest, figures)
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "done", dies)
    with pytest.raises(KeyboardInterrupt):
        subtract(base, bad, tmp_path / "v")
    monkeypatch.setattr(OutputFolder, "done", real)
    assert not (tmp_path / "v").exists()
    with pytest.raises(OutputError, match="--resume"):
        subtract(base, bad, tmp_path / "v")
    redone = []
    monkeypatch.setattr(OutputFolder, "write", counted(OutputFolder.write, redone))
    subtract(base, bad, tmp_path / "v", resume=True)
    assert len(redone) < len(seen) + len(SafetyVector(tmp_path / "v").file.layout.entries)
    assert not set(redone) & set(seen[:3])
    whole, resumed = (tmp_path / n / "vector.safetensors" for n in ("whole", "v"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert SafetyVector(tmp_path / "v").manifest["tensors"] == SafetyVector(tmp_path / "whole").manifest["tensors"]


def counted(real, names):
    def write(self, name, data, offset=0):
        names.append(name)
        return real(self, name, data, offset)

    return write


@pytest.mark.parametrize("part", ["", "#v"])
def test_a_vector_whose_bytes_were_changed_is_not_merged(tmp_path, part):
    """Singular directions that the method does not ask for are not read, and so make no difference."""
    base = build("llama", tmp_path / "base")
    task = finetuned(base, tmp_path / "task")
    vector = subtract(base, unaligned(base, tmp_path / "bad"), tmp_path / "v")
    merge(task, tmp_path / "v", tmp_path / "before", base=base)
    file = tmp_path / "v" / "vector.safetensors"
    data = bytearray(file.read_bytes())
    entry = vector.file.layout.entries[vector.names()[-1] + part]
    data[entry.offset + entry.spec.nbytes - 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="manifest"):
        merge(task, tmp_path / "v", tmp_path / "out", base=base, method="enchtable")
    assert not (tmp_path / "out").exists()
    if part:
        merge(task, tmp_path / "v", tmp_path / "out", base=base)
        same_model(tmp_path / "out", tmp_path / "before")
    else:
        with pytest.raises(CheckpointError, match="manifest"):
            merge(task, tmp_path / "v", tmp_path / "out", base=base)


def test_layers_of_a_subtraction(tiny, tmp_path):
    base = tiny("llama")
    other = unaligned(base, tmp_path / "other", scope="hybrid")
    vector = subtract(base, other, tmp_path / "v", scope="hybrid", layers=(1, 2))
    assert len(vector.names()) == 7
    assert all(".layers.1." in n for n in vector.names())
    assert vector.manifest["layers"] == [1, 2]
    with pytest.raises(ConfigError, match="the model has 2"):
        subtract(base, other, tmp_path / "w", scope="hybrid", layers=(1, 3))


def test_a_part_of_a_vector_merges_as_a_vector_of_that_part(trio, tmp_path):
    whole, part = trio("llama", scope="hybrid"), trio("llama")
    subtract(whole.base, whole.unaligned, tmp_path / "attention", scope="attention")
    merge(whole.task, whole.vector, tmp_path / "a", base=whole.base, strength=0.7, scope="attention")
    merge(whole.task, tmp_path / "attention", tmp_path / "b", base=whole.base, strength=0.7)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert SafetyVector(whole.vector, "attention").norm == pytest.approx(SafetyVector(tmp_path / "attention").norm)
    with pytest.raises(MismatchError, match="no tensor of scope ffn"):
        merge(part.task, part.vector, tmp_path / "c", base=part.base, scope="ffn")
    assert not (tmp_path / "c").exists()


def test_what_distilling_found_wrong_is_told_at_every_merge(trio, tmp_path):
    t = trio("llama")
    shutil.copytree(t.vector, tmp_path / "v")
    manifest = json.loads((tmp_path / "v" / "manifest.json").read_text())
    manifest["validity"] = {"useless": True, "warnings": ["the surrogate still refuses"]}
    (tmp_path / "v" / "manifest.json").write_text(json.dumps(manifest))
    done = merge(t.task, tmp_path / "v", tmp_path / "out", base=t.base)
    assert done.warnings == [f"{tmp_path / 'v'}: the surrogate still refuses"]
    with pytest.raises(LineageError, match="still refuses"):
        merge(t.task, tmp_path / "v", tmp_path / "strict", base=t.base, strict=True)
    assert merge(t.task, t.vector, tmp_path / "plain", base=t.base).warnings == []
