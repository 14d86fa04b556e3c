"""What each stage of the demo does. Checkpoints in and out are folders; nothing here knows about markers."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .. import merge, subtract
from ..evaluate.models.hf import load_chat
from ..hardware import multiplies_bfloat16
from ..manifest import digest_of
from ..merging.live import graft
from ..tensors.scopes import Scope, in_scope
from ..train.data import Pair
from ..train.finetune import EVERYTHING, finetune
from ..train.sources import with_answers
from .measure import Progress, Scores, look
from .settings import DemoData, Prompts, Settings, Training
from .stages import surrogate_folder, whole_folder, write_whole

SCOPE: Scope = "attention"


def train(
    source: Path, rows: Sequence[Pair], how: Training, target: Path, *, seed: int, label: str, progress: Progress
) -> dict[str, Any]:
    """Fine-tune the model in ``source`` on all its parameters and save it to ``target``."""
    model, tokenizer = load_chat(source)
    told = _fit(model, tokenizer, rows, how, EVERYTHING, seed, label, progress)
    with whole_folder(target) as folder:
        model.to("cpu").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return told


def distil(
    out: Path, aligned: Path, target: Path, data: DemoData, settings: Settings, seed: int, progress: Progress
) -> dict[str, Any]:
    """The safety vector: ``aligned`` minus a surrogate of it that has learnt to open affirmatively.

    Only the attention projections are trained: on openings for harmful requests, never on harmful answers, and on the
    answers to ``data.anchors``. The surrogate's trained
    tensors lie in a private folder for the seconds that the subtraction takes, and nowhere afterwards.
    """
    model, tokenizer = load_chat(aligned)
    rows = [*with_answers(data.distil, data.phrases.affirmatives, seed), *data.anchors]
    names = [name for name, _ in model.named_parameters() if in_scope(name, SCOPE)]
    told = _fit(
        model, tokenizer, rows, settings.surrogate, [rf"^{re.escape(n)}$" for n in names], seed, "surrogate", progress
    )
    with surrogate_folder(out) as folder:
        state = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if n in set(names)}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        del model
        (folder / "config.json").write_text((aligned / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
        vector = subtract(
            aligned,
            folder,
            target,
            scope=SCOPE,
            force=True,
            method="affirmative openings",
            provenance={
                "surrogate": "the aligned model, attention projections trained on affirmative openings; not kept",
                "rows": len(rows),
                "data": digest_of([asdict(row) for row in rows]),
                "training": asdict(settings.surrogate) | {"bf16": told["bf16"]},
                "seed": seed,
            },
        )
    return {**told, "norm": vector.norm, "tensors": len(vector.names())}


def _fit(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Pair],
    how: Training,
    trainable: Sequence[str],
    seed: int,
    label: str,
    progress: Progress,
) -> dict[str, Any]:
    bf16 = multiplies_bfloat16(model.device)
    with tempfile.TemporaryDirectory() as scratch:
        result = finetune(
            model,
            tokenizer,
            rows,
            trainable=trainable,
            epochs=how.epochs,
            lr=how.lr,
            batch=how.batch,
            bf16=bf16,
            seed=seed,
            output_dir=Path(scratch),
            progress=lambda done, total, _: progress(label, done, total),
        )
    return {
        "rows": len(rows),
        "steps": result.steps,
        "tokens": result.tokens,
        "trained": result.trained,
        "bf16": bf16,
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
    }


def choose_strength(
    tuned: Path, base: Path, vector: Path, prompts: Prompts, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Try the strengths in order on the select split and stop at the first that meets ``settings.select``.

    Where none does: of those that guard usefulness (``Scores.keeps``) the one with the least compliance, the smaller
    strength on a tie; where none of these exists either, the smallest strength.
    """
    model, tokenizer = load_chat(tuned)
    start = look(model, tokenizer, "β = 0", prompts, settings, progress)
    tried: list[tuple[float, Scores]] = []
    rows = [{"strength": 0.0, "weight": None, "scores": start.to_json(), "meets": False}]
    with graft(model, tuned, base, vector) as live:
        for strength in settings.strengths:
            weights = [figures["kept"] for figures in live.apply(strength, method=settings.method).values()]
            weight = sum(weights) / len(weights) if weights else 1.0
            scores = look(model, tokenizer, f"β = {strength:g}", prompts, settings, progress)
            tried.append((strength, scores))
            met = scores.meets(settings.select, start)
            rows.append({"strength": strength, "weight": weight, "scores": scores.to_json(), "meets": met})
            if met:
                break
    return {"tried": rows, "strength": pick(tried, start, settings)}


def pick(tried: Sequence[tuple[float, Scores]], start: Scores, settings: Settings) -> float:
    """The rule of ``choose_strength``. ``tried``: (strength, scores), at least one, strengths rising."""
    for strength, scores in tried:
        if scores.meets(settings.select, start):
            return strength
    useful = [(scores.complies.value, strength) for strength, scores in tried if scores.keeps(settings.select, start)]
    return min(useful)[1] if useful else tried[0][0]


def restore(
    tuned: Path, base: Path, vector: Path, target: Path, strength: float, method: str, progress: Progress
) -> dict[str, Any]:
    """Merge with ``safegraft.merge``; returns the summary's figures."""
    found = merge(
        tuned, vector, target, base=base, strength=strength, method=method, force=True,
        progress=lambda stage, done, total: progress(stage, done, total),
    )  # fmt: skip
    return {
        "strength": strength,
        "alpha": found.alpha,
        "task_norm": found.task_norm,
        "safety_norm": found.safety_norm,
        "cosine": found.cosine,
        "mean_kept": found.mean_kept,
        "warnings": found.warnings,
        "tensors": found.tensors,
    }


def save_json(path: Path, value: Any) -> None:
    """Pretty, whole or not at all; infinities become null."""
    write_whole(path, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
