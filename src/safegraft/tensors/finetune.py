"""The fine-tunes, whether whole checkpoints or adapters on their base, as weights plus task deltas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, MismatchError
from .adapter import Adapter, is_adapter, open_base_of
from .checkpoint import Checkpoint, fingerprint, resolve
from .compat import Pairing, pair
from .lowrank import Delta
from .source import Workspace
from .vector import SafetyVector

Seen = Callable[[int, Tensor], None]
"""Called with the number of a checkpoint and some of a tensor's entries, flat, in their stored dtype."""

PIECE = 1 << 18
"""Entries of a tensor that a method is given at a time where it goes entry by entry; for TIES fewer are slower."""


class FineTune:
    """One or several fine-tunes beside their base.

    Attributes:
        layout: the checkpoint whose shards, dtypes and sidecars an output takes (the first fine-tune, or an adapter's
            base). base: what all were fine-tuned from. adapter: the first fine-tune, if it is an adapter. pairing: how
            the names correspond. others: the further fine-tunes. weights: one a fine-tune, > 0.
    """

    def __init__(
        self,
        layout: Checkpoint,
        base: Checkpoint,
        adapter: Adapter | None,
        pairing: Pairing,
        others: Sequence[FineTune] = (),
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.layout, self.base, self.adapter, self.pairing = layout, base, adapter, pairing
        self.others, self.weights = tuple(others), tuple(weights)
        self.label = adapter.label if adapter else layout.label
        self._here = {there: name for name, there in pairing.counterparts.items()}

    @classmethod
    def open(
        cls,
        model: str | Path | Sequence[str],
        base: str | Path | None,
        vector: SafetyVector | None,
        weights: Sequence[float] | None = None,
    ) -> FineTune:
        """Open all of them and check that they fit (headers only).

        Raises:
            ConfigError: no base given and none known. CheckpointError, MismatchError: see Checkpoint, pair.
        """
        models = [model] if isinstance(model, str | Path) else list(model)
        given = list(weights) if weights is not None else [1.0] * len(models)
        first, *rest = (cls._one(m, base, vector if i == 0 else None) for i, m in enumerate(models))
        for other in rest:
            if other.base.path != first.base.path:
                raise MismatchError(
                    f"{first.label} is a fine-tune of {first.base.label}, {other.label} of {other.base.label}",
                    "Fuse fine-tunes of one base, or name it with --base.",
                )
            lost = [n for n, there in first.pairing.counterparts.items() if other._name(n, there) is None]
            if lost:
                raise MismatchError(
                    f"{other.label} does not store {len(lost)} tensor(s) that {first.label} does, e.g. {lost[0]}",
                    "Save both with the same settings for tied weights.",
                )
        return cls(first.layout, first.base, first.adapter, first._shared(rest), rest, given)

    @classmethod
    def _one(cls, model: str | Path, base: str | Path | None, vector: SafetyVector | None) -> FineTune:
        path = resolve(model)
        if is_adapter(path):
            parent = open_base_of(path, base)
            adapter = Adapter(path, parent, label=str(model))
            return cls(parent, parent, adapter, pair(parent, parent, vector))
        if base is None:
            raise ConfigError("the base is missing", "Name the model that --model was fine-tuned from with --base.")
        layout, parent = Checkpoint(path, label=str(model)), Checkpoint.open(base)
        return cls(layout, parent, None, pair(layout, parent, vector))

    def _shared(self, others: Sequence[FineTune]) -> Pairing:
        """This pairing over the rows that every fine-tune has."""
        rows, notes = dict(self.pairing.common_rows), list(self.pairing.notes)
        for other in others:
            notes += [note for note in other.pairing.notes if note not in notes]
            for name, there in self.pairing.counterparts.items():
                fewer = other.rows(other._name(name, there) or name)
                if fewer is not None:
                    rows[name] = min(rows.get(name, fewer), fewer)
        return replace(self.pairing, common_rows=rows, notes=notes)

    def _name(self, name: str, there: str) -> str | None:
        """This fine-tune's name of what another calls ``name`` and the base ``there``."""
        return name if name in self.pairing.counterparts else self._here.get(there)

    @property
    def fuses(self) -> bool:
        """Whether the result differs from the first fine-tune even without a vector."""
        return bool(self.others) or self.weights != (1.0,)

    def rows(self, name: str) -> int | None:
        """How many leading rows take part, where the vocabularies differ; None for all."""
        return self.pairing.common_rows.get(name)

    def changes(self, name: str) -> bool:
        """Whether the first fine-tune may differ from its base in ``name``."""
        return self.adapter is None or name in self.adapter

    def rank(self, name: str) -> int | None:
        """Rank of the first fine-tune's LoRA update of ``name``; None where it is none."""
        if self.adapter is None or name not in self.adapter.lora or name in self.adapter.replaced:
            return None
        return self.adapter.file.layout.entries[self.adapter.lora[name].a].spec.shape[0]

    def read(self, name: str, workspace: Workspace) -> tuple[Tensor, list[Delta]]:
        """``(W_b, [τ of every fine-tune])`` of one tensor in float32 over its common rows, in ``workspace``'s memory or
        on its device."""
        rows, there = self.rows(name), self.pairing.counterparts[name]
        base = self.base.read_float(there, workspace, "base")[:rows]
        return base, [
            fine._delta(fine._name(name, there) or name, base, workspace, f"task{i or ''}")
            for i, fine in enumerate((self, *self.others))
        ]

    def pieces(
        self, name: str, vector: SafetyVector | None, workspace: Workspace, seen: Seen | None = None
    ) -> Iterator[tuple[Tensor, list[Delta], Delta]]:
        """``(W_b, [τ of every fine-tune], Δ)`` of ``name`` over its common rows, a few rows at a time.

        For tensors of one or two dimensions, of checkpoints (see ``in_pieces``). Δ is zero without a ``vector``.
        ``seen`` is shown what was read of every checkpoint of ``stored``.
        """
        shape, rows = self.layout.spec(name).shape, self.rows(name)
        width = math.prod(shape[1:])
        step, rows = max(1, PIECE // width), shape[0] if rows is None else rows
        for start in range(0, rows, step):
            count = min(step, rows - start)
            place, form = (start * width, count * width), (count, *shape[1:])
            stored = []
            for i, (checkpoint, own) in enumerate(self.stored(name)):
                part = checkpoint.part(own, *place, workspace, f"piece{i}")
                if seen is not None:
                    seen(i, part)
                stored.append(workspace.lift_float(f"piece{i}", part).view(form))
            base, *tuned = stored
            tasks = [Delta(form, full=one.sub_(base)) for one in tuned]
            safety = Delta(form, device=base.device)
            if vector is not None:
                safety = vector.rows(self.pairing.deltas[name], start, count, workspace)
            yield base, tasks, safety

    def in_pieces(self, name: str) -> bool:
        """Whether ``pieces`` can be had: no fine-tune is an adapter, and the tensor no stack."""
        plain = 0 < len(self.layout.spec(name).shape) < 3 and self.layout.spec(name).numel > 0
        return plain and all(fine.adapter is None for fine in (self, *self.others))

    def stored(self, name: str) -> list[tuple[Checkpoint, str]]:
        """Where ``name`` is kept: ``(checkpoint, its name there)`` of the base, of ``layout``, and of the further
        fine-tunes that are checkpoints."""
        there = self.pairing.counterparts[name]
        others = [(o.layout, o._name(name, there) or name) for o in self.others if o.adapter is None]
        return [(self.base, there), (self.layout, name), *others]

    def _delta(self, name: str, base: Tensor, workspace: Workspace, slot: str) -> Delta:
        if self.adapter is not None:
            return (
                self.adapter.delta(name, base) if name in self.adapter else Delta(tuple(base.shape), device=base.device)
            )
        task = self.layout.read_float(name, workspace, slot)[: len(base) if base.dim() else None].sub_(base)
        return Delta(tuple(task.shape), full=task)

    def safety(self, name: str, vector: SafetyVector, workspace: Workspace, *, check: bool = False) -> Delta:
        """Δ of one tensor over its common rows; ``check`` as in SafetyVector.delta."""
        delta = vector.delta(self.pairing.deltas[name], workspace, check=check)
        rows = self.rows(name)
        if rows is None or rows == delta.shape[0]:
            return delta
        return Delta((rows, *delta.shape[1:]), full=delta.dense()[:rows])

    def fingerprints(self) -> dict[str, Any]:
        """Enough of the inputs to notice that one changed between two runs."""
        out: dict[str, Any] = {"model": fingerprint(self.layout.path), "base": fingerprint(self.base.path)}
        if self.adapter:
            out["adapter"] = fingerprint(self.adapter.path)
        if self.others:
            out["others"] = [other.fingerprints() for other in self.others]
        return out
