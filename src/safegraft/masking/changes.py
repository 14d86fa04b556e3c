"""The changes of fine-tunes as the masked model wants them: fused, on its device, and as small as they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, MismatchError
from ..merging.execute import merge_tensor
from ..merging.fusion import Fusion, fused, fused_delta, ordered
from ..merging.method import METHODS, GlobalStats
from ..merging.survey import Survey
from ..tensors.finetune import FineTune
from ..tensors.lowrank import Delta
from ..tensors.mask import SIDES
from ..tensors.randomness import generator
from ..tensors.scopes import LayerRange, Names, Scope, chosen_weights
from ..tensors.source import Workspace
from ..train.masked import Change, Weights

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fused:
    """A change that is fused already: ``gate ∘ A``, A dense or low-rank."""

    delta: Delta

    @property
    def masked(self) -> Shapes:
        return {"": self.delta.shape}

    def __call__(self, gates: Sequence[Tensor] | None) -> Tensor:
        own = self.delta.dense().float()
        return own if gates is None else own * gates[0]


@dataclass(frozen=True)
class Trimmed:
    """The changes of TIES, which ranks their entries under every mask anew."""

    parts: Sequence[tuple[Delta, float]]
    weights: Sequence[float]
    how: Fusion

    @property
    def masked(self) -> Shapes:
        return {"": self.parts[0][0].shape}

    def __call__(self, gates: Sequence[Tensor] | None) -> Tensor:
        gate = None if gates is None else gates[0]
        with torch.no_grad():
            dense = [(d.dense().float(), w) for d, w in self.parts]
            own = fused(dense, self.weights, self.how, torch.Generator(), None if gate is None else gate.detach())
        return own if gate is None else own * gate


@dataclass(frozen=True)
class Factors:
    """LoRA updates whose factors are masked apart, the same masks for all."""

    parts: Sequence[tuple[Delta, float]]

    @property
    def masked(self) -> Shapes:
        low = self.parts[0][0].low
        assert low is not None
        return dict(zip(SIDES, (tuple(low.left.shape), tuple(low.right.shape)), strict=True))

    def __call__(self, gates: Sequence[Tensor] | None) -> Tensor:
        total = None
        for delta, weight in self.parts:
            assert delta.low is not None
            left, right = delta.low.left, delta.low.right
            if gates is not None:
                left, right = left * gates[0], right * gates[1]
            part = (left * (delta.scale * weight)) @ right.T
            total = part if total is None else total + part
        assert total is not None
        return total


Held = Fused | Trimmed | Factors


def masked_weights(
    fine: FineTune, found: Survey, scope: Scope, *, layers: LayerRange | None, names: Names, factors: bool
) -> tuple[list[str], list[str]]:
    """The fine-tunes' names of the weights that get a mask, and of the others that changed.

    No mask is for embeddings and heads of differing length, for stacks of experts, and, with ``factors``, for what is
    no LoRA update in every fine-tune.

    Raises:
        ConfigError: nothing is in scope or left to mask; ``factors`` with a fine-tune that is no adapter.
        MismatchError: LoRA updates of one weight differ in rank, so that they have no mask in common.
    """
    every = (fine, *fine.others)
    if factors and any(one.adapter is None for one in every):
        full = next(one.label for one in every if one.adapter is None)
        raise ConfigError(f"{full} is no LoRA adapter: it has no factors to mask", "Leave out --mask-factors.")
    inside = set(chosen_weights(list(fine.base.names()), scope, layers=layers, names=names))
    chosen: list[str] = []
    others: list[str] = []
    for name, stats in found.tensors.items():
        if not stats.task_sq or not fine.layout.is_mergeable(name):
            continue
        dims, there = len(fine.layout.spec(name).shape), fine.pairing.counterparts[name]
        takes = there in inside and 0 < dims < 3 and fine.rows(name) is None
        if takes and factors:
            takes = all(one.rank(name) is not None for one in every)
        (chosen if takes else others).append(name)
    if not chosen:
        raise ConfigError(
            f"no weight in scope {scope!r} that can be masked differs from the aligned model in the fine-tune(s)",
            "Choose another --scope or --layers, or check --aligned and --model.",
        )
    for name in chosen if factors else ():
        ranks = {one.label: one.rank(name) for one in every}
        if len(set(ranks.values())) > 1:
            raise MismatchError(
                f"{name} has LoRA updates of different rank: {', '.join(f'{k} {r}' for k, r in ranks.items())}",
                "One mask is shared by all fine-tunes: leave out --mask-factors, which masks the products.",
            )
    return chosen, others


def placed_changes(
    fine: FineTune,
    model: nn.Module,
    chosen: Sequence[str],
    others: Sequence[str],
    how: Fusion,
    *,
    factors: bool,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Change], Weights]:
    """The changes of ``chosen`` and the weights of ``others`` by ``model``'s parameters, on its device.

    Args:
        model: the aligned model, in the dtype that what is dense shall have.

    Raises:
        CheckpointError: the model's parameters are not named or shaped as its checkpoint's tensors.
    """
    parameters, there = dict(model.named_parameters()), fine.pairing.counterparts
    lost = [
        there[n] for n in (*chosen, *others)
        if there[n] not in parameters or parameters[there[n]].shape != fine.base.spec(there[n]).shape
    ]  # fmt: skip
    if lost:
        raise CheckpointError(
            f"the loaded model has no parameter {lost[0]} of that shape: its checkpoint names or stores its weights "
            "otherwise",
            "Masks can be learnt on what transformers loads under its own name; stacks of experts are not among that.",
        )
    changes: dict[str, Change] = {}
    fixed: Weights = {}
    workspace = Workspace()
    for done, name in enumerate((*chosen, *others), 1):
        own = parameters[there[name]]
        if done <= len(chosen):
            change = change_of(fine, name, how, factors=factors, workspace=workspace)
            changes[there[name]] = placed(change, own.device, own.dtype)
        else:
            fixed[there[name]] = unmasked(fine, name, how, own.detach(), workspace).to(own.device, own.dtype)
        progress(done, len(chosen) + len(others))
    return changes, fixed


def change_of(fine: FineTune, name: str, how: Fusion, *, factors: bool, workspace: Workspace) -> Held:
    """The change of one masked weight, on the CPU, in memory of its own."""
    _, tasks = fine.read(name, workspace)
    weights = fine.weights
    if factors:
        coefficient = how.scale / sum(weights) if how.kind == "mean" else how.scale
        return Factors([(d, w * coefficient) for d, w in ordered(tasks, weights)])
    if how.linear:
        return Fused(fused_delta(tasks, weights, how, generator(0, name)))
    return Trimmed([(_owned(d), w) for d, w in ordered(tasks, weights)], weights, how)


def unmasked(fine: FineTune, name: str, how: Fusion, own: Tensor, workspace: Workspace) -> Tensor:
    """A weight that changed and has no mask, as the merge will write it: the fine-tune's, or several fused plainly.

    Args:
        own: the aligned model's weight, of which rows that a fine-tune lacks are kept.
    """
    base, tasks = fine.read(name, workspace)
    method = METHODS.get("somf")
    params = method.parameters({"fusion": how.kind, "scale": how.scale, "density": how.density, "drop": how.drop})
    merged = merge_tensor(
        method, params, GlobalStats(1.0, 0.0, 1.0), name=name, base=base, tasks=tasks,
        safety=Delta(tuple(base.shape)), weights=fine.weights,
    )  # fmt: skip
    out = own.float().cpu().clone()
    out[: len(base) if base.dim() else None] = base + (merged.dense() if merged else tasks[0].dense())
    return out


def placed(change: Held, device: torch.device | str, dtype: torch.dtype) -> Held:
    """The change on ``device``; what is dense in ``dtype``, factors in float32."""

    def put(delta: Delta) -> Delta:
        there = delta.to(device)
        return there if there.full is None else Delta(there.shape, full=there.full.to(dtype), scale=there.scale)

    if isinstance(change, Fused):
        return Fused(put(change.delta))
    parts = [(put(d), w) for d, w in change.parts]
    return Factors(parts) if isinstance(change, Factors) else Trimmed(parts, change.weights, change.how)


def _owned(delta: Delta) -> Delta:
    return delta if delta.full is None else Delta(delta.shape, full=delta.full.clone(), scale=delta.scale)
