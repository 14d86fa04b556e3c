"""Merges on GPUs (see gpus.py): the bytes that the processor writes, and nothing used too early or too late."""

import json
import math

import pytest
import torch

import gpus
import masks
from models import finetuned, interrupted, leftovers, rewritten, same_model, weights
from safegraft import merge
from safegraft.config import MergeConfig, load
from safegraft.errors import ConfigError
from safegraft.merging.forecast import forecast
from safegraft.merging.method import METHODS
from safegraft.merging.plan import BATCH, MEMORY_SHARE, PROCESS_BYTES, by_shape, most_workers
from safegraft.merging.run import prepare
from safegraft.tensors.devices import devices_of
from safegraft.tensors.lowrank import Delta, with_started
from safegraft.tensors.source import Workspace

MEMORY = 80 << 30
VECTOR_METHODS = [name for name, method in METHODS if method.needs == "vector"]
PARAMS = {"resta": {"drop": 0.3}, "ties": {"density": 0.3}, "dare": {"drop": 0.4}}
EIGH = "aten::_linalg_eigh"


@pytest.fixture
def two():
    return gpus.Gpus(2, MEMORY)


def both(two, tmp_path, device, *inputs, **settings):
    """The same merge on the processor and on ``device``: the same bytes and figures."""
    with two:
        there = merge(*inputs, tmp_path / "gpu", device=device, **settings)
    here = merge(*inputs, tmp_path / "cpu", **settings)
    same_model(tmp_path / "gpu", tmp_path / "cpu")
    assert there.tensors == here.tensors
    return there


def decomposed(two):
    """Device and shape of every batch of matrices that was decomposed."""
    return sorted((place, shape) for place, name, shape in two.log if name == EIGH and len(shape) == 3)


@pytest.mark.parametrize("method", VECTOR_METHODS)
@pytest.mark.parametrize("device", ["cuda", "cuda:1,cuda:0"])
def test_every_method(trio, tmp_path, two, method, device):
    t = trio("qwen2", scope="hybrid", dtype=torch.bfloat16)
    both(
        two, tmp_path, device, t.task, t.vector, base=t.base, method=method, params=PARAMS.get(method, {}), strength=0.3
    )
    assert {place for place, *_ in two.log} == ({"cuda:0"} if device == "cuda" else {"cuda:0", "cuda:1"})


@pytest.mark.parametrize("method", [name for name in VECTOR_METHODS if METHODS.get(name).fuses])
@pytest.mark.parametrize("vector", [True, False])
def test_several_fine_tunes(trio, tmp_path, two, method, vector):
    """Without a vector, in one pass over the inputs where the method allows it."""
    t = trio("llama")
    params = PARAMS.get(method, {})
    both(
        two, tmp_path, "cuda:0,cuda:1", [t.task, t.unaligned], t.vector if vector else None, base=t.base, method=method,
        params=params, dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize("method", [name for name in VECTOR_METHODS if METHODS.get(name).fuses])
def test_a_strength_of_zero(trio, tmp_path, two, method):
    t = trio("gpt_oss", scope="hybrid")
    params = PARAMS.get(method, {})
    both(
        two, tmp_path, "cuda", [t.task, t.unaligned], t.vector, base=t.base, method=method, params=params, strength=0.0
    )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2", "gemma2"])
def test_other_shapes(trio, tmp_path, two, family):
    t = trio(family, scope="hybrid" if family != "gpt2" else "attention")
    both(two, tmp_path, "cuda", t.task, t.vector, base=t.base, strength=0.3)


@pytest.mark.parametrize("method", ["interference", "dare", "slerp"])
def test_an_adapter(trio, tmp_path, two, method):
    t = trio("llama")
    tuned = masks.adapter(t.base, tmp_path / "adapter", modules=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"))
    both(two, tmp_path, "cuda", tuned, t.vector, base=t.base, method=method)


def test_a_longer_vocabulary(trio, tmp_path, two):
    t = trio("llama", scope="model")
    longer = rewritten(
        finetuned(t.base, tmp_path / "moved"), tmp_path / "longer",
        lambda n, w: torch.cat([w, w[:3]]) if n.endswith(("embed_tokens.weight", "lm_head.weight")) else w,
    )  # fmt: skip
    both(two, tmp_path, "cuda", longer, t.vector, base=t.base)


def test_a_low_rank_vector(trio, tmp_path, two):
    from safegraft import subtract

    t = trio("llama")
    subtract(t.base, t.unaligned, tmp_path / "low", rank=3)
    for method in ("interference", "norm_matched"):
        both(two, tmp_path / method, "cuda", t.task, tmp_path / "low", base=t.base, method=method)


@pytest.mark.parametrize("params", [{}, {"seed": 3, "kind": "binary"}, {"fusion": "ties"}])
def test_under_a_mask(trio, tmp_path, two, params):
    t = trio("llama")
    logits = {n: torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for n, w in weights(t.base).items()}
    masks.by_hand(tmp_path / "mask", t.base, [t.task, t.unaligned], logits)
    both(
        two, tmp_path, "cuda", [t.task, t.unaligned], None, base=t.base, method="somf", mask=str(tmp_path / "mask"),
        params=params,
    )  # fmt: skip


def test_by_a_calibration(trio, tmp_path, two):
    from safegraft.train.calibrate import calibrate

    t = trio("llama")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2 w3 w4"}\n{"prompt": "w5 w6 w7"}\n')
    calibrate(t.base, tmp_path / "cal", prompts=tmp_path / "rows.jsonl")
    settings = {"base": t.base, "method": "safe_delta", "calibration": str(tmp_path / "cal"), "strength": 0.02}
    found = both(two, tmp_path, "cuda", t.task, None, **settings)
    assert any(0 < f["accepted"] < 1 for f in found.tensors.values())


class TestEqualShapes:
    def test_are_decomposed_together(self, trio, tmp_path, two):
        """Four weights of 16 × 16 and the k and v of both layers, whose shorter side is 8."""
        t = trio("llama")
        both(two, tmp_path, "cuda", t.task, t.vector, base=t.base)
        assert decomposed(two) == [("cuda:0", (4, 8, 8)), ("cuda:0", (4, 16, 16))]

    def test_on_the_processor_they_are_not(self, trio, tmp_path, monkeypatch):
        t, called = trio("llama"), []
        monkeypatch.setattr("safegraft.merging.execute.with_started", lambda deltas: called.append(deltas))
        merge(t.task, t.vector, tmp_path / "out", base=t.base)
        assert called == []

    def test_experts_of_a_stack_too(self, trio, tmp_path, two):
        t = trio("gpt_oss", scope="hybrid")
        both(two, tmp_path, "cuda", t.task, t.vector, base=t.base)
        assert ("cuda:0", (3, 16, 16)) in decomposed(two)

    def test_no_more_of_them_than_a_batch_holds(self, trio, tmp_path):
        t = trio("llama")
        given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "out")}
        units = prepare(load(MergeConfig, None, given)).plan.units
        batches = by_shape(units)
        assert sorted(u.name for batch in batches for u in batch) == sorted(u.name for u in units)
        assert sorted(len(batch) for batch in batches if len(batch) > 1) == [4, 4]
        assert all(len({u.spec.shape for u in batch}) == 1 for batch in batches)
        assert all(sum(u.spec.numel for u in batch) <= BATCH for batch in batches)

    def test_and_their_svds_are_those_of_one(self):
        g = torch.Generator().manual_seed(0)
        shapes = [(6, 4), (4, 6), (4, 4), (5, 5), (1, 3)]
        deltas = [Delta(shape, full=torch.randn(shape, generator=g)).scaled(0.5) for shape in shapes]
        deltas += [Delta((4, 4)), Delta((4, 4), full=torch.zeros(4, 4)), Delta((7,), full=torch.randn(7, generator=g))]
        deltas.append(Delta((4, 4), full=torch.outer(torch.arange(4.0), torch.ones(4))))
        begun = with_started(deltas)
        assert sum(d.started is not None for d in begun) == 6
        for one, other in zip(deltas[:6], begun[:6], strict=True):
            for a, b in (
                (one.svd(2), other.svd(2)),
                (one.leading(0.9), other.leading(0.9)) if one.full is not None else ((), ()),
            ):
                if a:
                    assert all(torch.equal(getattr(a, part), getattr(b, part)) for part in "usv")


class TestSharedOut:
    def test_by_cost_and_always_alike(self, trio, tmp_path, two):
        t = trio("qwen2", scope="hybrid")
        with two:
            merge(t.task, t.vector, tmp_path / "out", base=t.base, device="cuda:0,cuda:1")
        bytes_up = {
            place: sum(math.prod(s) for p, name, s in two.log if p == place and name == "aten::_to_copy")
            for place in ("cuda:0", "cuda:1")
        }
        assert 0.5 < bytes_up["cuda:0"] / bytes_up["cuda:1"] < 2

    def test_two_workers_a_gpu_so_that_one_reads_while_the_other_computes(self, trio, tmp_path, two, monkeypatch):
        monkeypatch.setattr("os.cpu_count", lambda: 1)
        t = trio("qwen2", scope="hybrid")
        given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "o")}
        with two:
            merge(t.task, t.vector, tmp_path / "out", base=t.base, device="cuda:0,cuda:1", method="dare")
            assert prepare(load(MergeConfig, None, given | {"device": "cuda:0,cuda:1"})).workers == 4
        assert len(two.streams) == 2 + 4  # one a GPU beforehand
        assert prepare(load(MergeConfig, None, given)).workers == 1

    def test_no_more_workers_than_the_memory_holds(self, trio, tmp_path, two):
        t = trio("llama")
        given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "out")}
        largest = max(u.working_set for u in prepare(load(MergeConfig, None, given)).plan.units)
        two.memory = 6 * largest  # a batch of the largest takes four, and one of four others two
        with two:
            merge(t.task, t.vector, tmp_path / "out", base=t.base, device="cuda", workers=8)
        assert len(two.streams) == 1 + 1

    def test_nor_than_the_machine_s_memory_holds(self, trio, tmp_path, monkeypatch):
        t = trio("llama")
        given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "out")}
        monkeypatch.setattr("os.cpu_count", lambda: 64)
        plan = prepare(load(MergeConfig, None, given)).plan
        sets = sorted((u.working_set for u in plan.units), reverse=True)
        for count in (1, 3):
            room = (PROCESS_BYTES + sum(sets[:count])) / MEMORY_SHARE
            monkeypatch.setattr("safegraft.merging.run.memory_of", lambda device, room=room: int(room) + 2)
            ready = prepare(load(MergeConfig, None, given))
            assert ready.workers == count
            assert ready.peak_bytes() == PROCESS_BYTES + sum(sets[:count])
            assert prepare(load(MergeConfig, None, given | {"workers": 7})).workers == 7
        assert most_workers([5, 4, 3, 1], 9, 4) == 2
        assert most_workers([5, 4, 3, 1], 13, 2) == 2
        assert most_workers([5], 1, 4) == 1
        assert most_workers([], 1, 4) == 1

    @pytest.mark.parametrize("device", ["cuda", "cuda:0,cuda:1"])
    def test_resumed_in_the_middle_of_a_batch(self, trio, tmp_path, two, monkeypatch, device):
        t = trio("llama")
        settings = {"model": t.task, "vector": t.vector, "base": t.base, "device": device}
        with two:
            merge(out=tmp_path / "whole", **settings)
            whole = decomposed(two)
            interrupted(tmp_path / "out", monkeypatch, 1, **settings)
            two.log.clear()
            merge(out=tmp_path / "out", resume=True, **settings)
        same_model(tmp_path / "out", tmp_path / "whole")
        assert set(decomposed(two)) <= set(whole)  # a batch that was stopped in is worked out again as it was
        if device == "cuda":
            assert decomposed(two) == whole
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["config"]["device"] == device
        assert manifest["run"]["gpus"] == ["GPU 0", "GPU 1"][: 1 + device.count(",")]


def test_a_dry_run_tries_the_method_there(trio, tmp_path, two):
    t = trio("llama", hidden_size=64, head_dim=16)
    given = {"model": str(t.task), "base": str(t.base), "vector": str(t.vector), "out": str(tmp_path / "out")}
    with two:
        expected = forecast(prepare(load(MergeConfig, None, given | {"device": "cuda:1"})))
    assert 0 < expected.total < 60
    assert {place for place, *_ in two.log} == {"cuda:1"}
    assert leftovers(tmp_path) == []


class TestRefused:
    @pytest.mark.parametrize("device", ["cuda:2", "cuda:0,cuda:7", "cuda:1,cuda:1"])
    def test_gpus_that_are_not_there(self, trio, tmp_path, two, device):
        t = trio("llama")
        with two, pytest.raises(ConfigError, match=r"torch sees 2 CUDA device\(s\) here, cuda:0 to cuda:1"):
            merge(t.task, t.vector, tmp_path / "out", base=t.base, device=device)
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize("device", ["cuda:", "cuda,cuda:1", "cpu,cuda:0", "cuda:0,", "gpu"])
    def test_what_names_none(self, trio, tmp_path, two, device):
        t = trio("llama")
        with two, pytest.raises(ConfigError, match="device"):
            merge(t.task, t.vector, tmp_path / "out", base=t.base, device=device)

    def test_too_little_memory(self, trio, tmp_path, two):
        t = trio("llama")
        two.memory = 700
        with two, pytest.raises(ConfigError, match="cuda:0 has too little memory for"):  # one pass over the inputs
            merge([t.task, t.unaligned], None, tmp_path / "out", base=t.base, device="cuda", method="task_arithmetic")
        with (
            two,
            pytest.raises(ConfigError, match=r"cuda:0 has too little memory for model\.layers\..*(?s:.*)--resume"),
        ):
            merge(t.task, t.vector, tmp_path / "out", base=t.base, device="cuda")
        assert leftovers(tmp_path) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestARealGpu:
    """Matrix products round otherwise there, so these are near and not the same."""

    @pytest.mark.parametrize("method", VECTOR_METHODS)
    def test_every_method(self, trio, tmp_path, method):
        t = trio("qwen2", scope="hybrid", hidden_size=64, head_dim=16)
        settings = {"base": t.base, "method": method, "params": PARAMS.get(method, {}), "strength": 0.3}
        for device in ("cuda", "cpu"):
            merge(t.task, t.vector, tmp_path / device, device=device, **settings)
        there, here = (weights(tmp_path / device) for device in ("cuda", "cpu"))
        assert all(torch.allclose(there[n], here[n], atol=1e-5) for n in here)

    def test_resumed_it_writes_the_same_bytes(self, trio, tmp_path, monkeypatch):
        every = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        t = trio("llama", hidden_size=64, head_dim=16)
        settings = {"model": t.task, "vector": t.vector, "base": t.base, "device": every}
        merge(out=tmp_path / "whole", **settings)
        interrupted(tmp_path / "out", monkeypatch, 1, **settings)
        merge(out=tmp_path / "out", resume=True, **settings)
        same_model(tmp_path / "out", tmp_path / "whole")


class TestTheGpusNotice:
    """What the tests above rest on."""

    @pytest.fixture
    def workspace(self, two):
        with two:
            yield Workspace(*devices_of("cuda:1"))

    def test_memory_used_again_while_it_is_copied(self, workspace, monkeypatch):
        with workspace.at_work():
            first = workspace.take("a", (3,), torch.float32).fill_(1)
            workspace.lift("a", first)
            workspace._leaving.clear()  # what waits for the copy
            workspace.take("a", (3,), torch.float32).fill_(2)
            with pytest.raises(AssertionError, match="used again while"):
                workspace._stream.synchronize()

    def test_waiting_for_the_copy(self, workspace):
        with workspace.at_work():
            lifted = workspace.lift("a", workspace.take("a", (3,), torch.float32).fill_(1))
            workspace.take("a", (3,), torch.float32).fill_(2)
            assert workspace.lower("b", lifted, torch.bfloat16).tolist() == [1, 1, 1]

    def test_an_answer_read_too_early(self, workspace):
        with workspace.at_work():
            lifted = workspace.lift("a", workspace.take("a", (3,), torch.float32).fill_(1))
            out = workspace.take("b", (3,), torch.float32)
            out.copy_(lifted, non_blocking=True)
            assert out.isnan().all()
            workspace._stream.synchronize()
            assert out.tolist() == [1, 1, 1]

    def test_tensors_of_two_devices(self, workspace):
        with workspace.at_work():
            lifted = workspace.lift("a", workspace.take("a", (3,), torch.float32).fill_(1))
            with pytest.raises(AssertionError, match="meets a CPU tensor"):
                lifted + torch.ones(3)

    def test_work_outside_a_stream(self, workspace):
        with workspace.at_work():
            lifted = workspace.lift("a", workspace.take("a", (3,), torch.float32).fill_(1))
        with pytest.raises(AssertionError, match="default stream"):
            lifted + 1
