"""kill -9 at every stage, then resume: byte for byte what an uninterrupted run writes, with any number of workers."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from models import files_of, finetuned, interrupted, journalled, leftovers, same_model, unaligned
from safegraft import merge, subtract
from safegraft.errors import OutputError
from safegraft.tensors.writer import OutputFolder

CHILD = """
import os, signal, sys
from safegraft import merge
from safegraft.tensors import writer
from safegraft.tensors.writer import OutputFolder

task, vector, out, base, where, count, workers = sys.argv[1:]
left = int(count)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def after(function, when=lambda *a: True):
    def patched(*args, **kwargs):
        global left
        result = function(*args, **kwargs)
        if when(*args):
            left -= 1
            if left == 0:
                die()
        return result
    return patched

def before(function, when=lambda *a: True):
    def patched(*args, **kwargs):
        if when(*args):
            die()
        return function(*args, **kwargs)
    return patched

def half(self, name, data, offset=0):
    global left
    left -= 1
    if left == 0:
        write(self, name, data[: len(data) // 2], offset)
        die()
    write(self, name, data, offset)

if where == "done":
    OutputFolder.done = after(OutputFolder.done)
elif where == "half a tensor":
    write, OutputFolder.write = OutputFolder.write, half
elif where == "before the survey is noted":
    OutputFolder.note = before(OutputFolder.note, lambda self, key, value: key == "survey")
elif where == "after the survey is noted":
    OutputFolder.note = after(OutputFolder.note, lambda self, key, value: key == "survey")
elif where == "before the manifest":
    writer.write_whole = before(writer.write_whole, lambda path, data: path.name == "manifest.json")
elif where == "before the rename":
    writer.replace_folder = before(writer.replace_folder)
merge(task, vector, out, base=base, strength=0.5, workers=int(workers))
"""


@pytest.fixture(scope="module")
def inputs(trio):
    return trio("qwen2", scope="hybrid", shard="8KB")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """An uninterrupted run with one worker."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, merge(inputs.task, inputs.vector, out, base=inputs.base, strength=0.5, workers=1)


def killed(inputs, out, where, count=1, workers=1):
    paths = [inputs.task, inputs.vector, out, inputs.base, where, count, workers]
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    return out.with_name(out.name + ".partial")


STAGES = [
    ("before the survey is noted", 1, 1),
    ("after the survey is noted", 1, 2),
    ("done", 1, 1),
    ("done", 9, 2),
    ("half a tensor", 4, 2),
    ("before the manifest", 1, 1),
    ("before the rename", 1, 1),
]


@pytest.mark.parametrize(("where", "count", "workers"), STAGES, ids=lambda v: str(v))
def test_killed_and_resumed(inputs, whole, tmp_path, where, count, workers):
    partial = killed(inputs, tmp_path / "out", where, count, workers)
    assert leftovers(tmp_path) == ["out.partial"]
    if where in ("done", "half a tensor"):
        assert 0 < len(journalled(partial)) < 27
        assert (partial / "survey.state.json").exists()
    settings = {"base": inputs.base, "strength": 0.5}
    with pytest.raises(OutputError, match="did not finish"):
        merge(inputs.task, inputs.vector, tmp_path / "out", **settings)
    done = merge(inputs.task, inputs.vector, tmp_path / "out", **settings, workers=3 - workers, resume=True)
    same_model(tmp_path / "out", whole[0])
    assert leftovers(tmp_path) == ["out"]
    assert done.tensors == whole[1].tensors


def test_killed_twice(inputs, whole, tmp_path, monkeypatch):
    settings = {"model": inputs.task, "vector": inputs.vector, "base": inputs.base, "strength": 0.5}
    first = journalled(interrupted(tmp_path / "out", monkeypatch, 3, **settings))
    second = journalled(interrupted(tmp_path / "out", monkeypatch, 8, resume=True, **settings))
    assert len(first) == 3
    assert len(second) == 8
    assert first < second
    merge(out=tmp_path / "out", resume=True, **settings)
    same_model(tmp_path / "out", whole[0])


def test_finished_tensors_are_not_computed_again(inputs, whole, tmp_path, monkeypatch):
    settings = {"model": inputs.task, "vector": inputs.vector, "base": inputs.base, "strength": 0.5}
    before = journalled(interrupted(tmp_path / "out", monkeypatch, 10, **settings))
    written, real = set(), OutputFolder.done
    monkeypatch.setattr(OutputFolder, "done", lambda self, name, *a: (written.add(name), real(self, name, *a)))
    monkeypatch.setattr("safegraft.merging.run.survey", lambda *_: pytest.fail("surveyed again"))
    merge(out=tmp_path / "out", resume=True, workers=1, **settings)
    assert len(before) == 10
    assert not before & written
    assert len(before | written) == 27
    same_model(tmp_path / "out", whole[0])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers(inputs, whole, tmp_path, workers):
    done = merge(inputs.task, inputs.vector, tmp_path / "out", base=inputs.base, strength=0.5, workers=workers)
    same_model(tmp_path / "out", whole[0])
    mine, first = asdict(done), asdict(whole[1])
    for key in ("out", "seconds", "peak_memory_bytes"):
        del mine[key], first[key]
    assert mine == first


def test_the_callers_thread_count_is_left_alone(inputs, tmp_path):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge(inputs.task, inputs.vector, tmp_path / "out", base=inputs.base, workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class TestSomethingChanged:
    """A resumed run must be the same run: an input or a setting that changed is refused, and --force starts again."""

    @pytest.fixture
    def copies(self, inputs, tmp_path):
        return {k: Path(shutil.copytree(getattr(inputs, k), tmp_path / k)) for k in ("task", "base", "vector")}

    def stopped(self, copies, tmp_path, monkeypatch):
        settings = {"model": copies["task"], "vector": copies["vector"], "base": copies["base"]}
        return settings, interrupted(tmp_path / "out", monkeypatch, 5, **settings)

    @pytest.mark.parametrize("which", ["task", "base"])
    @pytest.mark.parametrize("how", ["other bytes", "touched", "config"])
    def test_a_model(self, copies, tmp_path, monkeypatch, which, how):
        settings, partial = self.stopped(copies, tmp_path, monkeypatch)
        shard = sorted(copies[which].glob("*.safetensors"))[0]
        if how == "other bytes":
            save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, {"format": "pt"})
        elif how == "touched":
            os.utime(shard, ns=(1, 1))
        else:
            config = copies[which] / "config.json"
            config.write_text(config.read_text() + " ")
        before = files_of(partial)
        with pytest.raises(OutputError, match="other inputs or settings"):
            merge(out=tmp_path / "out", resume=True, **settings)
        assert files_of(partial) == before
        assert merge(out=tmp_path / "out", force=True, workers=1, **settings).merged > 0
        assert not partial.exists()

    def test_the_vector(self, copies, inputs, tmp_path, monkeypatch):
        settings, _ = self.stopped(copies, tmp_path, monkeypatch)
        other = unaligned(inputs.base, tmp_path / "other", seed=8, scope="hybrid")
        subtract(inputs.base, other, copies["vector"], scope="hybrid", force=True)
        with pytest.raises(OutputError, match="other inputs or settings"):
            merge(out=tmp_path / "out", resume=True, **settings)

    @pytest.mark.parametrize("changed", [{"strength": 0.2}, {"dtype": "bfloat16"}, {"params": {"keep": 0.25}}], ids=str)
    def test_a_setting(self, copies, tmp_path, monkeypatch, changed):
        settings, _ = self.stopped(copies, tmp_path, monkeypatch)
        with pytest.raises(OutputError, match="other inputs or settings"):
            merge(out=tmp_path / "out", resume=True, **settings, **changed)

    @pytest.mark.parametrize("changed", [{"workers": 2}, {"strict": True}], ids=str)
    def test_a_setting_that_does_not_matter(self, copies, tmp_path, monkeypatch, changed):
        settings, _ = self.stopped(copies, tmp_path, monkeypatch)
        merge(out=tmp_path / "out", resume=True, **settings, **changed)
        merge(out=tmp_path / "plain", workers=1, **settings)
        same_model(tmp_path / "out", tmp_path / "plain")

    def test_another_base(self, copies, inputs, tmp_path, monkeypatch):
        settings, _ = self.stopped(copies, tmp_path, monkeypatch)
        settings["base"] = finetuned(inputs.base, tmp_path / "base2", seed=6)
        with pytest.raises(OutputError, match="other inputs or settings"):
            merge(out=tmp_path / "out", resume=True, **settings)
