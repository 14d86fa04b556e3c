"""What a merge will do, as data: decided from headers alone, before a weight is read."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from ..naming import layer_and_module
from ..tensors.checkpoint import CHUNK
from ..tensors.files import ShardLayout, build_layout
from ..tensors.finetune import PIECE, FineTune
from ..tensors.source import MERGEABLE, TensorSpec
from ..tensors.vector import SafetyVector

Action = Literal["copy", "cast", "apply", "merge"]

WHY: dict[Action, str] = {
    "copy": "not in the vector, calibration or mask: the fine-tune's bytes",
    "cast": "not in the vector: the fine-tune's values in the dtype asked for",
    "apply": "not in the vector: base plus the adapter's update",
    "merge": "in the vector, calibration or mask, or of several fine-tunes: the method decides",
}
PROCESS_BYTES = 420_000_000
"""Resident memory of Python with torch loaded, before any weight is read."""
BATCH = 1 << 25
"""Entries of the matrices that are decomposed together on a GPU: two of 4096 × 4096, a hundred of 576 × 576."""
MEMORY_SHARE = 0.8
"""Of a machine's or a GPU's memory, what as many workers as it holds may use together."""
MASK = 3
"""Tensors of a weight's size that are held for its mask: logits, mask and their quotient with the mean."""


@dataclass(frozen=True)
class Unit:
    """One tensor of the output.

    ``also`` are stored copies of the same weight (a tied head) that get the same bytes,
    ``models`` how many fine-tunes are read for it, ``hessian`` bytes of its calibration matrix, ``in_pieces`` whether a
    few rows at a time are enough, ``masked`` whether a learnt mask decides on it."""

    name: str
    action: Action
    spec: TensorSpec
    shard: str
    also: tuple[str, ...] = ()
    models: int = 1
    hessian: int = 0
    in_pieces: bool = False
    masked: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """Where it is written: its name, and its copies'."""
        return self.name, *self.also

    @property
    def why(self) -> str:
        return WHY[self.action]

    @property
    def cost(self) -> float:
        """Rough work: bytes moved, plus for merges the arithmetic of a Gram eigendecomposition."""
        bytes_moved = float(self.spec.nbytes)
        if self.action != "merge" or len(self.spec.shape) < 2:
            return bytes_moved
        short, long = sorted(self.spec.shape[-2:])
        stack = self.spec.numel / (short * long)
        return bytes_moved + stack * (4 * short**2 * long + 9 * short**3) / 20

    @property
    def working_set(self) -> int:
        """Bytes one worker holds while it does this unit."""
        if self.action == "copy":
            return 0
        if self.action == "cast":
            return 8 * CHUNK
        if self.in_pieces:
            return (8 + self.models) * max(PIECE, self.spec.shape[-1]) * 4
        held = 8 + self.models + (MASK if self.masked else 0)
        return held * self.spec.numel * 4 + 7 * self.hessian


@dataclass(frozen=True)
class Plan:
    """Every unit of the output and the files they lie in."""

    units: tuple[Unit, ...]
    layouts: tuple[ShardLayout, ...]
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        return sum(layout.nbytes for layout in self.layouts)

    def peak_bytes(self, workers: int) -> int:
        """Expected peak memory: the process, and the largest working sets, one a worker."""
        return PROCESS_BYTES + sum(heapq.nlargest(workers, (u.working_set for u in self.units)))

    def groups(self) -> list[tuple[str, Action, int, int]]:
        """``(module, action, tensors, bytes)`` for every kind of module, in the model's order."""
        found: dict[tuple[str, Action], list[int]] = {}
        for unit in self.units:
            group = found.setdefault((layer_and_module(unit.name)[1], unit.action), [0, 0])
            group[0] += 1
            group[1] += unit.spec.nbytes
        return [(module, action, n, size) for (module, action), (n, size) in found.items()]


def make_plan(
    fine: FineTune,
    vector: SafetyVector | None,
    dtype: torch.dtype | None = None,
    hessians: Mapping[str, int] | None = None,
    masked: Collection[str] = (),
    *,
    entrywise: bool = False,
) -> Plan:
    """Plan the output of merging ``vector`` into ``fine``; ``dtype`` changes floating-point weights' dtype,
    ``hessians`` are the weights that a calibration decides on and the bytes of their matrices, ``masked`` those that a
    mask does.

    ``entrywise``: whether the method's answer for some rows depends on those rows alone.

    With the fine-tune's own dtype each shard's header is the fine-tune's, byte for byte.
    """
    layout = fine.layout
    changed = {*(fine.pairing.deltas if vector is not None else ()), *(hessians or ()), *masked}
    layouts, specs = [], {}
    for filename, shard in layout.shards.items():
        old = [entry.spec for entry in sorted(shard.layout.entries.values(), key=lambda e: e.offset)]
        new = [TensorSpec(s.name, _dtype(s.dtype, dtype), s.shape) for s in old]
        same = new == old
        layouts.append(shard.layout if same else build_layout(filename, new, shard.metadata or {"format": "pt"}))
        specs.update({s.name: s for s in new})
    copies: dict[str, list[str]] = {}
    for head, embedding in layout.tied.items():
        copies.setdefault(embedding, []).append(head)
    units, models = [], 1 + len(fine.others)
    for name in layout.names():
        if name in layout.tied:
            continue
        action: Action = "copy"
        if (name in changed or fine.fuses) and layout.is_mergeable(name):
            action = "merge"
        elif fine.adapter is not None and name in fine.adapter:
            action = "apply"
        elif specs[name].dtype != layout.spec(name).dtype:
            action = "cast"
        held = (hessians or {}).get(name, 0)
        also, pieces = tuple(copies.get(name, ())), entrywise and action == "merge" and fine.in_pieces(name)
        units.append(Unit(name, action, specs[name], layout.shard_of(name), also, models, held, pieces, name in masked))
    return Plan(tuple(units), tuple(layouts), tuple(fine.pairing.notes))


def balanced(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """``units`` in at most ``count`` batches of about the same cost, the costliest batch first."""
    batches: list[list[Unit]] = [[] for _ in range(min(count, len(units)))]
    costs = [(0.0, i) for i in range(len(batches))]
    for unit in sorted(units, key=lambda u: -u.cost):
        cost, i = heapq.heappop(costs)
        batches[i].append(unit)
        heapq.heappush(costs, (cost + unit.cost, i))
    return sorted(batches, key=lambda batch: -sum(u.cost for u in batch))


def by_shape(units: Sequence[Unit]) -> list[tuple[Unit, ...]]:
    """``units`` in batches, the costliest first: matrices of one shape that are merged whole together, as many as hold
    ``BATCH`` entries; every other unit alone."""
    alike: dict[object, list[Unit]] = {}
    for unit in units:
        together = unit.action == "merge" and not unit.in_pieces and len(unit.spec.shape) == 2
        alike.setdefault(unit.spec.shape if together else unit.name, []).append(unit)
    found = []
    for group in alike.values():
        count = max(1, BATCH // max(1, group[0].spec.numel))
        found += [tuple(group[i : i + count]) for i in range(0, len(group), count)]
    return sorted(found, key=lambda batch: -sum(u.cost for u in batch))


def most_workers(working_sets: Iterable[int], nbytes: int, limit: int) -> int:
    """How many workers, 1 to ``limit``, hold no more than ``nbytes`` at any time; 1 where even one may hold more.

    A worker's memory stays as large as its largest tensor made it, so that w of them hold the w largest at most.
    """
    held = accumulate(heapq.nlargest(limit, working_sets))
    return max(1, sum(total <= nbytes for total in held))


def index_of(layouts: Sequence[ShardLayout], metadata: dict[str, object]) -> dict[str, object]:
    """The content of ``model.safetensors.index.json``."""
    total = sum(e.spec.nbytes for layout in layouts for e in layout.entries.values())
    where = {name: layout.filename for layout in layouts for name in layout.entries}
    return {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(where.items()))}


def _dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored in MERGEABLE else stored
