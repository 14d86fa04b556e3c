"""The safetensors container, against the safetensors library both ways, and against every kind of damage."""

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from safegraft.errors import CheckpointError
from safegraft.tensors.files import ShardFile, build_layout
from safegraft.tensors.source import TensorSpec, as_bytes

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
names = text.filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
specs = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=6)
metadata = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=3)
fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def contents(wanted, seed):
    """Tensors of those dtypes and shapes with every bit pattern possible (NaN and -0 among them)."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, (dtype, shape) in wanted.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        top = 2 if dtype == torch.bool else 256
        out[name] = torch.randint(0, top, (size,), dtype=torch.uint8, generator=rng).view(dtype).reshape(shape)
    return out


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes(as_bytes(a)) == bytes(as_bytes(b))


def read(shard, name):
    entry = shard.layout.entries[name]
    out = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
    shard.read_into(as_bytes(out), entry.offset)
    return out


@fast
@given(specs, metadata, st.integers(0, 2**31))
def test_what_the_library_writes_we_read(tmp_path, wanted, about, seed):
    tensors = contents(wanted, seed)
    save_file(tensors, tmp_path / "m.safetensors", about or None)
    shard = ShardFile(tmp_path / "m.safetensors")
    assert set(shard.layout.entries) == set(tensors)
    assert shard.metadata == about
    assert all(same_bits(read(shard, n), t) for n, t in tensors.items())
    assert shard.layout.nbytes == (tmp_path / "m.safetensors").stat().st_size


@fast
@given(specs, metadata, st.integers(0, 2**31))
def test_what_we_write_the_library_reads(tmp_path, wanted, about, seed):
    tensors = contents(wanted, seed)
    layout = build_layout("m.safetensors", [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], about)
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.truncate(layout.nbytes)
        os.pwrite(file.fileno(), layout.header, 0)
        for name, tensor in reversed(tensors.items()):
            os.pwrite(file.fileno(), as_bytes(tensor), layout.entries[name].offset)
    with safe_open(tmp_path / "m.safetensors", "pt") as opened:
        assert set(opened.keys()) == set(tensors)
        assert (opened.metadata() or {}) == about
        assert all(same_bits(opened.get_tensor(n), t) for n, t in tensors.items())
    assert ShardFile(tmp_path / "m.safetensors").layout.header == layout.header


@fast
@given(specs)
def test_headers_end_on_eight_bytes(wanted):
    layout = build_layout("m.safetensors", [TensorSpec(n, d, s) for n, (d, s) in wanted.items()])
    assert len(layout.header) % 8 == 0


def file_of(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


GOOD = file_of(one(), b"12345678")
two = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
}
DAMAGED = {
    "empty file": (b"", "not a safetensors file"),
    "seven bytes": (b"1234567", "not a safetensors file"),
    "truncated": (GOOD[:-1], "truncated or padded"),
    "truncated inside the header": (GOOD[:20], "not a whole safetensors file"),
    "padded": (GOOD + b"\0", "truncated or padded"),
    "header length too large": (struct.pack("<Q", 2**63) + GOOD[8:], "header claims"),
    "header length too small": (struct.pack("<Q", 5) + GOOD[8:], "damaged header"),
    "not JSON": (file_of(b"{not json"), "damaged header"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "damaged header"),
    "a list": (file_of([1, 2]), "damaged header"),
    "null": (file_of(b"null"), "damaged header"),
    "nested without end": (file_of(b"[" * 200_000), "damaged header"),
    "an entry that is no mapping": (file_of({"a": 7}), "damaged header"),
    "no dtype": (file_of({"a": {"shape": [], "data_offsets": [0, 0]}}), "damaged header"),
    "unknown dtype": (file_of(one(dtype="F7"), b"12345678"), "unknown dtype 'F7'"),
    "dtype that is no name": (file_of(one(dtype=["F32"]), b"12345678"), "damaged header"),
    "fewer bytes than the shape": (file_of(one(shape=[3]), b"12345678"), "its shape needs 12"),
    "negative dimensions": (file_of(one(shape=[-1, -2]), b"12345678"), "damaged header"),
    "a fractional dimension": (file_of(one(shape=[2.5]), b"12345678"), "damaged header"),
    "an endless dimension": (file_of(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'), "damaged header"),
    "fractional offsets": (file_of(one(data_offsets=[0.0, 8.0]), b"12345678"), "damaged header"),
    "offsets before the data": (file_of(one(data_offsets=[-8, 0]), b"12345678"), "damaged header"),
    "three offsets": (file_of(one(data_offsets=[0, 4, 8]), b"12345678"), "damaged header"),
    "overlapping tensors": (file_of(two, b"123456789012"), "does not follow"),
    "a hole between tensors": (
        file_of(two | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}, b"1" * 20),
        "does not follow",
    ),
    "metadata that is no mapping": (file_of(one() | {"__metadata__": 5}, b"12345678"), "damaged header"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_told_with_the_path(tmp_path, kind):
    data, sentence = DAMAGED[kind]
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as told:
        ShardFile(path)
    assert str(path) in str(told.value)
    assert sentence in str(told.value)
    assert told.value.hint


def test_the_undamaged_one_opens(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(GOOD)
    shard = ShardFile(tmp_path / "m.safetensors")
    assert bytes(as_bytes(read(shard, "a"))) == b"12345678"


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot open"):
        ShardFile(tmp_path / "none.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_flipped_bytes_are_refused_or_harmless(tmp_path, flips):
    """Never another exception, never a tensor outside the file."""
    data = bytearray(GOOD)
    for at, value in flips:
        data[at] = value
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    told = "opened"
    try:
        shard = ShardFile(path)
        assert shard.layout.nbytes == len(data)
        assert sum(e.spec.nbytes for e in shard.layout.entries.values()) == len(data) - len(shard.layout.header)
    except CheckpointError as error:
        told = str(error)
    assert told == "opened" or str(path) in told


def test_a_file_cut_after_opening_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(GOOD)
    shard = ShardFile(path)
    os.truncate(path, len(GOOD) - 3)
    with pytest.raises(CheckpointError, match="ended at byte"):
        read(shard, "a")


def test_closing_twice_is_harmless(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(GOOD)
    shard = ShardFile(path)
    shard.close()
    shard.close()
    assert shard.fd == -1
