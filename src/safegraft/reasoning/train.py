"""The whole job of ``safegraft safekey train``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..config import SafeKeyConfig
from ..errors import ConfigError, NumericError, OutputError
from ..evaluate.models.hf import load_chat
from ..manifest import digest_of, folder_digest, new_manifest
from ..tensors.checkpoint import Checkpoint
from ..tensors.private import private_folder
from ..tensors.verify import outputs_of
from ..tensors.writer import check_free, replace_folder, write_whole
from ..train.distill import is_main, last_checkpoint, prepare, processes, take_device
from ..train.safekey.losses import TERMS, Weights
from ..train.safekey.spans import RowError, Spanned, add_think_template, frame_of, spanned
from ..train.safekey.trainer import SafeKeyRecipe, Trained, train_safekey
from ..train.working import working_folder
from .heads import write_heads
from .traces import Annotated, read_annotated

KIND = "safegraft safekey model"
LOG = "training_log.jsonl"
Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""


@dataclass(frozen=True)
class Outcome:
    """``manifest``: of the written folder. ``notes``: sentences on rows that were left out and the like."""

    manifest: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class _Rows:
    """Rows to train on, in tokens, and those that cannot be, ``(id, why)``. ``refused``: by the annotator before."""

    items: list[Spanned]
    bad: list[tuple[str, str]]
    refused: int


def train(config: SafeKeyConfig, *, given: Sequence[str] = (), progress: Report | None = None) -> Outcome | None:
    """Train a reasoning model as ``config`` says; None in all but the first process of a distributed run.

    ``out`` is a plain checkpoint, whatever was trained: LoRA is added to the weights, the heads are left out.

    Args:
        given: the settings the user gave, for the manifest. progress: see Report.

    Raises:
        UserError: anything the user can mend, before a weight is trained where it can be known by then.
    """
    report: Report = progress or (lambda what, done, total: None)
    out = Path(config.out).absolute()
    work = out.with_name(f"{out.name}.training")
    recipe = recipe_of(config)
    _check(config, recipe, out, work)
    checkpoint = Checkpoint.open(config.model)
    data = [read_annotated(folder) for folder in config.data]
    take_device()
    model, tokenizer = _load(config, checkpoint)
    rows = _rows(tokenizer, data, config)
    _free(model, config)
    identity = {
        "settings": {k: v for k, v in config.model_dump().items() if k not in _NO_MATTER},
        "model": checkpoint.config,
        "rows": digest_of([[item.ids, item.key, item.harmful] for item in rows.items]),
        "processes": processes(),
    }
    with working_folder(work, identity, keeps=recipe.saves, resume=config.resume) as folder:
        trained = train_safekey(
            model, tokenizer, rows.items, weights_of(config), recipe, folder, resume=config.resume,
            progress=lambda step, steps, _: report("training", step, steps),
        )  # fmt: skip
        if not is_main():
            return None
        report("writing", 0, 1)
        manifest = _manifest(config, checkpoint, data, rows, trained, given)
        _write(config, checkpoint, model, tokenizer, trained, manifest, out)
        if config.save_heads:
            write_heads(Path(config.save_heads), trained.heads, manifest, force=config.force)
        report("writing", 1, 1)
    return Outcome(manifest, _notes(rows))


def recipe_of(config: SafeKeyConfig) -> SafeKeyRecipe:
    """How ``config`` says to train."""
    return SafeKeyRecipe(
        epochs=config.epochs,
        aux_epochs=config.aux_epochs,
        lr=config.lr,
        batch=config.batch,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        max_length=config.max_length,
        micro_batch=config.micro_batch,
        precision=config.precision,
        checkpoints=config.gradient_checkpointing,
        packed=config.packed,
        save_steps=config.save_steps or 0,
        saves=not config.no_checkpoints,
        seed=config.seed,
    )


def weights_of(config: SafeKeyConfig) -> Weights:
    """The loss that ``config`` says."""
    return Weights(
        qmm=config.qmm,
        head=config.head,
        theta=config.theta,
        query="off" if config.no_qmm else "seen" if config.qmm_unmasked else "masked",
        heads="off" if config.no_heads else "detached" if config.detach_heads else "on",
    )


_NO_MATTER = {"out", "resume", "force", "save_heads", "save_steps", "no_checkpoints", "max_missing", "dtype"}


def _check(config: SafeKeyConfig, recipe: SafeKeyRecipe, out: Path, work: Path) -> None:
    """Everything that can be refused before a model is loaded."""
    recipe.check()
    recipe.per_device(processes())
    if not is_main():
        return
    check_free(out, force=config.force)
    if config.save_heads:
        check_free(Path(config.save_heads), force=config.force)
        if Path(config.save_heads).absolute() == out:
            raise ConfigError("the heads cannot go into the model's own folder", "Give --save-heads another one.")
    if last_checkpoint(work) is not None and not config.resume and not config.force:
        raise OutputError(
            f"{work} holds the checkpoints of a run that did not finish",
            "Go on with --resume, or start again and remove them with --force.",
        )
    if config.resume and last_checkpoint(work) is None:
        raise OutputError(f"{work} holds no checkpoint to go on from", "Start again without --resume.")


def _load(config: SafeKeyConfig, checkpoint: Checkpoint) -> tuple[Any, Any]:
    model, tokenizer = load_chat(checkpoint.path)
    if config.think_template:
        add_think_template(tokenizer)
    try:
        model.set_attn_implementation(config.attention)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"attention {config.attention!r} cannot be used: {error}", "Choose --attention sdpa or eager."
        ) from error
    return model, tokenizer


def _rows(tokenizer: Any, data: Sequence[Annotated], config: SafeKeyConfig) -> _Rows:
    frame = frame_of(tokenizer)
    items: list[Spanned] = []
    bad: list[tuple[str, str]] = []
    for annotated in data:
        for trace in annotated.traces:
            try:
                items.append(spanned(tokenizer, frame, trace, max_length=config.max_length))
            except RowError as error:
                bad.append((trace.id, str(error)))
    refused = sum(annotated.refused for annotated in data)
    whole = len(items) + len(bad) + refused
    missing = len(bad) + refused
    if not items or missing > config.max_missing * whole:
        raise ConfigError(
            f"{missing} of {whole} rows have no spans ({refused} were not annotated, {len(bad)} lost them as tokens); "
            f"the limit is {config.max_missing:.0%}" + (f":\n{_named(bad)}" if bad else ""),
            "Annotate them another way (--annotator openai), raise --max-length, or allow more with --max-missing.",
        )
    labels = {item.harmful for item in items}
    if len(labels) < 2 and not config.no_heads:
        only = "harmful" if True in labels else "benign"
        raise ConfigError(
            f"every query is {only}, and the heads learn to tell harmful from benign",
            "Give the other kind too, as another --data (`safegraft safekey annotate FILE --label "
            f"{'benign' if only == 'harmful' else 'harmful'}`), or train without the heads: --no-heads.",
        )
    return _Rows(items, bad, refused)


def _free(model: Any, config: SafeKeyConfig) -> None:
    """Leave free to move what is trained: everything, or LoRA layers beside every linear layer of the decoder."""
    if config.lora_rank is not None:
        set_seed(config.seed)  # of the factors, the same in every process
        prepare(model, scope="model", lora_rank=config.lora_rank)
    else:
        model.requires_grad_(True)


def _named(bad: Sequence[tuple[str, str]], most: int = 10) -> str:
    lines = [f"- {name}: {why}" for name, why in bad[:most]]
    return "\n".join([*lines, f"- and {len(bad) - most} more"] if len(bad) > most else lines)


def _notes(rows: _Rows) -> list[str]:
    harmful = sum(item.harmful for item in rows.items)
    found = [f"{len(rows.items)} rows: {harmful} harmful, {len(rows.items) - harmful} benign"]
    if rows.bad:
        found.append(f"{len(rows.bad)} annotated row(s) left out:\n{_named(rows.bad)}")
    return found


def _manifest(
    config: SafeKeyConfig,
    checkpoint: Checkpoint,
    data: Sequence[Annotated],
    rows: _Rows,
    trained: Trained,
    given: Sequence[str],
) -> dict[str, Any]:
    inputs = {
        "model": {"name": checkpoint.label, "sha256": folder_digest(checkpoint.path)},
        "data": [{"name": str(d.folder), "sha256": d.sha256} for d in data],
    }
    manifest = new_manifest(
        KIND, config=config.model_dump(exclude={"resume", "force"}), inputs=inputs, given=list(given), seed=config.seed
    )
    return manifest | {
        "result": {
            "paper": "arXiv:2505.16186",
            "rows": len(rows.items),
            "harmful": sum(item.harmful for item in rows.items),
            "left_out": [{"id": name, "reason": why} for name, why in rows.bad],
            "not_annotated": rows.refused,
            "steps": trained.steps,
            "tokens": trained.tokens,
            "trained": trained.trained,
            "processes": processes(),
            "epochs": by_epoch(trained.log, config.epochs),
        }
    }


def by_epoch(log: Sequence[dict[str, float]], epochs: int) -> list[dict[str, float]]:
    """Means over the steps of each epoch, of ``loss`` and of every term that counted in all of them."""
    size = max(1, round(len(log) / epochs))
    found = []
    for number in range(epochs):
        steps = log[number * size : (number + 1) * size]
        names = [name for name in ("loss", *TERMS) if steps and all(name in step for step in steps)]
        found.append({"epoch": number + 1.0, **{n: sum(s[n] for s in steps) / len(steps) for n in names}})
    return found


def _write(
    config: SafeKeyConfig,
    checkpoint: Checkpoint,
    model: Any,
    tokenizer: Any,
    trained: Trained,
    manifest: dict[str, Any],
    out: Path,
) -> None:
    name = config.dtype or str(checkpoint.config_value("dtype") or checkpoint.config_value("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."))
    state = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in trained.state.items()
        if name not in model.all_tied_weights_keys
    }
    _without_lora(model)
    with private_folder(out.with_name(f"{out.name}.partial")) as folder:
        model.config.dtype = dtype
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in trained.log]
        write_whole(folder / LOG, "".join(lines).encode())
        manifest["outputs"], broken = outputs_of(folder)
        if broken:
            raise NumericError(f"training left NaN or Inf in {broken[0]}", "Lower the learning rate.")
        write_whole(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        check_free(out, force=config.force)
        folder.chmod(0o755)
        replace_folder(folder, out)


def _without_lora(model: Any) -> None:
    """Take LoRA layers out, so that the modules have the names of the state that is saved."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
