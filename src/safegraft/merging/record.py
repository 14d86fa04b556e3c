"""What a merge leaves beside the weights: the manifest's content, and the files taken over from its inputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..manifest import digest_of, new_manifest
from ..tensors.calibration import Calibration
from ..tensors.finetune import FineTune
from ..tensors.mask import Mask
from ..tensors.vector import SafetyVector
from .lineage import layer_ratios
from .survey import Survey

if TYPE_CHECKING:
    from .run import MergeSummary, Prepared

KIND = "safegraft merged model"


def merge_manifest(
    ready: Prepared, found: Survey, summary: MergeSummary, given: list[str], started: float
) -> dict[str, Any]:
    """The manifest without its outputs, which the writer adds. ``given``: settings the user named."""
    config, fine = ready.config, ready.fine
    digests = found.digests()
    manifest = new_manifest(
        KIND,
        config=config.model_dump(exclude={"resume", "force"})
        | {
            "params": ready.params.model_dump(),
            "strength": ready.strength,
            "match_norm": ready.match_norm,
        },
        given=given,
        seed=0,
        started=started,
        inputs={
            **fine_tunes(fine, found),
            "base": {"name": fine.base.label, "sha256": digests["base"]},
            **_vector_input(ready.vector),
            **_calibration_input(ready),
            **_mask_input(ready.mask),
        },
    )
    manifest["result"] = {
        "alpha": summary.alpha,
        "task_norm": summary.task_norm,
        "safety_norm": summary.safety_norm,
        "cosine": summary.cosine,
        "mean_kept": summary.mean_kept,
        "layer_ratios": layer_ratios(found),
        "warnings": summary.warnings,
        "notes": summary.notes,
        "tensors": {n: {k: v if math.isfinite(v) else None for k, v in f.items()} for n, f in summary.tensors.items()},
    }
    return manifest


def fingerprints(
    fine: FineTune, vector: SafetyVector | None, calibration: Calibration | None = None, mask: Mask | None = None
) -> dict[str, Any]:
    """Enough of all inputs to notice that one is not what it was, or not the same on another machine."""
    known = vector.manifest.get("outputs", {}).get("tensors") if vector else None
    measured = calibration.manifest["outputs"] if calibration else None
    found = {"inputs": fine.fingerprints(), "vector": known, "calibration": measured}
    return found if mask is None else found | {"mask": mask.manifest["outputs"]}


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files of ``folder`` that belong to a tokenizer or chat template."""
    starts = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges")
    return sorted(p.name for p in folder.iterdir() if p.is_file() and p.name.startswith(starts))


def adapter_sidecars(fine: FineTune) -> list[tuple[Path, str]]:
    """The tokenizer beside an adapter, and the README of what was merged."""
    source = fine.adapter.path if fine.adapter else fine.layout.path
    found = [(source / n, n) for n in tokenizer_files(source)] if fine.adapter else []
    if (source / "README.md").exists():
        found.append((source / "README.md", "README.finetune.md"))
    return found


def fine_tunes(fine: FineTune, found: Survey) -> dict[str, Any]:
    """The fine-tunes among a manifest's inputs."""
    digests = [found.digests()["model"], *found.other_sha256]
    weights = dict(zip((id(one) for one in (fine, *fine.others)), fine.weights, strict=True))
    ordered = [fine, *sorted(fine.others, key=lambda other: other.adapter is None)]  # as Survey.other_sha256
    return {
        f"model {i}" if i > 1 else "model": {
            "name": one.label, "sha256": digest, "adapter": one.adapter is not None, "weight": weights[id(one)],
        }
        for i, (one, digest) in enumerate(zip(ordered, digests, strict=True), 1)
    }  # fmt: skip


def _vector_input(vector: SafetyVector | None) -> dict[str, Any]:
    if vector is None:
        return {}
    about = vector.manifest
    digest = digest_of(about["outputs"]["tensors"])
    return {
        "vector": {
            "name": vector.label, "sha256": digest, "inputs": about["inputs"], "config": about["config"],
        }
    }  # fmt: skip


def _calibration_input(ready: Prepared) -> dict[str, Any]:
    if ready.calibration is None:
        return {}
    about = ready.calibration.manifest
    digest = digest_of(about["outputs"]["tensors"])
    return {
        "calibration": {
            "name": ready.calibration.label, "sha256": digest, "inputs": about["inputs"], "config": about["config"],
        }
    }  # fmt: skip


def _mask_input(mask: Mask | None) -> dict[str, Any]:
    if mask is None:
        return {}
    about = mask.manifest
    digest = digest_of(about["outputs"]["tensors"])
    return {
        "mask": {"name": mask.label, "sha256": digest, "inputs": about["inputs"], "config": about["config"]},
    }


def renamed_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with every dtype it names set to ``dtype``: transformers loads in that one, whatever is stored."""
    out = {k: dtype if k in ("dtype", "torch_dtype") else v for k, v in values.items()}
    return {k: renamed_dtype(v, dtype) if k == "text_config" and isinstance(v, dict) else v for k, v in out.items()}
