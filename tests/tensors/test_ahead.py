"""Digests worked out ahead are those of the bytes, and are forgotten when a file changes."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest

from safegraft import Checkpoint, merge
from safegraft.tensors import ahead


@pytest.fixture(autouse=True)
def forgotten():
    ahead._known.clear()
    yield
    ahead._known.clear()


def run(*folders):
    """Let it finish."""
    with ahead.hashing(folders):
        for process, _ in ahead._running:
            assert process.wait() == 0
    assert not ahead._running


def test_digests_are_those_of_the_bytes(tiny):
    folder = tiny("llama", shard="20KB")
    run(folder, "no/such/folder", "owner/name")
    opened = Checkpoint(folder)
    for name in opened.names():
        shard, entry = opened.entry(name)
        raw = os.pread(shard.fd, entry.spec.nbytes, entry.offset)
        assert ahead.known(shard.fd, entry.offset, entry.spec.nbytes) == hashlib.sha256(raw).hexdigest()


def test_a_changed_file_is_not_known(tiny, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((tiny("llama") / "model.safetensors").read_bytes())
    run(tmp_path)
    assert ahead._known
    os.utime(file, ns=(1, 1))
    with file.open("rb") as opened:
        assert not any(ahead.known(opened.fileno(), key[3], key[4]) for key in ahead._known)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x09\0\0\0\0\0\0\0" + b'{"a": {}}'])
def test_a_damaged_file_is_left_to_its_reader(tiny, tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    (tmp_path / "b.safetensors").write_bytes((tiny("llama") / "model.safetensors").read_bytes())
    run(tmp_path)
    assert len({key[1] for key in ahead._known}) == 1


def test_it_ends_in_the_middle_of_its_work(tmp_path):
    size = 8 << 30
    header = json.dumps({"a": {"data_offsets": [0, 8]}, "b": {"data_offsets": [8, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with ahead.hashing([tmp_path]):
        ((process, output),) = ahead._running
        while not os.fstat(output.fileno()).st_size:
            assert process.poll() is None
    assert [key[4] for key in ahead._known] == [8]
    assert process.returncode


def test_it_does_not_outlive_its_parent(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x1f\0\0\0\0\0\0\0" + b'{"a": {"data_offsets": [0, 1]}}' + b"x")
    command = [sys.executable, ahead.__file__, str(os.getppid()), str(tmp_path / "a.safetensors")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b""
    command[2] = str(os.getpid())
    assert subprocess.run(command, capture_output=True, check=True).stdout


def test_no_room_for_a_file_or_a_process(tiny, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for where in ("tempfile.TemporaryFile", "subprocess.Popen"):
        with monkeypatch.context() as patch:
            patch.setattr(f"safegraft.tensors.ahead.{where}", full)
            with ahead.hashing([tiny("llama")]):
                assert not ahead._running
    assert not ahead._known


def test_a_torn_line_is_passed_over(tiny):
    with ahead.hashing([tiny("llama")]):
        ((process, output),) = ahead._running
        process.wait()
        output.seek(0, os.SEEK_END)
        output.write(b"[[1, 2, 3")
    assert len(ahead._known) == len(Checkpoint(tiny("llama")).names())


def test_a_merge_writes_the_same_either_way(trio, tmp_path):
    made = trio("llama-tied")
    merge(made.task, made.vector, tmp_path / "plain", base=made.base)
    run(made.task, made.base, made.vector)
    merge(made.task, made.vector, tmp_path / "ahead", base=made.base)
    plain, after = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("plain", "ahead"))
    assert plain["inputs"] == after["inputs"]
    assert plain["outputs"]["tensors"] == after["outputs"]["tensors"]
