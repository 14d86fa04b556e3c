"""Supervised fine-tuning of chosen parameters, on transformers' Trainer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..errors import ConfigError, NumericError
from .data import Conversations, PadRight, Row

EVERYTHING = (r".",)
"""Every parameter; embeddings and a head tied to them stay frozen all the same."""

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss of the last step)."""


@dataclass(frozen=True)
class TrainingResult:
    """``losses``: one per step. ``tokens``: seen, padding left out. ``trained``: how many numbers were free to move."""

    steps: int
    tokens: int
    trained: int
    losses: tuple[float, ...]


def finetune(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    trainable: Sequence[str] = EVERYTHING,
    epochs: int,
    lr: float,
    batch: int = 8,
    bf16: bool = False,
    seed: int = 0,
    output_dir: Path,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train ``model`` in place on the answers of ``rows``; AdamW, linear decay after 5 % warm-up, no weight decay.

    Deterministic for a seed on one machine with the same number of threads. Embeddings are always frozen. Afterwards
    every parameter's ``requires_grad`` is as it was.

    Args:
        model: a causal LM in float32, on CPU or GPU. tokenizer: see ``data.encode``.
        trainable: regular expressions; a parameter is trained where one of them is found in its name.
        epochs, batch: ≥ 1. lr: > 0, the peak rate. bf16: multiply in bfloat16; weights, their gradients and AdamW's
            moments stay float32.
        output_dir: the Trainer's working folder; nothing is saved to it.

    Raises:
        ConfigError: a value out of range, no rows, or patterns that name no parameter. NumericError: the loss is not
        finite. The rendering's errors: see ``data.encode``.
    """
    if epochs < 1 or batch < 1 or not lr > 0:
        raise ConfigError(f"epochs {epochs} and batch {batch} must be at least 1, lr {lr} above 0")
    if not rows:
        raise ConfigError("there is nothing to train on: no rows")
    set_seed(seed)
    data = Conversations(tokenizer, rows, max_length=max_length)
    with only_trainable(model, trainable) as trained:
        watcher = Watcher(progress)
        trainer = Trainer(
            model=model,
            args=arguments(
                output_dir,
                seed,
                next(model.parameters()).device,
                num_train_epochs=epochs,
                bf16=bf16,
                learning_rate=lr,
                per_device_train_batch_size=batch,
                lr_scheduler_type="linear",
                warmup_steps=0.05,
                train_sampling_strategy="group_by_length",
            ),
            data_collator=PadRight(pad_id(tokenizer), from_first_label=skips_logits(model)),
            train_dataset=data,
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return TrainingResult(trainer.state.global_step, data.tokens * epochs, trained, tuple(watcher.losses))


def arguments(folder: Path, seed: int, device: torch.device, **chosen: Any) -> TrainingArguments:
    """The Trainer's settings that are the same in every training here: each step's loss is logged, nothing is printed
    or reported, no weight decay, nothing is saved. ``chosen`` overrides them. One device a process."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "weight_decay": 0.0,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    made = TrainingArguments(**(settings | chosen))
    made._n_gpu = min(made.n_gpu, 1)
    return made


def skips_logits(model: nn.Module) -> bool:
    """Whether the model can be asked for the last positions' logits alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def pad_id(tokenizer: Any) -> int:
    """What to pad with: the end token where there is no other."""
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


@contextmanager
def only_trainable(model: nn.Module, patterns: Sequence[str]) -> Iterator[int]:
    """Freeze every parameter but those whose name matches; yields how many numbers stay free, undone on leaving."""
    wanted = [re.compile(pattern) for pattern in patterns]
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    free = 0
    for name, parameter in model.named_parameters():
        keep = id(parameter) not in embeddings and any(p.search(name) for p in wanted)
        parameter.requires_grad_(keep)
        free += parameter.numel() if keep else 0
    try:
        if not free:
            raise ConfigError(f"no parameter's name matches {', '.join(patterns)}")
        yield free
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Collects losses, reports progress, stops on a loss that is not finite."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not torch.isfinite(torch.tensor(loss)):
            raise NumericError(f"the loss is {loss} at step {state.global_step}", "Lower the learning rate.")
        self.losses.append(loss)
        if self.progress:
            self.progress(state.global_step, state.max_steps, loss)
