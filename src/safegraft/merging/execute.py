"""Do what the plan says: one loop over units, several workers, nothing flows back but figures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Settings
from ..errors import ConfigError, NumericError
from ..hardware import free_memory_of
from ..tensors import ahead
from ..tensors.calibration import Calibration
from ..tensors.finetune import FineTune
from ..tensors.lowrank import Delta, with_started
from ..tensors.mask import Mask, Masking
from ..tensors.randomness import generator
from ..tensors.shards import Shards
from ..tensors.source import CPU, Workspace, all_finite, as_bytes
from ..tensors.vector import SafetyVector
from ..tensors.writer import OutputFolder
from .method import GlobalStats, Merged, Method, TensorTriple
from .plan import BATCH, MEMORY_SHARE, Plan, Unit, balanced, by_shape, most_workers
from .survey import Progress, Survey, Tally, TensorStats, collected, of_tensor
from .workers import Share, on_devices


@dataclass(frozen=True)
class Run:
    """Everything the units of one run share."""

    fine: FineTune
    vector: SafetyVector | None
    method: Method
    params: Settings
    survey: Survey
    stats: GlobalStats
    devices: Sequence[torch.device] = (CPU,)
    seed: int = 0
    calibration: Calibration | None = None
    mask: Mask | None = None


class Done(NamedTuple):
    """A tensor that is written: its name, the SHA-256 of its bytes, and the method's figures."""

    name: str
    sha256: str
    figures: dict[str, float] | None = None


def execute(
    plan: Plan, run: Run, folder: OutputFolder, workers: int, progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """Write every unit that is not yet written. Returns the method's figures by tensor.

    Raises:
        NumericError: a result is NaN or Inf. OutputError: the disk refuses. ConfigError: a GPU's memory is too small.
    """

    def one(units: Sequence[Unit], workspace: Workspace) -> None:
        todo = [unit for unit in units if not is_done(unit, folder)]
        read: Sequence[_Inputs | None] = [None] * len(units)
        with _enough_memory(units[0], workspace):
            if todo and len(units) > 1:  # all of them, so that going on gives the bytes of a run that was not stopped
                read = _read_together(units, run, workspace)
            for unit, inputs in zip(units, read, strict=True):
                for done in write_unit(unit, run, folder, workspace, inputs) if unit in todo else ():
                    folder.done(*done)
                if progress:
                    progress(unit.name, unit.spec.nbytes)

    on_devices(one, _shares(plan, run, workers))
    return figures_of(plan, folder)


def _shares(plan: Plan, run: Run, workers: int) -> list[Share[Sequence[Unit]]]:
    """The plan's units, the costliest first, split evenly over the devices by their cost, whatever is done already: so
    every tensor is always worked out on the same device.

    A GPU gets its share of the workers, as many as its memory allows; two are enough for one to read and copy while the
    other's tensor is worked on.
    """
    shares = []
    for device, units in zip(run.devices, balanced(plan.units, len(run.devices)), strict=False):
        gpu = device.type != "cpu"
        items: Sequence[Sequence[Unit]] = [(unit,) for unit in units]
        if gpu and run.method.decomposes:
            items = by_shape(units)
        count = max(1, workers // len(run.devices))
        if gpu:
            sets = (sum(u.working_set for u in batch) for batch in items)
            count = most_workers(sets, int(MEMORY_SHARE * free_memory_of(device)), count)
        shares.append(Share(items, count, device))
    return shares


def execute_at_once(
    plan: Plan, run: Run, folder: OutputFolder, workers: int, progress: Progress | None = None
) -> tuple[Survey, dict[str, dict[str, float]]]:
    """``execute`` without a survey before it: each tensor's statistics are gathered while it is merged.

    For methods that are ``local``, without a vector; ``run.survey`` is not looked at. Raises as ``survey`` does, too.
    """
    ahead.stop()

    def one(unit: Unit, workspace: Workspace) -> tuple[str, TensorStats]:
        stats: TensorStats | None = None
        done: list[Done] | None = [] if is_done(unit, folder) else None
        with _enough_memory(unit, workspace):
            if done is None and unit.in_pieces:
                tally = Tally(run.fine, unit.name)
                done = _compute_in_pieces(unit, run, folder, workspace, tally)
                stats = tally.ended(workspace) if done else None
            stats = stats or of_tensor(run.fine, None, unit.name, workspace)
            if done is None:
                done = write_unit(unit, replace(run, survey=Survey({unit.name: stats})), folder, workspace)
        for each in done:
            folder.done(*each)
        if progress:
            progress(unit.name, unit.spec.nbytes)
        return unit.name, stats

    shares = [
        Share([unit for units in share.items for unit in units], share.workers, share.device)
        for share in _shares(plan, run, workers)
    ]
    found = dict(on_devices(one, shares))
    return collected(run.fine, found), figures_of(plan, folder)


def is_done(unit: Unit, folder: OutputFolder) -> bool:
    return all(name in folder.finished for name in unit.targets)


def figures_of(plan: Plan, folder: OutputFolder) -> dict[str, dict[str, float]]:
    """The method's figures by tensor, in the plan's order."""
    return {u.name: dict(folder.figures[u.name]) for u in plan.units if folder.figures[u.name]}


def write_unit(unit: Unit, run: Run, shards: Shards, workspace: Workspace, inputs: _Inputs | None = None) -> list[Done]:
    """Put one unit into its places; doing it twice changes nothing. ``inputs``: its weights where they are read
    already."""
    done = None
    if unit.action == "cast":
        done = _cast(unit, run, shards, workspace)
    elif unit.action != "copy":
        if unit.in_pieces:
            done = _compute_in_pieces(unit, run, shards, workspace)
        else:
            done = _compute(unit, run, shards, workspace, inputs or _read(unit, run, workspace))
    return _copy(unit, run, shards) if done is None else done


def merge_tensor(
    method: Method,
    params: object,
    stats: GlobalStats,
    *,
    name: str,
    base: Tensor,
    tasks: Sequence[Delta],
    safety: Delta,
    weights: Sequence[float] = (1.0,),
    seed: int = 0,
    hessian: Tensor | None = None,
    mask: Masking | None = None,
) -> Merged | None:
    """Apply a method to one tensor; a stack of matrices [e, m, n] goes slice by slice.

    Figures of a stack are the mean over its slices. None where the fine-tune is kept: where the only one there is
    meets a zero vector, no ``hessian`` and no ``mask``, and where the method says so for every slice. Stacks have no
    ``mask``.
    """
    if hessian is None and mask is None and _unchanged(safety, tasks, weights):
        return None

    def call(label: str, base: Tensor, deltas: Sequence[Delta]) -> Merged | None:
        rng = generator(seed, label)
        triple = TensorTriple(label, base, tuple(deltas[:-1]), tuple(weights), deltas[-1], rng, hessian, mask)
        return method.function(triple, params, stats)

    if base.dim() <= 2:
        return call(name, base, [*tasks, safety])
    shape = base.shape
    flat = [d if len(shape) == 3 else _stack(d) for d in (*tasks, safety)]
    base = base.reshape(-1, *shape[-2:])
    if min(shape[-2:]) < 2:
        whole = call(name, base.reshape(-1), [_flattened(d, base.numel()) for d in flat])
        return None if whole is None else Merged(whole.dense().reshape(shape), whole.figures)
    sliced = list(zip(*(_slices(method, d) for d in flat), strict=True))
    parts = [call(f"{name}[{i}]", base[i], deltas) for i, deltas in enumerate(sliced)]
    if all(p is None for p in parts):
        return None
    stacked = torch.stack([p.dense() if p else deltas[0].dense() for p, deltas in zip(parts, sliced, strict=True)])
    told = [p.figures for p in parts if p]
    means = {key: sum(f[key] for f in told) / len(told) for key in told[0]}
    return Merged(stacked.reshape(shape), means)


def _slices(method: Method, delta: Delta) -> list[Delta]:
    """The matrices of a stack; on a GPU their SVDs are begun together where ``method`` wants them."""
    slices = delta.slices()
    if not method.decomposes or delta.is_zero or delta.full is None or delta.full.device.type == "cpu":
        return slices
    count = max(1, BATCH // math.prod(delta.shape[1:]))
    return [s for i in range(0, len(slices), count) for s in with_started(slices[i : i + count])]


def _stack(delta: Delta) -> Delta:
    if delta.full is None:
        return delta
    full = delta.full.reshape(-1, *delta.shape[-2:])
    return Delta(tuple(full.shape), full=full, scale=delta.scale)


def _flattened(delta: Delta, numel: int) -> Delta:
    if delta.full is None:
        return Delta((numel,), device=delta.device)
    return Delta((numel,), full=delta.full.reshape(-1), scale=delta.scale)


def _copy(unit: Unit, run: Run, shards: Shards) -> list[Done]:
    for name in unit.targets:
        source, entry = run.fine.layout.entry(name)
        shards.copy(name, source.fd, entry.offset)
    return [Done(name, run.survey.tensors[unit.name].model_sha256) for name in unit.targets]


@dataclass(frozen=True)
class _Inputs:
    """All of one weight that a method is given; on the CPU in a workspace's memory, good until the next is read."""

    base: Tensor
    tasks: list[Delta]
    safety: Delta
    hessian: Tensor | None
    mask: Masking | None


def _read(unit: Unit, run: Run, workspace: Workspace) -> _Inputs:
    fine, name = run.fine, unit.name
    base, tasks = fine.read(name, workspace)
    safety = Delta(tuple(base.shape), device=base.device)
    if run.vector is not None and name in fine.pairing.deltas:
        safety = fine.safety(name, run.vector, workspace).scaled(run.stats.alpha)
    hessian = run.calibration.hessian(fine.pairing.counterparts[name], workspace) if run.calibration else None
    mask = run.mask.masking(fine.pairing.counterparts[name], workspace) if run.mask and unit.masked else None
    return _Inputs(base, tasks, safety, hessian, mask)


def _read_together(units: Sequence[Unit], run: Run, workspace: Workspace) -> list[_Inputs]:
    """Several units on a GPU, where every tensor has memory of its own, with the SVDs of their changes begun."""
    read = [_read(unit, run, workspace) for unit in units]
    started = iter(with_started([task for inputs in read for task in inputs.tasks]))
    return [replace(inputs, tasks=[next(started) for _ in inputs.tasks]) for inputs in read]


@contextmanager
def _enough_memory(unit: Unit, workspace: Workspace) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{workspace.device} has too little memory for {unit.name} {list(unit.spec.shape)}",
            "Free some of it and go on with --resume; or give fewer --workers, or --device cpu.",
        ) from error


def _compute(unit: Unit, run: Run, shards: Shards, workspace: Workspace, inputs: _Inputs) -> list[Done] | None:
    """Merge or apply; None where the method keeps the fine-tune's bytes."""
    fine, name, base, tasks = run.fine, unit.name, inputs.base, inputs.tasks
    merged = None
    if unit.action == "merge":
        merged = merge_tensor(
            run.method, run.params, run.stats, name=name, base=base, tasks=tasks, safety=inputs.safety,
            weights=fine.weights, seed=run.seed, hessian=inputs.hessian, mask=inputs.mask,
        )  # fmt: skip
    if merged is None and fine.adapter is None and unit.spec.dtype == fine.layout.spec(name).dtype:
        return None
    output = _Output(unit, shards, workspace)
    output.put(base.add_(merged.dense() if merged else tasks[0].dense()))
    output.rest(fine)
    return output.done(merged.figures if merged else None)


def _compute_in_pieces(
    unit: Unit, run: Run, shards: Shards, workspace: Workspace, tally: Tally | None = None
) -> list[Done] | None:
    """As _compute, a few rows at a time, for methods that go entry by entry."""
    fine, name, method = run.fine, unit.name, run.method
    output, figures, first, overview = _Output(unit, shards, workspace), None, True, None
    changed = fine.fuses or (name in fine.pairing.deltas and run.stats.alpha != 0)
    if changed and method.overview is not None:
        overview = method.overview(lambda: _triples(name, run, workspace), run.params)
    for triple in _triples(name, run, workspace, overview, tally):
        merged = method.function(triple, run.params, run.stats) if changed else None
        if merged is None and first and unit.spec.dtype == fine.layout.spec(name).dtype:
            return None
        figures, first = merged.figures if merged else None, False
        output.put(triple.base.add_(merged.dense() if merged else triple.task.dense()))
    output.rest(fine)
    return output.done(figures)


def _triples(
    name: str, run: Run, workspace: Workspace, overview: Any = None, tally: Tally | None = None
) -> Iterator[TensorTriple]:
    """One tensor, a few rows at a time."""
    fine, rng = run.fine, generator(run.seed, name)
    vector = run.vector if name in fine.pairing.deltas and run.stats.alpha else None
    for base, tasks, safety in fine.pieces(name, vector, workspace, tally.seen if tally else None):
        if tally is not None:
            tally.add(base, tasks)
        safety = safety.scaled(run.stats.alpha)
        yield TensorTriple(name, base, tuple(tasks), tuple(fine.weights), safety, rng, overview=overview)


class _Output:
    """One tensor on its way into the shards, from its first entry to its last."""

    def __init__(self, unit: Unit, shards: Shards, workspace: Workspace) -> None:
        self.unit, self.shards, self.workspace = unit, shards, workspace
        self.running, self.written = hashlib.sha256(), 0

    def put(self, values: Tensor) -> None:
        """The next entries. Raises NumericError where one is NaN or Inf in the output's dtype."""
        dtype = self.unit.spec.dtype
        if values.dtype != dtype or values.device.type != "cpu":
            values = self.workspace.lower("out", values, dtype)
        if not all_finite(values):
            raise _not_finite(self.unit)
        data = as_bytes(values)
        for target in self.unit.targets:
            self.shards.write(target, data, self.written * dtype.itemsize)
        self.running.update(data)
        self.written += values.numel()

    def rest(self, fine: FineTune) -> None:
        """The fine-tune's own rows, beyond those that take part."""
        for part in fine.layout.chunks(self.unit.name, self.workspace, "rest", self.written):
            self.put(part)

    def done(self, figures: dict[str, float] | None = None) -> list[Done]:
        return [Done(target, self.running.hexdigest(), figures) for target in self.unit.targets]


def _not_finite(unit: Unit) -> NumericError:
    if unit.action == "cast":
        return NumericError(
            f"{unit.name} does not fit {unit.spec.dtype}: it overflows to Inf", "Choose another --dtype."
        )
    return NumericError(
        f"{unit.name}: the merged weight holds NaN or Inf in {unit.spec.dtype}",
        "Use a smaller --strength, or an output --dtype with a wider range.",
    )


def _unchanged(safety: Delta, tasks: Sequence[Delta], weights: Sequence[float]) -> bool:
    return safety.is_zero and len(tasks) == 1 and weights[0] == 1.0


def _cast(unit: Unit, run: Run, shards: Shards, workspace: Workspace) -> list[Done]:
    output = _Output(unit, shards, workspace)
    for part in run.fine.layout.chunks(unit.name, workspace, "cast.in"):
        output.put(part)
    return output.done()
