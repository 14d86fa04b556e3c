"""How long a merge will take, from the plan and a few measurements made here and now.

A merge is two passes, and each is a sum over tensors: bytes to read, to hash and to write, entries to add up, and the
method's own arithmetic. The first four are speeds, measured on some MB in memory, of the model's own files, and of a
nameless file where the output will lie. The last is measured by calling the method on a small random weight of the
same proportions and scaling: with the number of entries, or, where doubling the sides costs clearly more than fourfold
(an SVD), with the cube of the side; where GPUs are to do it, on the first of those that share it. All of it takes about
a second. It knows nothing of what else the machine will be doing, and a file that is in the page cache now may not be
then. `benchmarks/forecast.py` holds it against merges on processors.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..tensors.checkpoint import CHUNK
from ..tensors.files import ShardFile
from ..tensors.lowrank import Delta, LowRank, Svd, sum_of_squares
from ..tensors.mask import Masking, moved
from ..tensors.masking import Logits
from ..tensors.source import CPU, Workspace, all_finite, as_bytes
from .execute import merge_tensor
from .method import GlobalStats
from .plan import Unit
from .workers import single_threaded

if TYPE_CHECKING:
    from .run import Prepared

START = 1.6
"""Seconds until Python has loaded torch and the inputs' headers are read."""
PROBE = 32 << 20
"""Bytes that are read, hashed and written to learn the speeds."""
LORA = 16
"""Rank that an adapter is taken to have."""
SIDE = 768
"""Shorter side of the largest weight the method is tried on."""
AREA = 4 << 20
"""Entries of that weight at most."""
CUBIC = 2.4
"""Growth of the method's time with the sides, as an exponent, from which on it is taken for the cube."""


@dataclass(frozen=True)
class Speeds:
    """Of one core: bytes a second hashed, read and written to the disk, and seconds an entry to add up and to store."""

    hashing: float
    reading: float
    writing: float
    adding: float
    storing: float


@dataclass(frozen=True)
class Forecast:
    """Seconds of the two passes, the first being none where one is enough; ``total`` is what a command takes in all.

    ``ahead``: of these, what is done while Python loads torch (tensors/ahead.py).
    """

    survey: float
    merge: float
    ahead: float = 0.0

    @property
    def total(self) -> float:
        return START + self.survey + self.merge - self.ahead


def forecast(ready: Prepared) -> Forecast:
    """Measure and predict. Leaves no file behind."""
    with single_threaded():
        speeds = measured(next(iter(ready.fine.layout.shards.values())), Path(ready.config.out))
        trials: dict[tuple[int, ...], float] = {}
        first, second, hashing, on_gpus = [], [], 0.0, 0.0
        for unit in ready.plan.units:
            nbytes = _input_bytes(unit, ready)
            gathering = nbytes / speeds.hashing + unit.spec.numel * unit.models * speeds.adding
            merging = _merge(unit, ready, speeds)
            method = 0.0 if unit.action in ("copy", "cast") else _method(unit, ready, trials)
            if ready.devices == (CPU,):
                merging += method
            else:
                on_gpus += method / len(ready.devices)
            first.append(0.0 if ready.at_once else nbytes / speeds.reading + gathering)
            second.append(merging + gathering if ready.at_once else merging)
            hashing += nbytes / speeds.hashing
    cores = min(ready.workers, os.cpu_count() or 1)
    written = ready.plan.output_bytes / speeds.writing
    ahead = min(hashing, START) / cores if cores > 1 else 0.0
    return Forecast(_shared(first, cores), max(_shared(second, cores), on_gpus, written), ahead)


def _shared(seconds: list[float], cores: int) -> float:
    """Work on several cores: evenly spread, but no tensor on two of them."""
    return max(sum(seconds) / cores, max(seconds, default=0.0))


def _input_bytes(unit: Unit, ready: Prepared) -> int:
    fine = ready.fine
    stored = fine.stored(unit.name)[fine.base is fine.layout :]
    return sum(c.spec(own).nbytes for c, own in stored) + _vector_bytes(unit, ready)


def _merge(unit: Unit, ready: Prepared, speeds: Speeds) -> float:
    """Seconds of one core, without the method's own."""
    copying = unit.spec.nbytes / speeds.reading * 2
    if unit.action == "copy":
        return copying
    storing = unit.spec.nbytes / speeds.hashing + unit.spec.numel * speeds.storing
    if unit.action == "cast":
        return copying + storing
    inputs = (unit.models + 1) * unit.spec.nbytes + _vector_bytes(unit, ready)
    return inputs / speeds.reading + storing


def _vector_bytes(unit: Unit, ready: Prepared) -> int:
    if ready.vector is None or unit.name not in ready.fine.pairing.deltas:
        return 0
    vector = ready.vector
    return sum(vector.file.layout.entries[k].spec.nbytes for k in vector.keys(ready.fine.pairing.deltas[unit.name]))


def _method(unit: Unit, ready: Prepared, trials: dict[tuple[int, ...], float]) -> float:
    """Seconds of the method on one unit, slice by slice where it is a stack."""
    shape = unit.spec.shape
    stack = math.prod(shape[:-2])
    rows, columns = shape[-2:] if len(shape) > 1 else (1, unit.spec.numel)
    short, long = sorted((max(1, rows), max(1, columns)))
    side = min(short, SIDE, max(1, math.isqrt(AREA * short // long)))
    in_vector = unit.name in ready.fine.pairing.deltas
    key = (rows, columns, in_vector, unit.masked)
    if key not in trials:
        large = _trial(ready, rows * side // short or 1, columns * side // short or 1, in_vector, unit.masked)
        growth = side / short
        power = 2.0
        if side < short and side >= 64:
            half = _trial(ready, rows * side // short // 2, columns * side // short // 2, in_vector, unit.masked)
            power = 3.0 if math.log2(large / half) > CUBIC else 2.0
        trials[key] = large / growth**power
    return stack * trials[key]


def _trial(ready: Prepared, rows: int, columns: int, in_vector: bool, masked: bool) -> float:
    """Seconds of the method on random deltas of this shape, of the kinds that the inputs have."""
    fine, rank = ready.fine, ready.vector.rank if ready.vector is not None else None
    g = torch.Generator().manual_seed(0)
    shape = (rows, columns) if rows > 1 else (columns,)
    base = torch.randn(shape, generator=g)
    tasks = [_delta(shape, LORA if one.adapter else None, g) for one in (fine, *fine.others)]
    known = ready.vector is not None and any(len(ready.vector.keys(name)) > 1 for name in ready.vector.names())
    safety = _delta(shape, rank, g, known=known) if in_vector else Delta(shape)
    stats = GlobalStats(1.0, 1.0, 1.0)
    mask = _logits(ready, shape, g) if masked else None
    workspace = Workspace(ready.devices[0])
    there = workspace.device

    def call() -> None:
        merged = merge_tensor(
            ready.method, ready.params, stats, name="trial", base=base, tasks=tasks, safety=safety,
            weights=fine.weights, mask=mask,
        )  # fmt: skip
        if merged and there != CPU:
            workspace.lower("out", merged.dense(), torch.float32)

    with workspace.at_work():
        base, tasks, safety = base.to(there), [task.to(there) for task in tasks], safety.to(there)
        mask = None if mask is None else moved(mask, there)
        return _seconds(call)


def _logits(ready: Prepared, shape: tuple[int, ...], g: torch.Generator) -> Masking:
    assert ready.mask is not None
    grain = ready.mask.grain
    if ready.mask.factors:
        rank = min(LORA, *shape)
        left, right = (Logits(torch.randn(n, rank, generator=g), (n, rank), grain) for n in shape)
        return left, right
    return Logits(torch.randn(grain.shape(shape), generator=g), shape, grain)


def _delta(shape: tuple[int, ...], rank: int | None, g: torch.Generator, *, known: bool = False) -> Delta:
    if len(shape) < 2:
        return Delta(shape, full=torch.randn(shape, generator=g))
    k = max(1, min(rank, *shape) if rank else min(shape) // 2)
    if not known and not rank:
        return Delta(shape, full=torch.randn(shape, generator=g))
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=g)).Q for n in shape)
    svd = Svd(u, torch.linspace(2, 1, k), v)
    if rank:
        return Delta(shape, low=LowRank(u * svd.s, v), known=svd)
    return Delta(shape, full=torch.randn(shape, generator=g), known=svd)


def measured(shard: ShardFile, out: Path) -> Speeds:
    """This machine's speeds: the shard's disk for reading, the output's for writing."""
    buffer = torch.empty(PROBE, dtype=torch.uint8)
    data = as_bytes(buffer)
    nbytes = min(PROBE, shard.layout.nbytes)
    reading = nbytes / _seconds(lambda: shard.read_into(data[:nbytes], 0), once=True)
    hashing = PROBE / _seconds(lambda: hashlib.sha256(data).digest())
    there = next((p for p in out.absolute().parents if os.access(p, os.W_OK)), Path(tempfile.gettempdir()))
    with tempfile.TemporaryFile(dir=there) as file:

        def write() -> None:
            os.pwrite(file.fileno(), data, 0)
            os.fsync(file.fileno())

        writing = PROBE / _seconds(write, once=True)
    a = torch.ones(CHUNK, dtype=torch.bfloat16)
    b = torch.ones(CHUNK)
    x = torch.empty(CHUNK)
    adding = _seconds(lambda: (sum_of_squares(x.copy_(a).sub_(b)), sum_of_squares(b)))
    storing = _seconds(lambda: all_finite(a.copy_(x.copy_(a).sub_(b).add_(b))))
    return Speeds(hashing, reading, writing, adding / x.numel(), storing / x.numel())


def _seconds(work: Callable[[], object], *, once: bool = False) -> float:
    """The shorter of two tries, never 0; ``once`` where a second would find everything cached."""
    tries = []
    for _ in range(1 if once else 2):
        start = time.perf_counter()
        work()
        tries.append(time.perf_counter() - start)
    return max(min(tries), 1e-7)
