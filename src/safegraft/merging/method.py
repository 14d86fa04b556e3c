"""What a merge method is: a pure function of one tensor's triple and the run's global figures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..config import Settings, validated
from ..registry import Registry
from ..tensors.lowrank import Delta, LowRank
from ..tensors.mask import Masking


@dataclass(frozen=True)
class TensorTriple:
    """One weight as a method sees it; float32, one device, one shape of one or two dimensions.

    Attributes:
        name: the tensor's name in the fine-tune.
        base: W_b. tasks: τᵢ = Wᵢ − W_b of every fine-tune, at least one. weights: one for each of them, > 0.
        safety: s = αΔ, scaled by the engine according to the strength.
        rng: a CPU's, seeded from (run seed, tensor name), so that order, workers, device and resuming change nothing;
            tensors/randomness.py draws from it for any device.
        hessian: H [n, n] of a weight [m, n], the mean of x xᵀ over its inputs on the calibration's prompts; None where
            the calibration has none, and for methods that need no calibration.
        mask: the logits of its learnt mask (tensors/mask.py); None where the mask has none, and for other methods.
        overview: where these are some rows of a tensor, what the method's ``overview`` found of all of it.
    """

    name: str
    base: Tensor
    tasks: tuple[Delta, ...]
    weights: tuple[float, ...]
    safety: Delta
    rng: torch.Generator
    hessian: Tensor | None = None
    mask: Masking | None = None
    overview: Any = None

    @property
    def task(self) -> Delta:
        """τ, for methods that take one fine-tune (the engine gives them no more, at weight 1)."""
        return self.tasks[0]


@dataclass(frozen=True)
class GlobalStats:
    """Figures over all tensors: ‖τ‖₂, ‖Δ‖₂ and the scale α that turned Δ into s (without a vector, the strength)."""

    task_norm: float
    safety_norm: float
    alpha: float


class Merged(NamedTuple):
    """A method's answer: the merged delta (the output is ``base + delta``), as factors where it is the sum of two
    low-rank deltas, and figures worth reporting."""

    delta: Tensor | LowRank
    figures: dict[str, float]

    def dense(self) -> Tensor:
        return self.delta if isinstance(self.delta, Tensor) else self.delta.dense()


Needs = Literal["vector", "calibration", "mask"]

MethodFunction = Callable[[TensorTriple, Any, GlobalStats], Merged | None]
Overview = Callable[[Callable[[], Iterable[TensorTriple]], Any], Any]
"""``overview(triples, params)``: ``triples()`` goes through a tensor's rows, a few at a time, from the first at every
call; each triple's memory is good until the next."""


@dataclass(frozen=True)
class Method:
    """A registered method. ``None`` from ``function`` keeps the fine-tuned tensor as it is, bit for bit.

    Attributes:
        strength: used where the user gives none. match_norm: whether it is a share of ‖τ‖ (s = β·‖τ‖/‖Δ‖·Δ) or a
            factor (s = βΔ), where the user does not say. fuses: whether it takes several fine-tunes, and then also
            none but them, without a vector. needs: what it knows of safety from: a safety vector, or a calibration
            (tensors/calibration.py) or a learnt mask (tensors/mask.py), and then no vector. entrywise: whether the
            answer for some rows of a matrix depends on those rows alone, and on what ``overview`` (None: nothing)
            finds of the whole tensor beforehand, so that the engine may hand a tensor over in pieces, in order.
        local: whether the answer depends on no figure over all tensors but α, so that fine-tunes can be fused in one
            pass over them; the others in GlobalStats are NaN then. decomposes: whether it asks for the fine-tunes'
            singular directions, so that a GPU may begin with those of many tensors at once. directions: whether it asks
            for the vector's, given the parameters; where it does not, those that are stored are not read, and a method
            that asks all the same waits until they are worked out.
    """

    name: str
    function: MethodFunction
    params: type[Settings]
    paper: str
    summary: str
    strength: float
    match_norm: bool
    fuses: bool
    needs: Needs
    entrywise: bool
    overview: Overview | None = None
    local: bool = False
    decomposes: bool = False
    directions: Callable[[Any], bool] = lambda params: False

    def parameters(self, given: dict[str, Any]) -> Settings:
        """The method's parameters with defaults filled in. Raises ConfigError naming every wrong one."""
        return validated(self.params, given)


METHODS: Registry[Method] = Registry("method")


def merge_method(
    name: str,
    *,
    params: type[Settings],
    paper: str,
    strength: float,
    match_norm: bool = True,
    fuses: bool = False,
    needs: Needs = "vector",
    entrywise: bool = False,
    overview: Overview | None = None,
    local: bool = False,
    decomposes: bool = False,
    directions: Callable[[Any], bool] = lambda params: False,
) -> Callable[[MethodFunction], MethodFunction]:
    """Register a function as a merge method; see Method. Its docstring's first line is shown by `safegraft methods`."""

    def register(function: MethodFunction) -> MethodFunction:
        summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        method = Method(
            name, function, params, paper, summary, strength, match_norm, fuses, needs, entrywise, overview, local,
            decomposes, directions,
        )  # fmt: skip
        METHODS.add(name, method)
        return function

    return register
