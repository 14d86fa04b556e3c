"""A merge whose output is a LoRA adapter: the fine-tune's adapter with the vector inside, or the patch alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, NumericError
from ..tensors.adapter import CONFIG, WEIGHTS
from ..tensors.files import build_layout
from ..tensors.finetune import FineTune
from ..tensors.lowrank import Delta, LowRank, plus, thin_svd
from ..tensors.shards import sha256
from ..tensors.source import TensorSpec, Workspace, all_finite, as_bytes
from ..tensors.writer import OutputFolder
from .method import Merged
from .workers import parallel

PREFIX = "base_model.model."
EXACT = 1e-3
"""Share of an update's norm that may be lost where no rank was asked for: rounding of the fine-tune's weights."""
TRANSPOSED = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
"""Architectures whose linear layers store [in, out] (transformers' Conv1D); peft calls it fan_in_fan_out."""


@dataclass(frozen=True)
class Piece:
    """One weight's update ``left @ right.T`` as the output holds it, and how much truncation lost of it (0 to 1)."""

    name: str
    factors: LowRank
    figures: dict[str, float]


def require_adaptable(fine: FineTune, names: Sequence[str], rank: int | None, low_rank: bool) -> None:
    """Raise one ConfigError for everything that keeps an adapter from carrying the merge.

    Args:
        names: tensors the vector changes. rank: the one asked for. low_rank: whether the vector is stored as factors.
    """
    problems = []
    if fine.fuses:
        problems.append("several fine-tunes, or one with a weight, are no change of one adapter")
    if rank is None and not low_rank:
        problems.append("the vector is dense: say with --rank how many directions of each weight the adapter may have")
    for name in names:
        shape = fine.layout.spec(name).shape
        if len(shape) != 2 or not name.endswith(".weight"):
            problems.append(f"{name} {list(shape)} is no matrix of a linear layer")
        elif name == fine.layout.embedding():
            problems.append(f"{name} is an embedding")
        elif fine.adapter is not None and name in fine.adapter.replaced:
            problems.append(f"{name} is kept whole by the adapter (modules_to_save)")
    if problems:
        raise ConfigError(
            "an adapter cannot carry this merge:\n" + "\n".join(f"- {p}" for p in problems[:20]),
            "Write a full model instead (leave out --as-adapter), or use a vector of attention or ffn scope.",
        )


def pieces(
    fine: FineTune,
    names: Sequence[str],
    merged: Callable[[str, Workspace], tuple[Delta, Merged | None]],
    rank: int | None,
    own_rank: int | None,
    workers: int,
) -> list[Piece]:
    """The update of every linear weight the output changes; ``merged`` gives τ and the method's answer.

    For an adapter that is its own update with the vector's inside; for a full fine-tune the vector's part alone.

    Args:
        rank: the one asked for; None for all directions. own_rank: at most that many a weight of a full fine-tune's
            patch has where the method adds no more than a part of a low-rank vector, and another part of it.

    Raises:
        ConfigError: no rank is given and the method's change is no sum of factors.
    """
    own = [n for n, module in fine.adapter.lora.items() if not module.embedding] if fine.adapter else []

    def one(name: str, workspace: Workspace) -> Piece:
        task, answer = merged(name, workspace)
        figures = answer.figures if answer else {}
        if fine.adapter is not None:
            return piece(name, answer.delta if answer else plus(task, Delta(task.shape)), rank, figures)
        if answer is None:
            return Piece(name, LowRank(torch.zeros(task.shape[0], 0), torch.zeros(task.shape[1], 0)), figures)
        found = piece(name, answer.dense() - task.dense(), rank or own_rank, figures)
        if rank is None and found.figures["truncation"] > EXACT:
            raise _no_factors(name)
        return found

    found = parallel(one, dict.fromkeys([*own, *names]), workers)
    return [p for p in found if p.factors.rank]


def piece(name: str, update: Tensor | LowRank, rank: int | None, figures: dict[str, float]) -> Piece:
    """``update`` with at most ``rank`` directions; as it is, exactly, where it is low-rank and no rank is given."""
    if isinstance(update, LowRank) and (rank is None or update.rank <= rank):
        return Piece(name, update, figures | {"truncation": 0.0})
    if rank is None:
        raise _no_factors(name)
    norm = update.norm() if isinstance(update, LowRank) else float(update.double().norm())
    svd = update.svd().leading(rank) if isinstance(update, LowRank) else thin_svd(update, rank)
    root = svd.s.sqrt()
    lost = max(0.0, norm**2 - float(svd.s.double().square().sum()))
    error = math.sqrt(lost) / norm if norm else 0.0
    return Piece(name, LowRank(svd.u * root, svd.v * root), figures | {"truncation": error})


def _no_factors(name: str) -> ConfigError:
    return ConfigError(
        f"the change that this method makes to {name} is no product of a few directions",
        "Say with --rank how many each weight of the adapter may have.",
    )


def adapter_config(fine: FineTune, parts: Sequence[Piece]) -> dict[str, Any]:
    """peft's adapter_config.json for ``parts``: scaling 1 everywhere, for the factors hold it."""
    own = dict(fine.adapter.config) if fine.adapter else {}
    ranks = {p.name.removesuffix(".weight"): p.factors.rank for p in parts}
    if fine.adapter:
        stored = fine.adapter.file.layout.entries
        embeddings = {n: m for n, m in fine.adapter.lora.items() if m.embedding}
        ranks |= {n.removesuffix(".weight"): stored[m.a].spec.shape[0] for n, m in embeddings.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    odd = {module: rank for module, rank in ranks.items() if rank != common}
    return own | {
        "peft_type": "LORA",
        "task_type": own.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": (fine.adapter.base_reference or fine.base.label) if fine.adapter else fine.label,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": _transposed(fine),
    }


def adapter_tensors(fine: FineTune, parts: Sequence[Piece], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names; what the vector does not touch is the fine-tune's own.

    Args:
        dtype: of the factors; the fine-tune adapter's, or float32, if not given.

    Raises:
        NumericError: a factor does not fit the dtype.
    """
    out: dict[str, Tensor] = {}
    adapter, kind = fine.adapter, dtype or torch.float32
    if adapter is not None:
        stored = adapter.file.layout.entries
        kind = dtype or next((stored[m.a].spec.dtype for m in adapter.lora.values()), kind)
        out |= {key: adapter.tensor(key) for key in adapter.replaced.values()}
        for module in adapter.lora.values():
            if module.embedding:
                out[module.a] = adapter.tensor(module.a).to(kind)
                out[module.b] = (adapter.tensor(module.b).float() * module.scaling).to(kind)
    for part in parts:
        left, right = part.factors.left, part.factors.right
        a, b = (left.T, right) if _transposed(fine) else (right.T, left)
        module_name = f"{PREFIX}{part.name.removesuffix('.weight')}"
        out[f"{module_name}.lora_A.weight"] = a.to(kind).contiguous()
        out[f"{module_name}.lora_B.weight"] = b.to(kind).contiguous()
    for key, value in out.items():
        if not all_finite(value):
            raise NumericError(f"{key} holds NaN or Inf in {kind}", "Choose another --dtype or a smaller --strength.")
    return dict(sorted(out.items()))


def write_adapter(
    out: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    manifest: dict[str, Any],
    *,
    texts: dict[str, str],
    sidecars: Sequence[tuple[Path, str]],
    force: bool,
) -> int:
    """Write a finished adapter folder, whole or not at all. Returns the bytes of its weights. Raises OutputError."""
    layout = build_layout(
        WEIGHTS, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], {"format": "pt"}
    )
    with OutputFolder(out, [layout], identity="adapter", force=force) as folder:
        for name, tensor in tensors.items():
            data = as_bytes(tensor)
            folder.write(name, data)
            folder.done(name, sha256(data))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        folder.finish(manifest, sidecars=sidecars, texts={**texts, CONFIG: text})
    return layout.nbytes


def _transposed(fine: FineTune) -> bool:
    if fine.adapter is not None:
        return bool(fine.adapter.config.get("fan_in_fan_out"))
    return fine.layout.config_value("model_type") in TRANSPOSED
