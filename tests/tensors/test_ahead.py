"""Digests worked out ahead are those of the bytes, and are forgotten when a file changes."""

import hashlib
import json
import os
import time

import pytest

from safegraft import Checkpoint, merge
from safegraft.tensors import ahead


@pytest.fixture(autouse=True)
def forgotten():
    ahead._known.clear()
    yield
    ahead.stop()
    ahead._known.clear()


def run(*folders):
    ahead.start(folders)
    while ahead._threads and ahead._threads[0].is_alive():
        time.sleep(0.01)
    ahead.stop()


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
def test_a_damaged_file_is_left_to_its_reader(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    run(tmp_path)
    assert not ahead._known


def test_a_merge_writes_the_same_either_way(trio, tmp_path):
    made = trio("llama-tied")
    merge(made.task, made.vector, tmp_path / "plain", base=made.base)
    run(made.task, made.base, made.vector)
    merge(made.task, made.vector, tmp_path / "ahead", base=made.base)
    plain, after = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("plain", "ahead"))
    assert plain["inputs"] == after["inputs"]
    assert plain["outputs"]["tensors"] == after["outputs"]["tensors"]
