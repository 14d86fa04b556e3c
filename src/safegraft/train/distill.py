"""Training a surrogate: an aligned model taught, within a scope, to answer what it refuses.

It is trained in place, linearised where the scope has something to linearise, on transformers' Trainer. What comes out
are the changes of its weights; the model itself is the caller's to forget. (EnchTable, arXiv:2511.09880.)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..errors import ConfigError, OutputError
from ..hardware import in_bfloat16
from ..tensors.lowrank import LowRank
from ..tensors.scopes import KNOWN, LayerRange, Names, Scope, chosen_weights, modules_in_scope
from .data import Conversations, Encoded, PadRight
from .finetune import Progress, Watcher, arguments, pad_id, skips_logits
from .linearize import Linearised, linearize

ADAPTER = "safegraft"
TRAINED = "trained.safetensors"
MICRO_BATCH = 4
"""Rows at a time where the user does not say: the largest divisor of the batch up to this."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the paper's (arXiv:2511.09880 and its released code), but where it says "ours".

    Attributes:
        epochs: 4. lr: 1e-5, the peak, AdamW. batch: 16, rows a step over all processes. warmup: 0.1 of the steps, then
        a cosine to 0. weight_decay: 0 (ours; not stated there). max_length: 2048 tokens.
        micro_batch: rows at a time on one device (ours); changes memory and time, not the result.
        precision: ``float32``, ``bfloat16`` (autocast; weights and AdamW stay float32, else steps of 1e-5 would be
        rounded away), or ``auto``: bfloat16 on GPUs that have it. checkpoints: recompute activations to save memory.
        save_steps: write what resuming needs every so many steps; 0 for never.
    """

    epochs: int = 4
    lr: float = 1e-5
    batch: int = 16
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_length: int = 2048
    micro_batch: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoints: bool = False
    save_steps: int = 0
    seed: int = 0

    def per_device(self, processes: int) -> int:
        """Rows at a time on one device.

        Raises:
            ConfigError: the batch cannot be divided that way.
        """
        share, rest = divmod(self.batch, processes)
        micro = self.micro_batch or max(n for n in range(1, MICRO_BATCH + 1) if share % n == 0 or n == 1)
        if rest or share % micro:
            raise ConfigError(
                f"a batch of {self.batch} rows cannot be made of {micro} at a time on {processes} process(es)",
                "Choose a batch that is a multiple of both together.",
            )
        return micro


@dataclass
class Surrogate:
    """A trained surrogate. ``model`` holds its weights in place, ``linearised`` is still put in.

    Attributes:
        weights: names of the weights in scope that were free to move. losses: one a step, under the expansion.
        trained: numbers that were free to move. tokens: seen, padding left out.
    """

    model: Any
    weights: list[str]
    linearised: Linearised | None
    steps: int
    tokens: int
    trained: int
    losses: tuple[float, ...]


def prepare(
    model: Any,
    *,
    scope: Scope,
    layers: LayerRange | None = None,
    names: Names = KNOWN,
    lora_rank: int | None = None,
) -> list[str]:
    """Free the weights in scope, freeze the others, add LoRA layers if asked.

    Returns the weights that are to move: of the model as it came, not of the adapter.

    Raises:
        ConfigError: nothing is in scope, a value is out of range, or LoRA is asked for weights that it cannot hold.
    """
    if scope == "all":
        raise ConfigError("scope 'all' cannot be distilled", "Choose model, which is everything in the decoder layers.")
    weights = chosen_weights([name for name, _ in model.named_parameters()], scope, layers=layers, names=names)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if lora_rank is not None:
        weights = _add_lora(model, weights, lora_rank)
    else:
        wanted = set(weights)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
    return weights


def expand(model: Any, *, scope: Scope, layers: LayerRange | None = None, names: Names = KNOWN) -> Linearised:
    """Put the first-order expansion into the modules of the scope, after ``prepare``."""
    modules = modules_in_scope([name for name, _ in model.named_modules()], scope, layers=layers, names=names)
    return linearize(model, [re.escape(module) for module in modules])


def _add_lora(model: Any, weights: Sequence[str], rank: int) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs the package peft", "Install it: pip install 'safegraft[distill]'") from error
    if rank < 1:
        raise ConfigError(f"LoRA rank {rank} is below 1", "Leave it out to train the whole weights.")
    parts = dict(model.named_parameters())
    linear = [
        name.removesuffix(".weight")
        for name in weights
        if name.endswith(".weight")
        and isinstance(model.get_submodule(name.removesuffix(".weight")), (nn.Linear, Conv1D))
    ]
    stacks = [name for name in weights if parts[name].dim() > 2]
    if stacks or not linear:
        odd = (stacks or weights)[0]
        raise ConfigError(
            f"LoRA cannot hold {odd} {list(parts[odd].shape)}: it is no linear layer",
            "Leave --lora-rank out, or choose the scope attention.",
        )
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=linear, bias="none")
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
    return [f"{name}.weight" for name in linear]


def train(
    model: Any,
    tokenizer: Any,
    items: Sequence[Encoded],
    weights: list[str],
    linearised: Linearised | None,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Surrogate:
    """Train what ``prepare`` freed on the answers of ``items``. In every process of a distributed run.

    Args:
        folder: the Trainer's own. With ``recipe.save_steps`` it comes to hold the trained weights: keep it private.
        resume: go on from the last whole checkpoint in it. progress: called with (steps done, steps in all, loss).

    Raises:
        ConfigError: a value out of range, weights split over processes, or settings that DeepSpeed would defeat.
        NumericError: the loss is not finite. OutputError: nothing to resume.
    """
    if recipe.epochs < 1 or not 0 < recipe.lr < math.inf or not 0 <= recipe.warmup < 1:
        raise ConfigError(
            f"epochs {recipe.epochs} must be ≥ 1, lr {recipe.lr} above 0, warm-up {recipe.warmup} in [0, 1)"
        )
    recipe.per_device(processes())
    start = last_checkpoint(folder) if resume else None
    if resume and start is None:
        raise OutputError(f"{folder} holds no checkpoint to go on from", "Start again without --resume.")
    set_seed(recipe.seed)
    device = next(model.parameters()).device
    data = Conversations.of(items)
    if recipe.checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    cached, model.config.use_cache = model.config.use_cache, False
    watcher = Watcher(progress)
    trainer = OnlyTrained(
        model=model,
        args=training_arguments(recipe, folder, device),
        data_collator=PadRight(pad_id(tokenizer), from_first_label=skips_logits(model)),
        train_dataset=data,
        callbacks=[watcher],
    )
    trainer.remove_callback(PrinterCallback)
    _require_whole(trainer, recipe)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.config.use_cache = cached
    model.eval()
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Surrogate(model, weights, linearised, trainer.state.global_step, data.tokens * recipe.epochs, free, losses)


def training_arguments(recipe: Recipe, folder: Path, device: torch.device, **more: Any) -> TrainingArguments:
    """The Trainer's settings for ``recipe``, in every process; ``more`` overrides them."""
    micro = recipe.per_device(processes())
    chosen: dict[str, Any] = {
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": recipe.batch // (micro * processes()),
        "bf16": in_bfloat16(recipe.precision, device),
        "save_strategy": "steps" if recipe.save_steps else "no",
        "save_steps": recipe.save_steps or 500,
    }
    return arguments(folder, recipe.seed, device, **(chosen | more))


def processes() -> int:
    """How many processes this run has, as a launcher tells."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that measures and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def take_device() -> None:
    """Make this process work on the GPU a launcher gave it, where there are GPUs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that was written to its end, or None."""
    whole = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)


def _require_whole(trainer: Trainer, recipe: Recipe) -> None:
    plugin = trainer.accelerator.state.deepspeed_plugin
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage >= 3):
        raise ConfigError(
            "a vector is taken from whole weights, and FSDP and DeepSpeed's ZeRO-3 split them over the processes",
            "Run the processes data-parallel, or with ZeRO-1 or 2; --lora-rank needs the least memory.",
        )
    if plugin is not None and recipe.save_steps:
        raise ConfigError(
            "DeepSpeed's checkpoints would hold the whole model, which is to lose its safety", "Leave out --resumable."
        )
    if plugin is not None and trainer.args.bf16:
        raise ConfigError(
            "DeepSpeed would round the weights to bfloat16, and a vector is their small change",
            "Use --precision float32.",
        )


class OnlyTrained(Trainer):  # type: ignore[misc]
    """Checkpoints hold the trained tensors alone: no part of the model that anyone could load by itself.

    Not so under FSDP and DeepSpeed, which write all weights, in their own format.
    """

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        moving = {name for name, p in self.model.named_parameters() if p.requires_grad}
        held = dict(self.model.named_parameters()) if state_dict is None else state_dict
        save_file({n: t.detach().cpu().contiguous() for n, t in held.items() if n in moving}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        held = load_file(Path(resume_from_checkpoint) / TRAINED)
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if set(own) != set(held):
            raise OutputError(f"{resume_from_checkpoint} is of another run", "Start again with --force.")
        with torch.no_grad():
            for name, tensor in held.items():
                own[name].copy_(tensor)


def stored_names(model: Any, weights: Sequence[str]) -> list[str]:
    """What a checkpoint of ``model``, prepared or not, calls ``weights``; experts may be stored one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    parts = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    return list(revert_weight_conversion(model, {n: torch.empty_like(parts[n], device="meta") for n in weights}))


def weights_of(surrogate: Surrogate) -> dict[str, Tensor | LowRank]:
    """The outcome by the names of the checkpoint, float32 on the CPU: per weight in scope the surrogate's own W_h, or
    for LoRA its factors of aligned − surrogate.

    Raises:
        ConfigError: LoRA on weights that the checkpoint stores in another form than the model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parts = {name: p.detach() for name, p in surrogate.model.named_parameters()}
    adapted = {f"{n}.weight": m for n, m in surrogate.model.named_modules() if hasattr(m, "lora_A")}
    if not adapted:
        held = revert_weight_conversion(surrogate.model, {name: parts[name] for name in surrogate.weights})
        return {name: tensor.float().cpu().contiguous() for name, tensor in held.items()}
    beneath = {name: module.base_layer.weight.detach() for name, module in adapted.items()}
    stored = revert_weight_conversion(surrogate.model, dict(beneath))
    back = {id(tensor): name for name, tensor in beneath.items()}
    if any(id(tensor) not in back for tensor in stored.values()):
        raise ConfigError("the checkpoint stores these weights in another form than LoRA trained them in")
    return {name: _factors(adapted[back[id(tensor)]]) for name, tensor in stored.items()}


def _factors(layer: Any) -> LowRank:
    down, up = (part[ADAPTER].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
    left, right = -layer.scaling[ADAPTER] * up, down.T.contiguous()
    return LowRank(right, left) if layer.fan_in_fan_out else LowRank(left, right)
