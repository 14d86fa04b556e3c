"""A merge applied to a loaded model, in memory, again and again: to try strengths without writing checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..tensors.calibration import Calibration
from ..tensors.finetune import FineTune
from ..tensors.lowrank import Delta
from ..tensors.scopes import Scope, in_scope
from ..tensors.source import Workspace
from ..tensors.vector import SafetyVector
from . import methods as _methods
from .calibrated import calibrated
from .execute import merge_tensor
from .method import METHODS, GlobalStats, Method
from .run import scale
from .survey import Survey, survey

_ = _methods


@dataclass(frozen=True)
class Graft:
    """A fine-tune, its base and a vector or a calibration, opened and surveyed, beside the same fine-tune loaded as a
    model. ``names``: the weights that are decided on."""

    fine: FineTune
    vector: SafetyVector | None
    calibration: Calibration | None
    found: Survey
    names: tuple[str, ...]
    parameters: Mapping[str, nn.Parameter]

    @torch.no_grad()
    def apply(
        self,
        strength: float,
        *,
        method: str = "interference",
        match_norm: bool | None = None,
        params: Mapping[str, Any] | None = None,
        scope: Scope | None = None,
    ) -> dict[str, dict[str, float]]:
        """Put the merge's weights into the model, whatever it held before. Returns the method's figures by tensor.

        Args as in safegraft.merge. Raises ConfigError, NumericError.
        """
        chosen: Method = METHODS.get(method)
        held = "vector" if self.calibration is None else "calibration"
        if chosen.needs != held:
            raise ConfigError(f"{method} needs a {chosen.needs}, so its strength cannot be tried with a {held}")
        settings = chosen.parameters(dict(params or {}))
        matched = chosen.match_norm if match_norm is None else match_norm
        taken = {name for name in self.names if scope is None or in_scope(name, scope)}
        norm = math.sqrt(sum(self.found.tensors[name].safety_sq for name in taken))
        alpha = strength
        if self.calibration is None:
            alpha = scale(strength, self.found, match_norm=matched, safety_norm=norm)
        stats = GlobalStats(self.found.task_norm, norm, alpha)
        workspace, figures = Workspace(), {}
        for name in self.names:
            base, tasks = self.fine.read(name, workspace)
            safety, hessian = Delta(tuple(base.shape)), None
            if name in taken and self.vector is not None:
                safety = self.fine.safety(name, self.vector, workspace).scaled(alpha)
            if name in taken and self.calibration is not None:
                hessian = self.calibration.hessian(self.fine.pairing.counterparts[name], workspace)
            merged = merge_tensor(
                chosen, settings, stats, name=name, base=base, tasks=tasks, safety=safety, hessian=hessian
            )
            self._put(name, base, merged.dense() if merged else tasks[0].dense())
            if merged:
                figures[name] = merged.figures
        return figures

    @torch.no_grad()
    def restore(self) -> None:
        """Put the fine-tune's own weights back."""
        workspace = Workspace()
        for name in self.names:
            base, (task,) = self.fine.read(name, workspace)
            self._put(name, base, task.dense())

    def change(self) -> float:
        """‖τ‖/‖W_b‖ over the weights that are decided on."""
        told = [self.found.tensors[name] for name in self.names]
        return math.sqrt(sum(t.task_sq for t in told) / sum(t.base_sq for t in told))

    def _put(self, name: str, base: torch.Tensor, delta: torch.Tensor) -> None:
        self.parameters[name][: len(base) if base.dim() else None].copy_(base + delta)


@contextmanager
def graft(
    model: nn.Module,
    tuned: str | Path,
    base: str | Path | None,
    vector: str | Path | None = None,
    *,
    calibration: str | Path | None = None,
) -> Iterator[Graft]:
    """Open the checkpoints behind a loaded fine-tune; its own weights are back when the block is left.

    Args:
        model: ``tuned`` as transformers loads it, whose parameters are named as in the checkpoint.
        vector, calibration: one of the two.

    Raises:
        ConfigError: see require_one. CheckpointError: a tensor that is decided on is no parameter of
        ``model``. Others: see FineTune.open, survey, calibrated.
    """
    require_one(vector, calibration)
    opened = None if vector is None else SafetyVector(vector)
    known = None if calibration is None else Calibration(calibration)
    fine = FineTune.open(tuned, base, opened)
    names = tuple(fine.pairing.deltas) if known is None else tuple(calibrated(fine, known))
    parameters = dict(model.named_parameters())
    missing = [name for name in names if name not in parameters]
    if missing:
        raise CheckpointError(
            f"the loaded model has no parameter {missing[0]}: its checkpoint names its weights otherwise",
            "Load the model with transformers from the same folder, without renaming its weights.",
        )
    found = survey(fine, opened, torch.get_num_threads())
    live = Graft(fine, opened, known, found, names, parameters)
    try:
        yield live
    finally:
        live.restore()


def require_one(vector: str | Path | None, calibration: str | Path | None) -> None:
    """Raise ConfigError unless one of the two is given."""
    if (vector is None) == (calibration is None):
        raise ConfigError("one of a vector and a calibration is needed", "Give either --vector or --calibration.")
