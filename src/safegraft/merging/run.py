"""One merge from settings to a finished folder."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import MergeConfig
from ..errors import ConfigError, LineageError, SafegraftError
from ..hardware import memory_of
from ..manifest import digest_of, peak_memory
from ..tensors.calibration import Calibration
from ..tensors.checkpoint import INDEX
from ..tensors.devices import devices_of
from ..tensors.finetune import FineTune
from ..tensors.lowrank import Delta
from ..tensors.mask import Mask
from ..tensors.source import CPU, Workspace
from ..tensors.vector import SafetyVector
from ..tensors.writer import OutputFolder, check_free
from . import methods as _methods
from .adapters import adapter_config, adapter_tensors, pieces, require_adaptable, write_adapter
from .calibrated import calibrated, calibration_doubts, calibration_notes, require_calibration_alone
from .card import model_card
from .execute import Run, execute, execute_at_once, merge_tensor
from .lineage import cosine, doubts
from .masked import mask_doubts, mask_notes, masked, require_mask_alone, settled
from .method import METHODS, GlobalStats, Merged, Method
from .plan import MEMORY_SHARE, PROCESS_BYTES, Plan, index_of, make_plan, most_workers
from .ray import Cluster, require_ray
from .record import adapter_sidecars, fingerprints, merge_manifest, renamed_dtype, tokenizer_files
from .survey import Survey, survey

_ = _methods

Report = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); stages are "survey" and "merge"."""


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did.

    Attributes:
        out: the finished folder. alpha: the factor the vector was scaled by. task_norm, safety_norm: ‖τ‖₂, ‖Δ‖₂.
        tensors: per merged tensor the method's figures and ``ratio`` = ‖s‖/‖τ‖ after damping (inf where τ is zero).
        copied, merged: numbers of tensors. bytes: size of the shards. seconds, peak_memory_bytes: what it cost.
        warnings: doubts about the inputs. notes: what was done about differing vocabularies.
    """

    out: Path
    method: str
    strength: float
    match_norm: bool
    alpha: float
    task_norm: float
    safety_norm: float
    cosine: float | None
    tensors: dict[str, dict[str, float]]
    copied: int
    merged: int
    bytes: int
    seconds: float
    peak_memory_bytes: int
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def mean_kept(self) -> float | None:
        """Mean share of ‖s‖ that was added, over the tensors (the published method's weight w); None for methods that
        do not damp."""
        kept = [f["kept"] for f in self.tensors.values() if "kept" in f]
        return statistics.fmean(kept) if kept else None


@dataclass(frozen=True)
class Prepared:
    """Inputs opened and matched, and the plan: all that ``--dry-run`` needs."""

    config: MergeConfig
    fine: FineTune
    vector: SafetyVector | None
    method: Method
    params: Any
    strength: float
    match_norm: bool
    plan: Plan
    workers: int
    calibration: Calibration | None = None
    mask: Mask | None = None
    devices: Sequence[torch.device] = (CPU,)

    @property
    def at_once(self) -> bool:
        """Whether one pass over the inputs does: nothing that is written depends on a figure over all tensors, and
        nobody asked for doubts before the work."""
        pieces = all(unit.in_pieces for unit in self.plan.units if unit.action == "merge")
        plain = self.vector is None and self.method.needs == "vector" and not self.config.strict and not self.config.ray
        return plain and pieces and self.method.local

    def peak_bytes(self) -> int:
        return self.plan.peak_bytes(self.workers)


def prepare(config: MergeConfig) -> Prepared:
    """Open and check every input (headers only) and plan the output.

    Raises:
        ConfigError, CheckpointError, MismatchError: see safegraft.errors.
    """
    method = METHODS.get(config.method)
    params = method.parameters(config.params)
    _require_taken(config, method)
    devices = devices_of(config.device)
    if config.ray:
        require_ray()
    calibration = None if config.calibration is None else Calibration(config.calibration)
    mask = None if config.mask is None else Mask(config.mask)
    vector = (
        None
        if config.vector is None
        else SafetyVector(config.vector, config.scope, directions=method.directions(params))
    )
    fine = FineTune.open(config.models, config.base, vector, config.weights)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    strength = method.strength if config.strength is None else config.strength
    match_norm = method.match_norm if config.match_norm is None else config.match_norm
    hessians = None if calibration is None else calibrated(fine, calibration)
    if mask is not None:
        params = settled(params, fine, mask)
    decided = () if mask is None else masked(fine, mask)
    plan = make_plan(fine, vector, dtype, hessians, decided, entrywise=method.entrywise)
    workers = config.workers or _workers(plan, devices)
    return Prepared(
        config, fine, vector, method, params, strength, match_norm, plan, workers, calibration, mask, devices
    )


def _workers(plan: Plan, devices: Sequence[torch.device]) -> int:
    """One a core, and two a GPU at least, but no more than the memory holds."""
    count = os.cpu_count() or 1
    if devices != (CPU,):
        count = max(count, 2 * len(devices))
    return most_workers((u.working_set for u in plan.units), int(MEMORY_SHARE * memory_of(CPU)) - PROCESS_BYTES, count)


def _require_taken(config: MergeConfig, method: Method) -> None:
    """Raise ConfigError for inputs that ``method`` cannot use."""
    fusing = ", ".join(name for name, known in METHODS if known.fuses)
    if not method.fuses and (len(config.models) > 1 or config.weights not in (None, [1.0])):
        raise ConfigError(
            f"{method.name} takes one fine-tune at weight 1, not {len(config.models)} with weights {config.weights}",
            f"Methods that fuse several: {fusing}.",
        )
    if method.needs == "calibration":
        require_calibration_alone(config, method)
    if method.needs == "mask":
        require_mask_alone(config, method)
    if config.mask is not None and method.needs != "mask":
        raise ConfigError(f"{method.name} uses no mask", "Leave out --mask, or say --method somf.")
    if config.calibration is not None and method.needs != "calibration":
        raise ConfigError(f"{method.name} uses no calibration", "Leave out --calibration, or say --method safe_delta.")
    if method.needs != "vector":
        return
    if config.vector is None and not (method.fuses and (len(config.models) > 1 or config.weights)):
        raise ConfigError(
            "the vector is missing",
            f"Name it with --vector. Only several fine-tunes can be merged without one, by {fusing}.",
        )


def scale(strength: float, found: Survey, *, match_norm: bool = True, safety_norm: float | None = None) -> float:
    """α of s = αΔ: ``strength · ‖τ‖₂ / ‖Δ‖₂`` (EnchTable's coarse scale), or ``strength``; 0 for a zero vector.

    ``safety_norm``: ‖Δ‖₂ where only a part of the surveyed vector is taken."""
    norm = found.safety_norm if safety_norm is None else safety_norm
    if not norm:
        return 0.0
    return strength * found.task_norm / norm if match_norm else strength


def run_merge(config: MergeConfig, given: list[str], progress: Report | None = None) -> MergeSummary:
    """Merge and write the output. Raises whatever ``prepare`` raises, NumericError, OutputError, LineageError."""
    started = time.time()
    ready = prepare(config)
    if config.as_adapter:
        return _run_as_adapter(ready, given, progress, started)
    plan, fine, vector = ready.plan, ready.fine, ready.vector
    identity = digest_of(
        {
            "config": config.model_dump(exclude={"out", "workers", "ray", "resume", "force", "strict"}),
            **fingerprints(fine, vector, ready.calibration, ready.mask),
        }
    )
    folder = OutputFolder(Path(config.out), plan.layouts, identity=identity, force=config.force, resume=config.resume)
    with folder, Cluster(config.ray, ready.workers) if config.ray else nullcontext() as cluster:
        at_once = ready.at_once and folder.noted("survey") is None
        if at_once:
            found, stats = Survey({}), GlobalStats(math.nan, math.nan, 0.0)
        else:
            found = _surveyed(ready, folder, progress)
            warnings, stats = _doubts(ready, found), _stats(ready, found)
        run = Run(
            fine, vector, ready.method, ready.params, found, stats, ready.devices, calibration=ready.calibration,
            mask=ready.mask,
        )  # fmt: skip
        count = _counter(progress, "merge", plan.output_bytes)
        if at_once:
            found, figures = execute_at_once(plan, run, folder, ready.workers, count)
            warnings, stats = _doubts(ready, found), _stats(ready, found)
        elif cluster is None:
            figures = execute(plan, run, folder, ready.workers, count)
        else:
            figures = cluster.execute(plan, run, folder, count)
        merged = sum(u.action == "merge" for u in plan.units)
        summary = _summary(ready, found, stats, figures, merged, plan.output_bytes, warnings, started)
        _finish(ready, folder, found, summary, given, started, cluster.about if cluster else None)
    return summary


def _run_as_adapter(ready: Prepared, given: list[str], progress: Report | None, started: float) -> MergeSummary:
    config, fine, vector = ready.config, ready.fine, ready.vector
    assert vector is not None
    out, names = Path(config.out), list(fine.pairing.deltas)
    require_adaptable(fine, names, config.rank, low_rank=vector.rank is not None)
    check_free(out, force=config.force)
    total = sum(fine.layout.spec(n).nbytes for n in fine.layout.names())
    found = survey(fine, vector, ready.workers, _counter(progress, "survey", total))
    warnings, stats = _doubts(ready, found), _stats(ready, found)
    count = _counter(progress, "merge", sum(fine.layout.spec(n).nbytes for n in names))

    def merged(name: str, workspace: Workspace) -> tuple[Delta, Merged | None]:
        base, (task,) = fine.read(name, workspace)
        if name not in fine.pairing.deltas:
            return task, None
        safety = fine.safety(name, vector, workspace).scaled(stats.alpha)
        answer = merge_tensor(ready.method, ready.params, stats, name=name, base=base, tasks=[task], safety=safety)
        if count:
            count(name, fine.layout.spec(name).nbytes)
        return task, answer

    own = None if vector.rank is None else 2 * vector.rank
    parts = pieces(fine, names, merged, config.rank, own, ready.workers)
    if not parts:
        raise ConfigError("the adapter would change nothing", "Give a larger --strength or another vector.")
    figures = {p.name: dict(p.figures) for p in parts}
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    tensors = adapter_tensors(fine, parts, dtype)
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    summary = _summary(ready, found, stats, figures, len(parts), nbytes, warnings, started)
    write_adapter(
        out, tensors, adapter_config(fine, parts), merge_manifest(ready, found, summary, given, started),
        texts={"README.md": model_card(fine, ready.method, summary)},
        sidecars=adapter_sidecars(fine), force=config.force,
    )  # fmt: skip
    return summary


def _doubts(ready: Prepared, found: Survey) -> list[str]:
    warnings = doubts(found) + calibration_doubts(ready.fine, found, ready.calibration)
    warnings += mask_doubts(ready.fine, found, ready.mask, ready.params)
    if ready.vector is not None:
        warnings += ready.vector.doubts()
    if warnings and ready.config.strict:
        raise LineageError("\n".join(warnings), "Give the right --base, or leave out --strict to go on anyway.")
    return warnings


def _stats(ready: Prepared, found: Survey) -> GlobalStats:
    alpha = scale(ready.strength, found, match_norm=ready.match_norm)
    if ready.method.needs != "vector":
        alpha = ready.strength
    return GlobalStats(found.task_norm, found.safety_norm, alpha)


def _summary(
    ready: Prepared,
    found: Survey,
    stats: GlobalStats,
    figures: dict[str, dict[str, float]],
    merged: int,
    nbytes: int,
    warnings: list[str],
    started: float,
) -> MergeSummary:
    for name, values in figures.items() if ready.method.needs == "vector" else ():
        _add_ratio(values, name, found, stats)
    return MergeSummary(
        out=Path(ready.config.out), method=ready.config.method, strength=ready.strength, match_norm=ready.match_norm,
        alpha=stats.alpha, task_norm=stats.task_norm, safety_norm=stats.safety_norm, cosine=cosine(found),
        tensors=figures, copied=0 if ready.config.as_adapter else len(ready.plan.units) - merged, merged=merged,
        bytes=nbytes, seconds=time.time() - started, peak_memory_bytes=peak_memory(), warnings=warnings,
        notes=[
            *ready.plan.notes, *calibration_notes(ready.plan, ready.calibration), *mask_notes(ready.plan, ready.mask),
        ],
    )  # fmt: skip


def _surveyed(ready: Prepared, folder: OutputFolder, progress: Report | None) -> Survey:
    known = folder.noted("survey")
    if known is not None:
        return Survey.from_json(known)
    total = sum(ready.fine.layout.spec(n).nbytes for n in ready.fine.layout.names())
    found = survey(ready.fine, ready.vector, ready.workers, _counter(progress, "survey", total))
    folder.note("survey", found.to_json())
    return found


def _add_ratio(values: dict[str, float], name: str, found: Survey, stats: GlobalStats) -> None:
    tensor = found.tensors[name]
    safety, task = math.sqrt(tensor.safety_sq) * stats.alpha, math.sqrt(tensor.task_sq)
    added = safety * values.get("kept", 1.0)
    values["ratio"] = added / task if task else math.inf if added else 0.0


def _finish(
    ready: Prepared,
    folder: OutputFolder,
    found: Survey,
    summary: MergeSummary,
    given: list[str],
    started: float,
    ray: dict[str, Any] | None,
) -> None:
    config, fine = ready.config, ready.fine
    layout = fine.layout
    index = None
    if layout.index is not None or len(ready.plan.layouts) > 1:
        index = index_of(ready.plan.layouts, dict((layout.index or {}).get("metadata") or {}))
    sidecars = [(layout.path / p, str(p)) for p in layout.sidecars()]
    if fine.adapter:
        extra = tokenizer_files(fine.adapter.path)
        sidecars = [(s, n) for s, n in sidecars if n not in extra] + [(fine.adapter.path / n, n) for n in extra]
    source = fine.adapter.path if fine.adapter else layout.path
    if (source / "README.md").exists():
        sidecars.append((source / "README.md", "README.finetune.md"))
    texts = {"README.md": model_card(fine, ready.method, summary)}
    if config.dtype is not None and renamed_dtype(layout.config, config.dtype) != layout.config:
        texts["config.json"] = json.dumps(renamed_dtype(layout.config, config.dtype), indent=2) + "\n"
    manifest = merge_manifest(ready, found, summary, given, started)
    if ray is not None:
        manifest["run"]["ray"] = ray
    if ready.devices != (CPU,):
        manifest["run"]["gpus"] = [torch.cuda.get_device_name(device) for device in ready.devices]
    folder.finish(manifest, index=index, sidecars=sidecars, texts=texts)


def _counter(progress: Report | None, stage: str, total: int) -> Callable[[str, int], None] | None:
    if progress is None:
        return None
    done = 0

    def count(_: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(stage, min(done, total), total)

    return count


def merge(
    model: str | Path | Sequence[str | Path],
    vector: str | Path | None,
    out: str | Path,
    *,
    base: str | Path | None = None,
    progress: Report | None = None,
    **settings: Any,
) -> MergeSummary:
    """Put a safety vector into a fine-tune and write the result to ``out``.

    Args:
        model: the fine-tune (folder or Hub id), or a LoRA adapter; several of one base for methods that fuse.
        base: what it was fine-tuned from; an adapter's config may name it. vector: a safety vector's folder; None
            only where several fine-tunes are fused, or with a calibration or a mask. out: the folder to write.
        progress: called with (stage, bytes done, bytes in all).
        **settings: the other fields of safegraft.config.MergeConfig: method, strength (≥ 0), match_norm, weights,
            calibration, mask, params, dtype, device, workers, ray, resume, force, strict.

    Returns:
        MergeSummary.

    Raises:
        ConfigError: a setting is wrong. CheckpointError: an input cannot be read or is of a refused kind.
        MismatchError: inputs do not fit together. LineageError: with strict, the base is not the parent.
        NumericError: NaN or Inf. OutputError: ``out`` exists or cannot be written.

    Source: EnchTable, arXiv:2511.09880, section on interference-aware merging.
    """
    from ..config import load

    models = str(model) if isinstance(model, str | Path) else [str(m) for m in model]
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    given: dict[str, Any] = {"model": models, "out": str(out), **chosen}
    if vector is not None:
        given["vector"] = str(vector)
    if base is not None:
        given["base"] = str(base)
    return run_merge(load(MergeConfig, None, given), sorted(given), progress)


__all__ = ["INDEX", "MergeSummary", "Prepared", "SafegraftError", "merge", "prepare", "run_merge", "scale"]
