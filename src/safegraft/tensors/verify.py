"""Is a written model or adapter whole? Header, index, tied weights, finite numbers, digests, and who would load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .adapter import WEIGHTS, is_adapter
from .checkpoint import Checkpoint
from .files import ShardFile
from .serving import vllm_adapter, vllm_model
from .shards import sha256
from .source import Workspace, all_finite, as_bytes


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``passed`` is None where there was nothing to hold it against."""

    name: str
    passed: bool | None
    detail: str


def verify(path: str | Path, *, load: bool = True, progress: Callable[[int, int], None] | None = None) -> list[Check]:
    """Check a model's or adapter's folder, whether Safegraft wrote it or not.

    Args:
        path: the folder. load: also build it in transformers on the meta device (no memory, no weights read).
        progress: called with (bytes read, bytes in all).

    Returns:
        One Check for each of: header, index, tied weights, finite, digests, vLLM, transformers; of an adapter header,
        finite, digests, vLLM. That vLLM would not take it is not held against it.

    Raises:
        CheckpointError: there is nothing there to check.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {path}")
    if is_adapter(folder):
        return _adapter(folder)
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError as error:
        return [Check("header", False, str(error.args[0]))]
    manifest = _manifest(folder)
    checks = [
        Check("header", True, f"{len(checkpoint.names())} tensors in {len(checkpoint.shards)} file(s), sizes right"),
        _index(checkpoint),
    ]
    digests, broken = _read_all(checkpoint, progress)
    checks.append(_tied(checkpoint, digests))
    found = f"NaN or Inf in {', '.join(broken[:5])}" if broken else "no NaN or Inf"
    checks.append(Check("finite", not broken, found))
    checks.append(_digests(folder, checkpoint.shards, manifest, digests))
    checks.append(_vllm(*vllm_model(folder, checkpoint.config)))
    if load:
        checks.append(_loads(folder))
    return checks


def _adapter(folder: Path) -> list[Check]:
    try:
        shard = ShardFile(folder / WEIGHTS)
        taken = vllm_adapter(folder)
    except CheckpointError as error:
        return [Check("header", False, str(error.args[0]))]
    digests, broken = {}, []
    for name, entry in shard.layout.entries.items():
        tensor = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
        shard.read_into(as_bytes(tensor), entry.offset)
        digests[name] = sha256(as_bytes(tensor))
        if tensor.is_floating_point() and not all_finite(tensor):
            broken.append(name)
    return [
        Check("header", True, f"an adapter of {len(digests)} tensors, sizes right"),
        Check("finite", not broken, f"NaN or Inf in {', '.join(broken[:5])}" if broken else "no NaN or Inf"),
        _digests(folder, {WEIGHTS: shard}, _manifest(folder), digests),
        _vllm(*taken),
    ]


def _vllm(takes: bool, detail: str) -> Check:
    return Check("vLLM", True if takes else None, detail)


def _manifest(folder: Path) -> dict[str, Any] | None:
    file = folder / "manifest.json"
    if not file.exists():
        return None
    try:
        outputs = json.loads(file.read_text(encoding="utf-8")).get("outputs")
    except (ValueError, AttributeError):
        return {}
    return outputs if isinstance(outputs, dict) else None


def outputs_of(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the manifest of a finished model folder holds under ``outputs``, and the names of tensors with NaN or Inf.

    Raises:
        CheckpointError: ``folder`` holds no weights.
    """
    checkpoint = Checkpoint.open(folder)
    digests, broken = _read_all(checkpoint, None)
    headers = {name: sha256(shard.layout.header) for name, shard in checkpoint.shards.items()}
    others = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in headers]
    files = {file.name: sha256(file.read_bytes()) for file in others}
    return {"headers": headers, "tensors": digests, "files": files}, broken


def _index(checkpoint: Checkpoint) -> Check:
    if checkpoint.index is None:
        several = len(checkpoint.shards) > 1
        return Check("index", False if several else None, "several files and no index" if several else "one file")
    lost = [n for n in checkpoint.names() if n not in checkpoint.index["weight_map"]]
    if lost:
        return Check("index", False, f"{len(lost)} tensor(s) are not in it, e.g. {lost[0]}")
    return Check("index", True, "names every tensor where it is")


def _read_all(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> tuple[dict[str, str], list[str]]:
    workspace = Workspace()
    digests, broken = {}, []
    total, done = sum(checkpoint.spec(n).nbytes for n in checkpoint.names()), 0
    for name in checkpoint.names():
        running = hashlib.sha256()
        finite = True
        for part in checkpoint.chunks(name, workspace, "verify"):
            running.update(as_bytes(part))
            if part.dtype.is_floating_point and finite:
                finite = all_finite(part)
            done += part.numel() * part.dtype.itemsize
            if progress:
                progress(done, total)
        digests[name] = running.hexdigest()
        if not finite:
            broken.append(name)
    return digests, broken


def _tied(checkpoint: Checkpoint, digests: dict[str, str]) -> Check:
    apart = [head for head, embedding in checkpoint.tied.items() if digests[head] != digests[embedding]]
    if apart:
        return Check("tied weights", False, f"{apart[0]} differs from {checkpoint.tied[apart[0]]}, config says tied")
    if not checkpoint.config_value("tie_word_embeddings", False):
        return Check("tied weights", None, "config ties none")
    return Check("tied weights", True, "stored twice, equal" if checkpoint.tied else "stored once")


def _digests(
    folder: Path, shards: dict[str, ShardFile], outputs: dict[str, Any] | None, digests: dict[str, str]
) -> Check:
    if outputs is None:
        return Check("digests", None, "no manifest of Safegraft's here")
    if not outputs:
        return Check("digests", False, "manifest.json is damaged")
    wrong = [n for n, d in outputs["tensors"].items() if digests.get(n) != d]
    wrong += [n for n in digests if n not in outputs["tensors"]]
    for filename, digest in outputs["headers"].items():
        shard = shards.get(filename)
        if shard is None or sha256(shard.layout.header) != digest:
            wrong.append(f"header of {filename}")
    for filename, digest in outputs["files"].items():
        file = folder / filename
        if not file.exists() or sha256(file.read_bytes()) != digest:
            wrong.append(filename)
    if wrong:
        return Check("digests", False, f"{len(wrong)} differ from the manifest: {', '.join(wrong[:5])}")
    return Check("digests", True, f"{len(digests)} tensors and {len(outputs['files'])} files as in the manifest")


def _loads(folder: Path) -> Check:
    """Load on the meta device, where transformers matches names and shapes without reading a weight."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder)
        _, told = AutoModelForCausalLM.from_pretrained(
            folder, config=config, device_map="meta", output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Check("transformers", False, f"does not load: {first}")
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(kind):
            return Check("transformers", False, f"{kind.replace('_', ' ')}: {sorted(map(str, told[kind]))[:3]}")
    return Check("transformers", True, f"loads as {config.model_type}, no name missing or unexpected")
