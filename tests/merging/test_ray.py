"""A merge on a real Ray cluster of two nodes: the bytes of a one-process run, whoever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import masks
from models import journalled, leftovers, noise, rewritten, same_model, silence, weights
from safegraft import merge
from safegraft.errors import CheckpointError, ConfigError, MismatchError, NumericError, OutputError
from safegraft.merging import ray as on_ray
from safegraft.merging.execute import Run
from safegraft.merging.plan import Unit
from safegraft.merging.ray import BATCHES, balanced
from safegraft.tensors.source import TensorSpec
from safegraft.tensors.writer import OutputFolder

pytest.importorskip("ray")
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's workers in /proc")
BIG = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 12, "head_dim": 128, "shard": "10MB"}
WORKER = b"ray::write_batch"


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of one processor each, the second one to be lost."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Cluster()
    for _ in range(2):
        started.add_node(num_cpus=1, object_store_memory=100_000_000)
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def inputs(trio):
    return trio("qwen2", scope="hybrid", shard="8KB")


@pytest.fixture(scope="module")
def slow(trio, tmp_path_factory):
    """Inputs that take seconds to merge, and what comes out."""
    made = trio("llama", **BIG)
    out = tmp_path_factory.mktemp("slow") / "whole"
    merge(made.task, made.vector, out, base=made.base, workers=1)
    return made, out


@pytest.fixture(scope="module")
def adapter(inputs, tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    silence()
    out = tmp_path_factory.mktemp("lora") / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(inputs.base), LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))  # fmt: skip
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * noise(name, parameter.shape, 3)
        tuned.save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", ["full", "adapter", "fused at random", "under a mask"])
def test_the_same_bytes(nodes, inputs, adapter, tmp_path, kind):
    settings = {"model": inputs.task, "vector": inputs.vector, "base": inputs.base, "strength": 0.5}
    settings |= {
        "full": {}, "adapter": {"model": adapter},
        "fused at random": {"model": [inputs.task, inputs.unaligned], "method": "dare", "dtype": "bfloat16"},
        "under a mask": {"vector": None, "strength": None, "method": "somf", "mask": str(tmp_path / "mask")},
    }[kind]  # fmt: skip
    if kind == "under a mask":
        logits = {n: noise(n, tensor.shape, 5) for n, tensor in weights(inputs.base).items()}
        masks.by_hand(tmp_path / "mask", inputs.base, [inputs.task], logits)
    one = merge(out=tmp_path / "one", workers=1, **settings)
    summary = merge(out=tmp_path / "ray", ray=nodes.address, **settings)
    same_model(tmp_path / "ray", tmp_path / "one")
    assert summary.tensors == one.tensors
    assert set(leftovers(tmp_path)) - {"mask"} == {"one", "ray"}
    run = json.loads((tmp_path / "ray" / "manifest.json").read_text())["run"]
    assert run["ray"].pop("nodes") in (1, 2)
    processor = torch.backends.cpu.get_cpu_capability()
    assert run["ray"] == {"address": nodes.address, "tasks": 2 * BATCHES, "processors": [processor]}


def started(made, out, address, *more):
    """The command line in a process of its own, once it has begun to write."""
    command = [sys.executable, "-m", "safegraft", "merge", "--model", made.task, "--base", made.base, "--vector"]
    command = [*command, made.vector, "--out", out, "--ray", address, *more]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    partial = out.with_name(out.name + ".partial")
    while process.poll() is None and not (partial.is_dir() and written(partial)):
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()
    return process, partial


def written(partial):
    try:
        return journalled(partial)
    except FileNotFoundError:
        return set()


def busy(wanted=WORKER):
    """Process ids of Ray's workers that are in the middle of a batch."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(wanted):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@linux
def test_a_killed_worker(nodes, slow, tmp_path):
    made, whole = slow
    process, partial = started(made, tmp_path / "out", nodes.address)
    while not (found := busy()):
        assert process.poll() is None, "too fast to be caught"
    lost, before = found[0], len(journalled(partial))
    os.kill(lost, signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert 0 < before < 12 * 9
    assert lost not in busy()
    same_model(tmp_path / "out", whole)


@linux
def test_a_lost_node(nodes, slow, tmp_path):
    made, whole = slow
    extra = nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
    nodes.wait_for_nodes()
    process, _ = started(made, tmp_path / "out", nodes.address)
    nodes.remove_node(extra, allow_graceful=False)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    same_model(tmp_path / "out", whole)


@linux
@pytest.mark.parametrize("resumed_by", ["ray", "one process"])
def test_a_killed_driver_is_resumed(nodes, slow, tmp_path, monkeypatch, resumed_by):
    made, whole = slow
    process, partial = started(made, tmp_path / "out", nodes.address)
    process.kill()
    process.communicate()
    before = journalled(partial)
    assert 0 < len(before) < 12 * 9
    again, real = set(), OutputFolder.done
    monkeypatch.setattr(OutputFolder, "done", lambda self, name, *a: (again.add(name), real(self, name, *a)))
    ray = {"ray": nodes.address} if resumed_by == "ray" else {}
    merge(made.task, made.vector, tmp_path / "out", base=made.base, resume=True, **ray)
    assert not before & again
    same_model(tmp_path / "out", whole)


def test_what_a_task_finds_wrong_is_told_as_ever(nodes, inputs, tmp_path):
    with pytest.raises(NumericError, match="NaN or Inf") as told:
        merge(inputs.task, inputs.vector, tmp_path / "out", base=inputs.base, dtype="float16", strength=1e12,
              match_norm=False, ray=nodes.address)  # fmt: skip
    assert "strength" in told.value.hint
    assert not (tmp_path / "out").exists()


def test_a_cluster_of_its_own(inputs, tmp_path):
    """In a process of its own, for one process holds one connection."""
    command = [sys.executable, "-m", "safegraft", "merge", "--model", inputs.task, "--base", inputs.base, "--vector"]
    command = [*command, inputs.vector, "--out", tmp_path / "out", "--ray", "local", "--workers", "1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ray" not in done.stderr.lower(), done.stderr
    merge(inputs.task, inputs.vector, tmp_path / "one", base=inputs.base)
    same_model(tmp_path / "out", tmp_path / "one")


class TestRefused:
    @pytest.mark.parametrize(("more", "match"), [
        ({"as_adapter": True, "rank": 2}, "in one process"), ({"device": "cuda"}, "on processors"),
        ({"ray": "elsewhere"}, "HOST:PORT"), ({"ray": "127.0.0.1:1"}, "nothing answers"),
    ])  # fmt: skip
    def test_before_any_work(self, inputs, tmp_path, more, match):
        with pytest.raises(ConfigError, match=match):
            merge(inputs.task, inputs.vector, tmp_path / "out", base=inputs.base, **{"ray": "auto"} | more)
        assert leftovers(tmp_path) == []

    def test_without_ray(self, inputs, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ConfigError, match="needs ray") as told:
            merge(inputs.task, inputs.vector, tmp_path / "out", base=inputs.base, ray="auto")
        assert "safegraft[ray]" in told.value.hint

    @pytest.fixture
    def job(self, inputs, tmp_path, monkeypatch):
        """What a task of some merge is given."""
        seen = []
        monkeypatch.setattr("safegraft.merging.run.Cluster", lambda *_: pytest.fail("not needed"))

        def stop(plan, run, folder, *_):
            seen.append(on_ray._job(run, folder))
            raise KeyboardInterrupt

        monkeypatch.setattr("safegraft.merging.run.execute", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(inputs.task, inputs.vector, tmp_path / "out", base=inputs.base)
        return replace(seen[0], partial=tmp_path)

    def test_a_node_opens_the_same_run(self, job):
        assert isinstance(on_ray._opened(job, "n"), Run)

    def test_a_node_with_other_inputs(self, job, inputs, tmp_path):
        other = rewritten(inputs.task, tmp_path / "other", lambda n, t: t + 1)
        with pytest.raises(MismatchError, match="other inputs"):
            on_ray._opened(replace(job, models=[str(other)]), "n")

    def test_a_node_without_the_files(self, job, tmp_path):
        with pytest.raises(CheckpointError, match="on node n"):
            on_ray._opened(replace(job, base=str(tmp_path / "missing")), "n")
        with pytest.raises(OutputError, match="does not see"):
            on_ray._opened(replace(job, partial=tmp_path / "missing"), "n")

    def test_a_node_with_another_torch(self, job):
        with pytest.raises(ConfigError, match="other versions"):
            on_ray._opened(replace(job, versions={**job.versions, "torch": "1.0"}), "n")


def test_batches_are_balanced():
    def unit(name, *shape):
        return Unit(name, "merge", TensorSpec(name, torch.bfloat16, shape), "s")

    units = [unit("embedding", 1000, 64)]
    units += [
        unit(f"{i}.{n}", *shape) for i in range(32) for n, shape in (("q", (64, 64)), ("up", (256, 64)), ("n", (64,)))
    ]
    batches = balanced(units, 8)
    assert sorted(u.name for batch in batches for u in batch) == sorted(u.name for u in units)
    costs = [sum(u.cost for u in batch) for batch in batches]
    assert costs == sorted(costs, reverse=True)
    mean, largest = sum(costs) / 8, max(u.cost for u in units)
    assert max(costs) <= mean + largest
    assert [len(b) for b in balanced(units[:3], 8)] == [1, 1, 1]
    assert balanced([], 8) == []
