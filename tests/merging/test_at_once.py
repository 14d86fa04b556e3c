"""Fine-tunes fused in one pass over them: what two passes write, and every refusal of theirs."""

import math
from dataclasses import replace

import pytest
import torch

from models import finetuned, interrupted, journalled, leftovers, rewritten, same_model
from safegraft import merge
from safegraft.errors import LineageError, NumericError
from safegraft.merging.execute import execute_at_once
from safegraft.merging.method import METHODS
from safegraft.tensors.verify import verify

SETTINGS = {"method": "task_arithmetic", "weights": [0.5, 0.25]}


@pytest.fixture(scope="module")
def pair(trio, tmp_path_factory):
    """A base, a fine-tune with three more rows of vocabulary, and another without."""
    t = trio("llama", shard="40KB")
    folder = tmp_path_factory.mktemp("pair")
    longer = rewritten(
        finetuned(t.base, folder / "moved"), folder / "longer",
        lambda n, w: torch.cat([w, w[:3]]) if n.endswith(("embed_tokens.weight", "lm_head.weight")) else w,
    )  # fmt: skip
    return {"model": [longer, t.unaligned], "vector": None, "base": t.base}


@pytest.fixture(scope="module")
def twice(pair, tmp_path_factory):
    """The same with a survey first, which --strict asks for."""
    out = tmp_path_factory.mktemp("twice") / "out"
    merge(**pair, out=out, **SETTINGS, strict=True)
    return out


def stages(told):
    return [stage for i, stage in enumerate(told) if not i or told[i - 1] != stage]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same(pair, tmp_path, monkeypatch, method, workers):
    monkeypatch.setattr("safegraft.tensors.finetune.PIECE", 70)
    monkeypatch.setattr("safegraft.tensors.checkpoint.CHUNK", 70)
    settings = SETTINGS | {"method": method, "workers": workers}
    merge(**pair, out=tmp_path / "twice", **settings, strict=True)
    told = []
    merge(**pair, out=tmp_path / "once", **settings, progress=lambda stage, *_: told.append(stage))
    assert stages(told) == ["merge"]
    same_model(tmp_path / "once", tmp_path / "twice")


@pytest.mark.parametrize("more", [{"strict": True}, {"method": "dare"}])
def test_two_passes_where_one_does_not_do(pair, tmp_path, more):
    told = []
    merge(**pair, out=tmp_path / "out", **SETTINGS | more, progress=lambda stage, *_: told.append(stage))
    assert stages(told) == ["survey", "merge"]


@pytest.mark.parametrize("strict", [False, True])
def test_resumed_in_the_middle(pair, twice, tmp_path, monkeypatch, strict):
    """A strict run has surveyed all by then; going on without it does not do so again."""
    partial = interrupted(tmp_path / "out", monkeypatch, 5, **pair, **SETTINGS, strict=strict)
    assert len(journalled(partial)) == 5
    called = []

    def noting(*args):
        called.append(args)
        return execute_at_once(*args)

    monkeypatch.setattr("safegraft.merging.run.execute_at_once", noting)
    merge(**pair, out=tmp_path / "out", **SETTINGS, resume=True)
    same_model(tmp_path / "out", twice)
    assert bool(called) != strict


def test_a_method_that_keeps_the_fine_tune(pair, tmp_path, monkeypatch):
    """Its bytes are the first fine-tune's, and its digest is known."""
    keeping = replace(METHODS.get("task_arithmetic"), function=lambda *_: None)
    monkeypatch.setitem(METHODS._items, "task_arithmetic", keeping)
    merge(**pair, out=tmp_path / "out", **SETTINGS)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (pair["model"][0] / file.name).read_bytes()
    assert {check.name: check.passed for check in verify(tmp_path / "out", load=False)}["digests"]


@pytest.mark.parametrize("which", [0, 1, "base"])
def test_a_broken_input_is_named(pair, tmp_path, which):
    def broken(name, weight):
        if name.endswith("layers.1.mlp.up_proj.weight"):
            weight = weight.clone()
            weight[3, 2] = float("nan")
        return weight

    source = pair["base"] if which == "base" else pair["model"][which]
    bad = rewritten(source, tmp_path / "bad", broken)
    given = dict(pair)
    if which == "base":
        given["base"] = bad
    else:
        given["model"] = [bad if i == which else m for i, m in enumerate(pair["model"])]
    with pytest.raises(NumericError, match=f"layers.1.mlp.up_proj.weight of {bad} holds NaN or Inf"):
        merge(**given, out=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_doubts_are_told_after_it_and_before_it_with_strict(trio, tiny, tmp_path):
    t, other = trio("llama"), tiny("llama", seed=7)
    given = {"model": [t.task, t.unaligned], "vector": None, "base": other, **SETTINGS}
    assert merge(**given, out=tmp_path / "out").warnings
    with pytest.raises(LineageError):
        merge(**given, out=tmp_path / "strict", strict=True)
    assert leftovers(tmp_path) == ["out"]


def test_figures_over_all_tensors_are_not_there(pair, tmp_path, monkeypatch):
    seen = []

    def noting(plan, run, *more):
        seen.append(run.stats)
        return execute_at_once(plan, run, *more)

    monkeypatch.setattr("safegraft.merging.run.execute_at_once", noting)
    merge(**pair, out=tmp_path / "out", **SETTINGS)
    assert math.isnan(seen[0].task_norm)
    assert math.isnan(seen[0].safety_norm)
