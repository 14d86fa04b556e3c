"""One merge from settings to a finished folder."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import MergeConfig
from ..errors import ConfigError, LineageError, SafegraftError
from ..manifest import digest_of, new_manifest, peak_memory
from ..tensors.checkpoint import INDEX
from ..tensors.finetune import FineTune
from ..tensors.vector import SafetyVector
from ..tensors.writer import OutputFolder
from . import methods as _methods
from .card import model_card
from .execute import Run, execute
from .lineage import cosine, doubts, layer_ratios
from .method import METHODS, GlobalStats, Method
from .plan import Plan, index_of, make_plan
from .survey import Survey, survey

KIND = "safegraft merged model"
_ = _methods

Report = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); stages are "survey" and "merge"."""


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did.

    Attributes:
        out: the finished folder. alpha: the factor the vector was scaled by. task_norm, safety_norm: ‖τ‖₂, ‖Δ‖₂.
        tensors: per merged tensor the method's figures and ``ratio`` = ‖w·s‖/‖τ‖ (inf where τ is zero).
        copied, merged: numbers of tensors. bytes: size of the shards. seconds, peak_memory_bytes: what it cost.
        warnings: doubts about the inputs. notes: what was done about differing vocabularies.
    """

    out: Path
    method: str
    strength: float
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
    def mean_weight(self) -> float | None:
        """Mean of the tensors' weights w; None for methods without one."""
        weights = [f["weight"] for f in self.tensors.values() if "weight" in f]
        return statistics.fmean(weights) if weights else None


@dataclass(frozen=True)
class Prepared:
    """Inputs opened and matched, and the plan: all that ``--dry-run`` needs."""

    config: MergeConfig
    fine: FineTune
    vector: SafetyVector
    method: Method
    params: Any
    plan: Plan
    workers: int

    def peak_bytes(self) -> int:
        return self.plan.peak_bytes(self.workers)


def prepare(config: MergeConfig) -> Prepared:
    """Open and check every input (headers only) and plan the output.

    Raises:
        ConfigError, CheckpointError, MismatchError: see safegraft.errors.
    """
    method = METHODS.get(config.method)
    params = method.parameters(config.params)
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device {config.device!r}: torch sees no CUDA device here", "Use --device cpu.")
    vector = SafetyVector(config.vector)
    fine = FineTune.open(config.model, config.base, vector)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    workers = config.workers or os.cpu_count() or 1
    return Prepared(config, fine, vector, method, params, make_plan(fine, vector, dtype), workers)


def scale(strength: float, found: Survey) -> float:
    """``α = β · ‖τ‖₂ / ‖Δ‖₂`` (EnchTable eq. for the coarse scale); 0 for a zero vector."""
    return strength * found.task_norm / found.safety_norm if found.safety_norm else 0.0


def run_merge(config: MergeConfig, given: list[str], progress: Report | None = None) -> MergeSummary:
    """Merge and write the output. Raises whatever ``prepare`` raises, NumericError, OutputError, LineageError."""
    started = time.time()
    ready = prepare(config)
    plan, fine, vector = ready.plan, ready.fine, ready.vector
    identity = digest_of(
        {
            "config": config.model_dump(exclude={"out", "workers", "resume", "force", "strict"}),
            "inputs": fine.fingerprints(),
            "vector": vector.manifest.get("outputs", {}).get("tensors"),
        }
    )
    folder = OutputFolder(Path(config.out), plan.layouts, identity=identity, force=config.force, resume=config.resume)
    with folder:
        found = _surveyed(ready, folder, progress)
        warnings = doubts(found)
        if warnings and config.strict:
            raise LineageError("\n".join(warnings), "Give the right --base, or leave out --strict to go on anyway.")
        stats = GlobalStats(found.task_norm, found.safety_norm, scale(config.strength, found))
        run = Run(fine, vector, ready.method, ready.params, found, stats, folder, config.device, seed=0)
        figures = execute(plan, run, ready.workers, _counter(progress, "merge", plan.output_bytes))
        for name, values in figures.items():
            _add_ratio(values, name, found, stats)
        merged = sum(u.action == "merge" for u in plan.units)
        summary = MergeSummary(
            out=Path(config.out), method=config.method, strength=config.strength, alpha=stats.alpha,
            task_norm=stats.task_norm, safety_norm=stats.safety_norm, cosine=cosine(found), tensors=figures,
            copied=len(plan.units) - merged, merged=merged, bytes=plan.output_bytes,
            seconds=time.time() - started, peak_memory_bytes=peak_memory(), warnings=warnings,
            notes=list(plan.notes),
        )  # fmt: skip
        _finish(ready, folder, found, summary, given, started)
    return summary


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
    added = safety * values.get("weight", 1.0)
    values["ratio"] = added / task if task else math.inf if added else 0.0


def _finish(
    ready: Prepared, folder: OutputFolder, found: Survey, summary: MergeSummary, given: list[str], started: float
) -> None:
    config, fine = ready.config, ready.fine
    digests = found.digests()
    manifest = new_manifest(
        KIND,
        config=config.model_dump(exclude={"resume", "force"}) | {"params": ready.params.model_dump()},
        given=given,
        seed=0,
        started=started,
        inputs={
            "model": {"name": fine.label, "sha256": digests["model"], "adapter": fine.adapter is not None},
            "base": {"name": fine.base.label, "sha256": digests["base"]},
            "vector": {
                "name": ready.vector.label,
                "sha256": digest_of(ready.vector.manifest["outputs"]["tensors"]),
                "inputs": ready.vector.manifest["inputs"],
                "config": ready.vector.manifest["config"],
            },
        },
    )
    manifest["result"] = {
        "alpha": summary.alpha,
        "task_norm": summary.task_norm,
        "safety_norm": summary.safety_norm,
        "cosine": summary.cosine,
        "mean_weight": summary.mean_weight,
        "layer_ratios": layer_ratios(found),
        "warnings": summary.warnings,
        "notes": summary.notes,
        "tensors": {n: {k: v if math.isfinite(v) else None for k, v in f.items()} for n, f in summary.tensors.items()},
    }
    layout = fine.layout
    index = None
    if layout.index is not None or len(ready.plan.layouts) > 1:
        index = index_of(ready.plan.layouts, dict((layout.index or {}).get("metadata") or {}))
    sidecars = [(layout.path / p, str(p)) for p in layout.sidecars()]
    if fine.adapter:
        own = {p.name for p in fine.adapter.path.iterdir() if p.is_file()}
        extra = sorted(
            n for n in own if n.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges"))
        )
        sidecars = [(s, n) for s, n in sidecars if n not in extra] + [(fine.adapter.path / n, n) for n in extra]
    source = fine.adapter.path if fine.adapter else layout.path
    if (source / "README.md").exists():
        sidecars.append((source / "README.md", "README.finetune.md"))
    texts = {"README.md": model_card(fine, ready.method, summary)}
    if config.dtype is not None and _renamed_dtype(layout.config, config.dtype) != layout.config:
        texts["config.json"] = json.dumps(_renamed_dtype(layout.config, config.dtype), indent=2) + "\n"
    folder.finish(manifest, index=index, sidecars=sidecars, texts=texts)


def _renamed_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with every dtype it names set to ``dtype``: transformers loads in that one, whatever is stored."""
    out = {k: dtype if k in ("dtype", "torch_dtype") else v for k, v in values.items()}
    return {k: _renamed_dtype(v, dtype) if k == "text_config" and isinstance(v, dict) else v for k, v in out.items()}


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
    model: str | Path,
    vector: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    progress: Report | None = None,
    **settings: Any,
) -> MergeSummary:
    """Put a safety vector into a fine-tune and write the result to ``out``.

    Args:
        model: the fine-tune (folder or Hub id), or a LoRA adapter. base: what it was fine-tuned from; an adapter's
            config may name it. vector: a safety vector's folder. out: the folder to write.
        progress: called with (stage, bytes done, bytes in all).
        **settings: the other fields of safegraft.config.MergeConfig: method, strength (β ≥ 0, default 0.1), params,
            dtype, device, workers, resume, force, strict.

    Returns:
        MergeSummary.

    Raises:
        ConfigError: a setting is wrong. CheckpointError: an input cannot be read or is of a refused kind.
        MismatchError: inputs do not fit together. LineageError: with strict, the base is not the parent.
        NumericError: NaN or Inf. OutputError: ``out`` exists or cannot be written.

    Source: EnchTable, arXiv:2511.09880, section on interference-aware merging.
    """
    from ..config import load

    given = {"model": str(model), "vector": str(vector), "out": str(out), **settings}
    if base is not None:
        given["base"] = str(base)
    return run_merge(load(MergeConfig, None, given), sorted(given), progress)


__all__ = ["INDEX", "MergeSummary", "Prepared", "SafegraftError", "merge", "prepare", "run_merge", "scale"]
