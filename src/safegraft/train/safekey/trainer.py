"""Training with the SafeKey loss, on transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from ...errors import ConfigError, OutputError
from ..data import IGNORED
from ..distill import ADAPTER, OnlyTrained, Recipe, last_checkpoint, training_arguments
from ..finetune import Progress, Watcher, pad_id, skips_logits
from .batches import Collator, Traces
from .losses import HEAD_U, HEAD_XU, LM, QMM, TERMS, DualPathHead, SafeKeyModel, Weights
from .spans import Spanned

ADAM_BETAS = (0.9, 0.95)
"""The paper's."""


@dataclass(frozen=True)
class SafeKeyRecipe(Recipe):
    """How to train. Defaults are the paper's (arXiv:2505.16186), but where it says "ours".

    Attributes:
        epochs: 5. aux_epochs: 2, the last ones, in which all terms of the loss count. lr: 1e-5, the peak. batch: 128.
        warmup: 0.05 of the steps, then a cosine to 0. weight_decay: 1e-4. max_length: 8192 tokens.
        packed: rows of a batch one after another instead of padded (ours); the same result.
        The others: see Recipe; ``save_steps`` 0 saves after every epoch here, and ``saves`` False never.
    """

    epochs: int = 5
    lr: float = 1e-5
    batch: int = 128
    warmup: float = 0.05
    weight_decay: float = 1e-4
    max_length: int = 8192
    aux_epochs: int = 2
    packed: bool = False
    saves: bool = True

    def check(self) -> None:
        """Raise ConfigError for values out of range, all of them at once."""
        wrong = []
        if self.epochs < 1:
            wrong.append(f"epochs {self.epochs} is below 1")
        if not 0 <= self.aux_epochs <= self.epochs:
            wrong.append(f"aux_epochs {self.aux_epochs} is outside 0 … {self.epochs} (epochs)")
        if not 0 < self.lr < math.inf:
            wrong.append(f"lr {self.lr} is not above 0")
        if not 0 <= self.warmup < 1:
            wrong.append(f"warmup {self.warmup} is outside [0, 1)")
        if wrong:
            raise ConfigError("settings that cannot be used:\n" + "\n".join(f"- {w}" for w in wrong))


@dataclass
class Trained:
    """What came out. ``state``: the whole weights as a plain checkpoint has them, empty but in the first process.

    ``log``: a dict a step: ``step``, ``epoch``, ``learning_rate``, ``loss`` and the terms that counted in it.
    """

    state: dict[str, Tensor]
    heads: dict[str, Tensor]
    steps: int
    tokens: int
    trained: int
    log: list[dict[str, float]] = field(default_factory=list)


def train_safekey(
    model: Any,
    tokenizer: Any,
    items: Sequence[Spanned],
    weights: Weights,
    recipe: SafeKeyRecipe,
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train what of ``model`` is free to move. In every process of a distributed run.

    Args:
        items: with both labels among them, unless ``weights`` has no heads. folder: the Trainer's own.
        resume: go on from the last whole checkpoint in it. progress: called with (steps done, steps in all, loss).

    Raises:
        ConfigError: a value out of range, no rows, one label, a model that SafeKey cannot train, or a DeepSpeed
            configuration under which the weights could not be saved.
        NumericError: the loss is not finite. OutputError: nothing to resume, or of another run.
    """
    recipe.check()
    if weights.heads != "off" and len({item.harmful for item in items}) < 2:
        raise ConfigError("the heads need harmful and benign rows", "Add the rows that are missing, or use no heads.")
    if not items:
        raise ConfigError("there is nothing to train on: no rows")
    flash = "flash" in str(model.config._attn_implementation)
    if recipe.packed and not flash and _has_windows(model.config):
        raise ConfigError(
            "packed rows would lose the sliding windows of this model's attention",
            "Leave out --packed, or use --attention flash_attention_2.",
        )
    start = last_checkpoint(folder) if resume else None
    if resume and start is None:
        raise OutputError(f"{folder} holds no checkpoint to go on from", "Start again without --resume.")
    set_seed(recipe.seed)
    device = next(model.parameters()).device
    whole = SafeKeyModel(model, DualPathHead(model.config.hidden_size, seed=recipe.seed).to(device), weights)
    if weights.heads == "off":
        whole.head.requires_grad_(False)
    if recipe.checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    cached = model.config.use_cache
    arguments = training_arguments(
        recipe, folder, device, adam_beta1=ADAM_BETAS[0], adam_beta2=ADAM_BETAS[1], ddp_find_unused_parameters=False,
        save_strategy=("steps" if recipe.save_steps else "epoch") if recipe.saves else "no",
    )  # fmt: skip
    trainer = SafeKeyTrainer(
        model=whole,
        args=arguments,
        data_collator=Collator(
            pad_id(tokenizer), packed=recipe.packed, flash=flash, from_first_label=skips_logits(model)
        ),
        train_dataset=Traces(items),
        callbacks=[Watcher(progress)],
        aux_share=recipe.aux_epochs / recipe.epochs,
    )
    trainer.remove_callback(PrinterCallback)
    _require_gathering(trainer.accelerator.state.deepspeed_plugin)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    model.config.use_cache = cached
    model.eval()
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = sum(len(item.ids) for item in items) * recipe.epochs
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    heads = {n.removeprefix("head."): t.detach().cpu() for n, t in state.items() if n.startswith("head.")}
    inner = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    return Trained(plain(inner, _scalings(model)), heads, trainer.state.global_step, tokens, free, log)


def _require_gathering(plugin: Any) -> None:
    """That DeepSpeed will bring the weights together at the end.

    Raises:
        ConfigError: it splits them (ZeRO-3) and was not told to.
    """
    if plugin is None or plugin.zero_stage < 3:
        return
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    if not zero.get("stage3_gather_16bit_weights_on_model_save", False):
        raise ConfigError(
            "DeepSpeed's ZeRO-3 would leave the trained weights in pieces",
            "Set stage3_gather_16bit_weights_on_model_save for DeepSpeed, or zero3_save_16bit_model for accelerate.",
        )


def _has_windows(config: Any) -> bool:
    """Whether some layer sees only the nearest tokens."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))


def plain(state: Mapping[str, Tensor], scalings: Mapping[str, tuple[float, bool]]) -> dict[str, Tensor]:
    """``state`` without LoRA: each W becomes W + scaling·B A, under the name of a model that never had any.

    Args:
        scalings: by module with LoRA: its scaling, and whether it stores its weight transposed.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        module, _, last = name.replace(".base_layer.", ".").rpartition(".")
        if last == "weight" and module in scalings:
            scaling, transposed = scalings[module]
            up, down = (state[f"{module}.lora_{side}.{ADAPTER}.weight"].float() for side in "BA")
            change = scaling * (up @ down)
            tensor = (tensor.float() + (change.T if transposed else change)).to(tensor.dtype)
        found[f"{module}.{last}" if module else last] = tensor.detach()
    return found


def _scalings(model: Any) -> dict[str, tuple[float, bool]]:
    return {
        name: (float(module.scaling[ADAPTER]), bool(module.fan_in_fan_out))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


class SafeKeyTrainer(OnlyTrained):
    """Each term divided by what the whole step holds of it, over all processes and accumulated batches.

    So the result does not depend on how a batch is dealt out, and what is logged under a term's name is that term: its
    mean over the tokens (``lm_loss``, ``qmm_loss``) or rows (heads) of the steps since the last log, without its λ. The
    total is ``loss``. Terms that did not count are not logged.
    """

    def __init__(self, *, aux_share: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.aux_share = aux_share
        self._counts: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    @property
    def auxiliary(self) -> bool:
        """Whether the step under way is one of the last epochs, in which all terms count."""
        return bool(self.state.global_step >= round(self.state.max_steps * (1 - self.aux_share)))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            own = torch.zeros(3, dtype=torch.long)
            for batch in samples:
                own += torch.stack(
                    [_labelled(batch["labels"]), _labelled(batch["key_labels"]), torch.tensor(len(batch["harmful"]))]
                )
            tokens, keys, rows = self.accelerator.gather(own[None].to(device)).sum(0)
            self._counts = {LM: tokens, QMM: keys, HEAD_U: rows, HEAD_XU: rows}
            for name in self._wanted():
                self._steps[name] = self._steps.get(name, 0) + 1
        return samples, items

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        found = model(inputs, auxiliary=self.auxiliary)
        wanted = self._wanted()
        terms = {name: total / self._counts[name] for name, total in found.items()}
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=term.device)) + term.detach()
        loss = torch.stack([weight * terms[name] for name, weight in wanted.items()]).sum()
        processes = int(self.accelerator.num_processes)  # over which gradients are averaged afterwards
        return loss * processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name in TERMS:
                if name in self._sums:
                    everywhere = self.accelerator.gather(self._sums[name][None]).sum()
                    logs[name] = float(everywhere) / self._steps[name]
            self._sums, self._steps = {}, {}
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Detached heads are clipped for themselves, or the length of their gradient would still move the model.

        Not so where the weights are sharded, since lengths are known of whole modules only there.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.model.weights.heads != "detached" or sharded:
            return super()._clip_grad_norm(model)
        self.accelerator.clip_grad_norm_(self.model.head.parameters(), self.args.max_grad_norm)
        return self.accelerator.clip_grad_norm_(self.model.model.parameters(), self.args.max_grad_norm)

    def _wanted(self) -> dict[str, float]:
        return self.model.weights.of(auxiliary=self.auxiliary)  # type: ignore[no-any-return]


def _labelled(labels: Tensor) -> Tensor:
    """Tokens that carry a loss, on the CPU; the first of a row never does."""
    return (labels[:, 1:] != IGNORED).sum().cpu()
