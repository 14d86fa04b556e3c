"""Learning a mask over fine-tunes' changes by DPO (SOMF, arXiv:2405.09055), on transformers' Trainer.

The logits of the mask are all that is trained. DPO's reference is frozen (in the authors' code it is a model under
random masks), and its log-probabilities are taken once, before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from ..errors import ConfigError
from ..tensors.randomness import generator
from .distill import OnlyTrained, last_checkpoint
from .finetune import Progress, Watcher, arguments
from .masked import MaskedModel, PairCollator, dpo_loss
from .preferences import EncodedPair

MICRO_BATCH = 8
"""Pairs at a time where the user does not say: the largest divisor of the batch up to this."""


@dataclass(frozen=True)
class SomfRecipe:
    """How to learn; see safegraft.config.SomfConfig."""

    temperature: float = 0.5
    beta: float = 0.1
    lr: float = 1e-3
    batch: int = 16
    micro_batch: int | None = None
    steps: int = 1000
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    save_steps: int = 100
    seed: int = 0

    @property
    def at_a_time(self) -> int:
        return self.micro_batch or max(n for n in range(1, MICRO_BATCH + 1) if self.batch % n == 0)


class _Pairs(Dataset[tuple[EncodedPair, Sequence[float]]]):
    def __init__(self, pairs: Sequence[EncodedPair], reference: Sequence[Sequence[float]]) -> None:
        self.items = list(zip(pairs, reference, strict=True))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[EncodedPair, Sequence[float]]:
        return self.items[index]


def learn(
    masked: MaskedModel,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    reference: Sequence[Sequence[float]],
    recipe: SomfRecipe,
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """Train the logits of ``masked`` in place. Returns the loss of every step.

    Args:
        reference: the frozen reference's log-probabilities of each pair's answers, chosen and rejected. folder: the
            Trainer's own; its checkpoints hold logits and optimiser. resume: go on from the last whole one, if any.

    Raises:
        ConfigError: a value out of range. NumericError: the loss is not finite.
    """
    if recipe.batch % recipe.at_a_time:
        raise ConfigError(f"{recipe.batch} pairs a step cannot be made of {recipe.at_a_time} at a time")
    set_seed(recipe.seed)
    trainer = _DpoTrainer(
        model=masked,
        args=arguments(
            folder,
            recipe.seed,
            masked.logits[0].device,
            max_steps=recipe.steps,
            learning_rate=recipe.lr,
            lr_scheduler_type="linear",
            optim="adafactor" if recipe.optimizer == "adafactor" else "adamw_torch",
            per_device_train_batch_size=recipe.at_a_time,
            gradient_accumulation_steps=recipe.batch // recipe.at_a_time,
            save_strategy="steps",
            save_steps=recipe.save_steps,
        ),
        data_collator=PairCollator(tokenizer, masked.frozen),
        train_dataset=_Pairs(pairs, reference),
        callbacks=[Watcher(progress)],
    )
    trainer.beta = recipe.beta
    trainer.remove_callback(PrinterCallback)
    start = last_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    return tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


class _DpoTrainer(OnlyTrained):
    """DPO on the logits; every forward pass draws its masks by (step, its number within the step)."""

    beta = 0.1
    _step, _pass = -1, 0

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        step = self.state.global_step
        self._step, self._pass = step, self._pass + 1 if step == self._step else 0
        log_probs = model(inputs["batch"], f"{step}/{self._pass}")
        return dpo_loss(log_probs, inputs["reference"], self.beta)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.model.logits[0].dtype == torch.bfloat16:
            optimizer.register_step_pre_hook(lambda *_: widen(self.model.logits))
            optimizer.register_step_post_hook(lambda *_: self._narrow())
        return optimizer

    def _narrow(self) -> None:
        for i, parameter in enumerate(self.model.logits):
            rng = generator(self.model.seed, f"rounding/{self.state.global_step}/{i}", parameter.device)
            parameter.grad = None
            parameter.data = rounded_at_random(parameter.data, rng)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _wide(self.model.logits):  # torch casts a loaded state to its parameter's dtype, and steps are in float32
            super()._load_optimizer_and_scheduler(checkpoint)


def widen(parameters: nn.ParameterList) -> None:
    """Parameters and gradients to float32, for the length of an optimiser's step."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()


@contextmanager
def _wide(parameters: nn.ParameterList) -> Iterator[None]:
    dtypes = [parameter.dtype for parameter in parameters]
    widen(parameters)
    yield
    for parameter, dtype in zip(parameters, dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)


def rounded_at_random(values: Tensor, rng: torch.Generator) -> Tensor:
    """Finite float32 -> bfloat16, up or down with the probabilities that keep the mean.

    Steps of 1e-3 are below half the distance of bfloat16 numbers above ¼; rounded to the nearest, logits would stop
    there.
    """
    extra = torch.randint(0, 1 << 16, values.shape, generator=rng, device=values.device, dtype=torch.int32)
    bits = (values.view(torch.int32) + extra) & -(1 << 16)
    return bits.view(torch.float32).bfloat16()
