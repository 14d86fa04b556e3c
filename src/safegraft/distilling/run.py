"""The whole job of ``safegraft vector distill``.

The surrogate is in memory. Its weights reach the disk only where the user asks for it: in a folder of his own by
``keep_surrogate``, or, with ``resumable``, as checkpoints of the trained tensors in ``OUT.surrogate`` (mode 0700),
which goes when the run succeeds and is kept when it does not, so that ``resume`` can go on from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..config import DistillConfig
from ..errors import NumericError, OutputError
from ..evaluate.models.hf import load_chat
from ..manifest import digest_of
from ..tensors.checkpoint import Checkpoint
from ..tensors.lowrank import LowRank
from ..tensors.making import Stored, family, write_vector
from ..tensors.private import remove
from ..tensors.scopes import KNOWN, parse_layers
from ..tensors.vector import SafetyVector
from ..tensors.writer import check_free
from ..train.distill import (
    Recipe,
    Surrogate,
    expand,
    is_main,
    last_checkpoint,
    prepare,
    processes,
    stored_names,
    take_device,
    train,
    weights_of,
)
from ..train.sources import STARTER, Chosen, choose, describe_bad, read_source
from ..train.working import working_folder
from .deltas import Deltas, check_stored, keep_surrogate
from .validity import Look, by_layer, findings, gaps, look, overlap

SAMPLES = 1000
"""Rows of a data set where the user does not say: the paper's."""
Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""


@dataclass(frozen=True)
class Distilled:
    """What came out. ``validity``: as in the manifest. ``warnings``: why the vector may be of no use, in words.
    ``notes``: sentences on rows, linearisation and the like."""

    vector: SafetyVector
    validity: dict[str, Any]
    warnings: list[str]
    notes: list[str]


def distill(
    config: DistillConfig, *, given: list[str] | None = None, progress: Report | None = None
) -> Distilled | None:
    """Make a safety vector as ``config`` says; None in all but the first process of a distributed run.

    Args:
        given: the settings the user gave, for the manifest. progress: see Report.

    Raises:
        UserError: anything the user can mend, before a weight is trained where it can be known by then.
    """
    report: Report = progress or (lambda what, done, total: None)
    out = Path(config.out).absolute()
    work = out.with_name(f"{out.name}.surrogate")
    aligned, probe = _check(config, out, work)
    model, tokenizer, chosen, notes = _load(config, aligned)
    layers = parse_layers(config.layers) if config.layers else None
    where: dict[str, Any] = {"scope": config.scope, "layers": layers, "names": KNOWN.extended(config.names)}
    set_seed(config.seed)  # of the LoRA factors, the same in every process
    weights = prepare(model, **where, lora_rank=config.lora_rank)
    check_stored(aligned, stored_names(model, weights))
    identity = _identity(config, aligned, chosen)

    def counted(what: str) -> Callable[[int, int], None]:
        return lambda done, total: report(what, done, total)

    def measured(what: str) -> Look:
        return look(
            model, tokenizer, chosen.items, prompts=config.check_prompts, tokens=config.check_tokens,
            progress=counted(what),
        )  # fmt: skip

    keeps = config.resumable or config.resume
    with working_folder(work, identity, keeps=keeps, resume=config.resume) as folder:
        before = measured("aligned model") if is_main() else None
        linearised = expand(model, **where) if config.linearize == "auto" else None
        notes.append(linearised.describe() if linearised else "linearised modules: none, it is off")
        surrogate = train(
            model, tokenizer, chosen.items, weights, linearised, _recipe(config, keeps), folder,
            resume=config.resume, progress=lambda step, steps, _: report("training", step, steps),
        )  # fmt: skip
        if before is None:
            return None
        apart = gaps(model, tokenizer, linearised, prompts=config.check_prompts)
        if linearised:
            linearised.remove()
        after = measured("surrogate")
        if not math.isfinite(after.loss):
            raise NumericError(f"the surrogate's loss is {after.loss}", "Lower the learning rate.")
        deltas = Deltas(aligned, weights_of(surrogate))
        warnings = findings(before, after)
        validity: dict[str, Any] = {
            "useless": bool(warnings),
            "warnings": warnings,
            "before": before.to_json(),
            "after": after.to_json(),
            "first_loss": surrogate.losses[0],
            "last_loss": surrogate.losses[-1],
            "linearised": linearised.ways if linearised else {},
            "gap": apart,
            "gap_by_layer": by_layer(apart),
        }
        if probe is not None:
            validity["probe"] = {"name": probe.label, **overlap(probe, aligned, deltas.shapes, deltas.change)}
        if config.keep_surrogate:
            keep_surrogate(surrogate.model, tokenizer, Path(config.keep_surrogate), force=config.force)
        vector = _write(config, out, aligned, deltas, surrogate, chosen, validity, identity, given, report)
    return Distilled(vector, vector.manifest["validity"], warnings, notes)


def _check(config: DistillConfig, out: Path, work: Path) -> tuple[Checkpoint, Checkpoint | None]:
    """Everything that can be refused before a model is loaded."""
    Stored(config.lora_rank, config.keep)
    KNOWN.extended(config.names)
    if config.layers:
        parse_layers(config.layers)
    _recipe(config, False).per_device(processes())
    check_free(out, force=config.force)
    left = out.with_name(f"{out.name}.partial")
    if left.exists() and not config.force and not config.resume:
        raise OutputError(f"{left} is there from a run that did not finish", "Remove it with --force.")
    if last_checkpoint(work) is not None and not config.resume and not config.force:
        raise OutputError(
            f"{work} holds the checkpoints of a run that did not finish",
            "Go on with --resume, or start again and remove them with --force.",
        )
    if config.resume and last_checkpoint(work) is None:
        raise OutputError(
            f"{work} holds no checkpoint to go on from",
            "Only a run with --resumable keeps any. Start again without --resume.",
        )
    if config.keep_surrogate:
        check_free(Path(config.keep_surrogate), force=config.force)
    return Checkpoint.open(config.aligned), Checkpoint.open(config.probe) if config.probe else None


def _load(config: DistillConfig, aligned: Checkpoint) -> tuple[Any, Any, Chosen, list[str]]:
    source = read_source(config.data, seed=config.seed)
    samples = config.samples or (None if config.data == STARTER else SAMPLES)
    take_device()
    model, tokenizer = load_chat(aligned.path)
    chosen = choose(
        source, tokenizer, samples=samples, allow_fewer=config.allow_fewer, max_length=config.max_length,
        seed=config.seed,
    )  # fmt: skip
    notes = [f"{len(chosen.pairs)} rows of {source.label}", *source.notes]
    if chosen.bad:
        notes.append(f"{len(chosen.bad)} row(s) cannot be used:\n{describe_bad(chosen.bad)}")
    return model, tokenizer, chosen, notes


def _recipe(config: DistillConfig, keeps: bool) -> Recipe:
    return Recipe(
        epochs=config.epochs,
        lr=config.lr,
        batch=config.batch,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        max_length=config.max_length,
        micro_batch=config.micro_batch,
        precision=config.precision,
        checkpoints=config.gradient_checkpointing,
        save_steps=config.save_steps if keeps else 0,
        seed=config.seed,
    )


_NO_MATTER = {"out", "resume", "force", "resumable", "save_steps", "keep_surrogate", "probe", "allow_fewer"}


def _identity(config: DistillConfig, aligned: Checkpoint, chosen: Chosen) -> dict[str, Any]:
    """What decides the result, as far as it is known before training."""
    settings = {k: v for k, v in config.model_dump().items() if k not in _NO_MATTER}
    rows = digest_of([asdict(pair) for pair in chosen.pairs])
    return {"settings": settings, "rows": rows, "model": aligned.config, "processes": processes()}


def _write(
    config: DistillConfig,
    out: Path,
    aligned: Checkpoint,
    deltas: Deltas,
    surrogate: Surrogate,
    chosen: Chosen,
    validity: dict[str, Any],
    identity: dict[str, Any],
    given: list[str] | None,
    report: Report,
) -> SafetyVector:
    low = next((d for d in deltas.surrogate.values() if isinstance(d, LowRank)), None)
    stored = Stored(None if low is None else low.rank, config.keep)
    remove(out.with_name(f"{out.name}.partial"))
    settings: dict[str, Any] = {"scope": config.scope, "rank": stored.rank, "keep": config.keep, "method": "distill"}
    if config.layers:
        settings["layers"] = list(parse_layers(config.layers))
    done = iter(range(1, len(deltas.shapes) + 1))

    def complete(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
        ranks = [t["effective_rank"] for t in table.values() if t.get("effective_rank")]
        norm = sum(t["norm"] ** 2 for t in table.values()) ** 0.5
        mean = sum(ranks) / len(ranks) if ranks else None
        settled = config.model_dump(exclude={"out", "resume", "force", "resumable", "save_steps"})
        return {"validity": validity | {"norm": norm, "effective_rank": mean}, "config": settings | settled}

    return write_vector(
        out,
        deltas.shapes,
        deltas.change,
        stored,
        settings=settings,
        identity=identity,
        inputs={
            "aligned": {
                "name": aligned.label,
                "sha256": digest_of(deltas.digests["aligned"]),
                "config": family(aligned),
            },
            "unaligned": {
                "name": config.keep_surrogate or "a surrogate of it, trained for this and not kept",
                "sha256": digest_of(deltas.digests["unaligned"]),
            },
        },
        full_norm=deltas.norm,
        provenance={
            "surrogate": "the aligned model, trained in scope on the rows' answers",
            "paper": "arXiv:2511.09880",
            "data": config.data,
            "rows": len(chosen.pairs),
            "rows_sha256": identity["rows"],
            "bad_rows": len(chosen.bad),
            "steps": surrogate.steps,
            "tokens": surrogate.tokens,
            "trained": surrogate.trained,
            "processes": processes(),
        },
        more=complete,
        given=given,
        seed=config.seed,
        force=config.force,
        written=lambda _: report("writing", next(done), len(deltas.shapes)),
    )
