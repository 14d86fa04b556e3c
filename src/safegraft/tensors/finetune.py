"""The fine-tune, whether a whole checkpoint or an adapter on its base, as weights plus a task delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .adapter import Adapter, is_adapter, open_base_of
from .checkpoint import Checkpoint, fingerprint, resolve
from .compat import Pairing, pair
from .lowrank import Delta
from .source import Workspace
from .vector import SafetyVector


class FineTune:
    """A fine-tune beside its base.

    Attributes:
        layout: the checkpoint whose shards, dtypes and sidecars an output takes (the fine-tune, or an adapter's base).
        base: what it was fine-tuned from. adapter: the adapter, if it is one. pairing: how the names correspond.
    """

    def __init__(self, layout: Checkpoint, base: Checkpoint, adapter: Adapter | None, pairing: Pairing) -> None:
        self.layout, self.base, self.adapter, self.pairing = layout, base, adapter, pairing
        self.label = adapter.label if adapter else layout.label

    @classmethod
    def open(cls, model: str | Path, base: str | Path | None, vector: SafetyVector | None) -> FineTune:
        """Open both and check that they fit (headers only).

        Raises:
            ConfigError: no base given and none known. CheckpointError, MismatchError: see Checkpoint, pair.
        """
        path = resolve(model)
        if is_adapter(path):
            parent = open_base_of(path, base)
            adapter = Adapter(path, parent, label=str(model))
            return cls(parent, parent, adapter, pair(parent, parent, vector))
        if base is None:
            raise ConfigError("the base is missing", "Name the model that --model was fine-tuned from with --base.")
        layout, parent = Checkpoint(path, label=str(model)), Checkpoint.open(base)
        return cls(layout, parent, None, pair(layout, parent, vector))

    def rows(self, name: str) -> int | None:
        """How many leading rows take part, where the vocabularies differ; None for all."""
        return self.pairing.common_rows.get(name)

    def changes(self, name: str) -> bool:
        """Whether the fine-tune may differ from its base in ``name``."""
        return self.adapter is None or name in self.adapter

    def read(self, name: str, workspace: Workspace) -> tuple[Tensor, Delta]:
        """``(W_b, τ)`` of one tensor in float32 over its common rows, in ``workspace``'s memory."""
        rows = self.rows(name)
        base = self.base.read_float(self.pairing.counterparts[name], workspace, "base")[:rows]
        if self.adapter is not None:
            return base, self.adapter.delta(name, base) if name in self.adapter else Delta(tuple(base.shape))
        task = self.layout.read_float(name, workspace, "task")[:rows].sub_(base)
        return base, Delta(tuple(task.shape), full=task)

    def safety(self, name: str, vector: SafetyVector, workspace: Workspace, *, check: bool = False) -> Delta:
        """Δ of one tensor over its common rows; ``check`` as in SafetyVector.delta."""
        delta = vector.delta(self.pairing.deltas[name], workspace, check=check)
        rows = self.rows(name)
        if rows is None or rows == delta.shape[0]:
            return delta
        return Delta((rows, *delta.shape[1:]), full=delta.dense()[:rows])

    def fingerprints(self) -> dict[str, Any]:
        """Enough of the inputs to notice that one changed between two runs."""
        out = {"model": fingerprint(self.layout.path), "base": fingerprint(self.base.path)}
        if self.adapter:
            out["adapter"] = fingerprint(self.adapter.path)
        return out
