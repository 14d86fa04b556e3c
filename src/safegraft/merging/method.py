"""What a merge method is: a pure function of one tensor's triple and the run's global figures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Settings, validated
from ..registry import Registry
from ..tensors.lowrank import Delta


@dataclass(frozen=True)
class TensorTriple:
    """One weight as a method sees it; float32, one device, one shape of one or two dimensions.

    Attributes:
        name: the tensor's name in the fine-tune.
        base: W_b. task: τ = W_t − W_b. safety: s = αΔ, scaled by the engine according to the strength.
        rng: seeded from (run seed, tensor name), so that order, workers and resuming change nothing.
    """

    name: str
    base: Tensor
    task: Delta
    safety: Delta
    rng: torch.Generator


@dataclass(frozen=True)
class GlobalStats:
    """Figures over all tensors: ‖τ‖₂, ‖Δ‖₂ and the scale α that turned Δ into s."""

    task_norm: float
    safety_norm: float
    alpha: float


class Merged(NamedTuple):
    """A method's answer: the merged delta (the output is ``base + delta``) and figures worth reporting."""

    delta: Tensor
    figures: dict[str, float]


MethodFunction = Callable[[TensorTriple, Any, GlobalStats], Merged | None]


@dataclass(frozen=True)
class Method:
    """A registered method. ``None`` from ``function`` keeps the fine-tuned tensor as it is, bit for bit."""

    name: str
    function: MethodFunction
    params: type[Settings]
    paper: str
    summary: str

    def parameters(self, given: dict[str, Any]) -> Settings:
        """The method's parameters with defaults filled in. Raises ConfigError naming every wrong one."""
        return validated(self.params, given)


METHODS: Registry[Method] = Registry("method")


def merge_method(name: str, *, params: type[Settings], paper: str) -> Callable[[MethodFunction], MethodFunction]:
    """Register a function as a merge method. Its docstring's first line describes it in `safegraft methods`."""

    def register(function: MethodFunction) -> MethodFunction:
        summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        METHODS.add(name, Method(name, function, params, paper, summary))
        return function

    return register
