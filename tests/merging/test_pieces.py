"""Methods that go entry by entry work on a few rows at a time: the same bytes, whatever the pieces."""

import pytest
import torch

from models import files_of, finetuned, rewritten, same_model
from safegraft import merge
from safegraft.config import MergeConfig, load
from safegraft.merging.entries import PIECE, kept_of, mask_of_largest, ranked
from safegraft.merging.method import METHODS
from safegraft.merging.run import prepare

ENTRYWISE = {
    "norm_matched": {},
    "resta": {"drop": 0.3},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.6, "outliers": 0.1},
}
FUSING = [name for name in ENTRYWISE if METHODS.get(name).fuses]


def test_these_are_all_of_them():
    assert {name for name, method in METHODS if method.entrywise} == set(ENTRYWISE)


@pytest.mark.parametrize("method", ENTRYWISE)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_pieces_change_nothing(trio, tmp_path, monkeypatch, method, dtype):
    t = trio("qwen2", scope="hybrid")
    settings = {"base": t.base, "method": method, "params": ENTRYWISE[method], "dtype": dtype, "workers": 2}
    with monkeypatch.context() as patch:
        patch.setattr("safegraft.tensors.finetune.FineTune.in_pieces", lambda *_: False)
        whole = merge(t.task, t.vector, tmp_path / "whole", **settings)
    monkeypatch.setattr("safegraft.tensors.finetune.PIECE", 70)
    pieces = merge(t.task, t.vector, tmp_path / "pieces", **settings)
    same_model(tmp_path / "pieces", tmp_path / "whole")
    assert pieces.tensors == whole.tensors


@pytest.mark.parametrize("method", FUSING)
def test_fused_with_a_longer_vocabulary(trio, tiny, tmp_path, monkeypatch, method):
    t = trio("llama")
    longer = rewritten(
        finetuned(t.base, tmp_path / "moved"), tmp_path / "longer",
        lambda n, w: torch.cat([w, w[:3]]) if n.endswith(("embed_tokens.weight", "lm_head.weight")) else w,
    )  # fmt: skip
    settings = {"base": t.base, "method": method, "params": ENTRYWISE[method], "weights": [0.5, 0.25]}
    with monkeypatch.context() as patch:
        patch.setattr("safegraft.tensors.finetune.FineTune.in_pieces", lambda *_: False)
        whole = merge([longer, t.unaligned], t.vector, tmp_path / "whole", **settings)
    monkeypatch.setattr("safegraft.tensors.finetune.PIECE", 70)
    monkeypatch.setattr("safegraft.tensors.checkpoint.CHUNK", 100)
    pieces = merge([longer, t.unaligned], t.vector, tmp_path / "pieces", **settings)
    ours, theirs = files_of(tmp_path / "pieces"), files_of(tmp_path / "whole")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert pieces.task_norm == pytest.approx(whole.task_norm, rel=1e-6)  # the survey adds up in other pieces


def test_the_plan_knows(trio, tmp_path):
    t = trio("llama")
    given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "out")}
    expected = [prepare(load(MergeConfig, None, given | {"method": m})).peak_bytes() for m in ("dare", "norm_matched")]
    assert any(u.in_pieces for u in prepare(load(MergeConfig, None, given | {"method": "resta"})).plan.units)
    assert expected[0] > 0 < expected[1]


@pytest.mark.parametrize("kind", ["normal", "many equal", "zeros", "tiny"])
@pytest.mark.parametrize("numel", [1, 2, 17, PIECE + 5])
def test_the_largest_entries_are_those_of_a_sort(kind, numel):
    g = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=g)
    x = {"normal": x, "many equal": x.round(), "zeros": x * 0, "tiny": x * 1e-40}[kind]
    for density in (0.01, 0.3, 0.99):
        count = max(1, int(density * numel))
        order = x.abs().sort(descending=True, stable=True).indices[:count]
        expected = torch.zeros(numel, dtype=torch.bool)
        expected[order] = True
        assert torch.equal(mask_of_largest(x, density), expected)


@pytest.mark.parametrize(("density", "outliers"), [(0.3, 0.0), (0.5, 0.2), (1.0, 0.0), (0.9, 0.5)])
def test_what_stays_of_tensors_told_in_pieces(density, outliers):
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(40, 5, generator=g).mul(2).round(), torch.randn(90, generator=g)]

    def pieces():
        return zip(tensors[0].split(7), [*tensors[1].split(18), tensors[1][:0]], strict=True)

    stays = ranked(pieces, density, outliers)
    found = [kept_of(piece, stays) for piece in pieces()]
    for i, tensor in enumerate(tensors):
        whole = kept_of([tensor], ranked(lambda: [[tensor]], density, outliers))[0]  # noqa: B023
        told = [masks[i] for masks in found]
        assert (whole is None) == (density == 1.0)
        assert all((m is None) == (whole is None) for m in told)
        if whole is not None:
            assert torch.equal(torch.cat(told), whole)
            assert int(whole.sum()) == max(1, int(density * tensor.numel()))
