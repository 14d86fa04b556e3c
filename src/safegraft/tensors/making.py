"""Making a safety vector: from two checkpoints, or from changes that are known already."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, MismatchError, NumericError
from ..manifest import digest_of, new_manifest
from .checkpoint import Checkpoint
from .compat import check_vector_pair
from .files import build_layout
from .lowrank import Delta, sum_of_squares, thin_svd
from .scopes import SCOPES, LayerRange, Scope, chosen_weights, in_scope
from .shards import sha256
from .source import TensorSpec, Workspace, all_finite, as_bytes
from .vector import KIND, VECTOR, SafetyVector, effective_rank, is_matrices, stored_keys
from .writer import OutputFolder

KEEP = 0.5


@dataclass(frozen=True)
class Stored:
    """How a vector is stored. ``rank``: directions of each matrix, None for the whole delta. ``keep``: share of the
    directions, 0 < keep ≤ 1, whose singular triplets are stored for the merge."""

    rank: int | None = None
    keep: float = KEEP

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank {self.rank} is below 1", "Leave the rank out to keep the whole difference.")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep {self.keep} is outside (0, 1]")

    def directions(self, shape: tuple[int, ...]) -> int:
        """How many triplets of a matrix of this shape are stored."""
        short = min(shape[-2:])
        return min(self.rank, short) if self.rank is not None and len(shape) == 2 else int(self.keep * short)

    def specs(self, name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        """What the file holds for the weight ``name``."""
        whole = [TensorSpec(name, torch.float32, shape)]
        if not is_matrices(shape) or (k := self.directions(shape)) == 0:
            return whole
        lead, m, n = shape[:-2], shape[-2], shape[-1]
        factors = [
            TensorSpec(f"{name}#u", torch.float32, (*lead, m, k)),
            TensorSpec(f"{name}#s", torch.float32, (*lead, k)),
            TensorSpec(f"{name}#v", torch.float32, (*lead, n, k)),
        ]
        return factors if self.rank is not None and len(shape) == 2 else whole + factors

    def pieces(self, name: str, delta: Delta) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``specs``, by name."""
        specs = self.specs(name, delta.shape)
        if specs[0].name == name:
            yield name, delta.dense()
        if len(specs) == 1:
            return
        k = self.directions(delta.shape)
        if len(delta.shape) == 2:
            stack = [delta.svd(k)]
        else:
            stack = [thin_svd(matrix, k) for matrix in delta.dense().reshape(-1, *delta.shape[-2:])]
        u, s, v = (torch.zeros(len(stack), *spec.shape[len(delta.shape) - 2 :]) for spec in specs[-3:])
        for i, found in enumerate(stack):
            r = found.s.numel()
            u[i, :, :r], s[i, :r], v[i, :, :r] = found.u, found.s, found.v
        for spec, tensor in zip(specs[-3:], (u, s, v), strict=True):
            yield spec.name, tensor.reshape(spec.shape)


def subtract(
    aligned: str | Path,
    unaligned: str | Path,
    out: str | Path,
    *,
    scope: Scope = "attention",
    layers: LayerRange | None = None,
    rank: int | None = None,
    keep: float = KEEP,
    force: bool = False,
    resume: bool = False,
    method: str = "subtract",
    provenance: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SafetyVector:
    """Make a safety vector: Δ = ``aligned`` − ``unaligned``, over the tensors in ``scope`` that differ.

    Args:
        aligned: the model that refuses; a folder or Hub id. unaligned: the same model without its safety (the base it
            was aligned from, an abliterated copy, a surrogate fine-tuned on compliance).
        scope: see ``scopes``. layers: only these decoder layers, the first and the one after the last.
        rank: keep only the leading ``rank`` ≥ 1 directions of each matrix; None keeps the whole difference.
        keep: share of directions, 0 < keep ≤ 1, whose singular triplets are stored for the merge.
        force: replace an existing ``out``. resume: go on with a run that was killed.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: a value out of range. MismatchError: the models have different tensors in scope, or none differ.
        CheckpointError, NumericError, OutputError: see safegraft.errors.
    """
    if scope not in SCOPES:
        raise ConfigError(f"scope {scope!r} is not one of {', '.join(SCOPES)}")
    stored = Stored(rank, keep)
    first, second = Checkpoint.open(aligned), Checkpoint.open(unaligned)
    chosen = first.names() if layers is None else chosen_weights(first.names(), scope, layers=layers)
    names = [n for n in chosen if in_scope(n, scope) and first.is_mergeable(n) and n not in first.tied]
    check_vector_pair(first, second, names, scope)

    workspace = Workspace()
    squares: dict[str, float] = {}
    digests: dict[str, dict[str, str]] = {"aligned": {}, "unaligned": {}}
    total = 2 * sum(first.spec(n).nbytes for n in names)
    done = 0

    def advance(name: str) -> None:
        nonlocal done
        done += first.spec(name).nbytes
        if progress:
            progress(done, total)

    for name in names:
        difference = _difference(first, second, name, workspace, digests)
        squares[name] = sum_of_squares(difference)
        advance(name)
    shapes = {n: first.spec(n).shape for n in names if squares[n] > 0}
    if not shapes:
        raise MismatchError(
            f"{first.label} and {second.label} are identical in scope {scope!r}: there is no safety vector",
            "Give the model without its safety second, or choose the scope in which the two differ.",
        )
    settings: dict[str, Any] = {"scope": scope, "rank": rank, "keep": keep, "method": method}
    if layers is not None:
        settings["layers"] = list(layers)
    return write_vector(
        out,
        shapes,
        lambda name: Delta(shapes[name], full=_difference(first, second, name, workspace, None)),
        stored,
        settings=settings,
        identity={"kind": KIND, "settings": settings, "digests": digests},
        inputs={
            "aligned": {"name": first.label, "sha256": digest_of(digests["aligned"]), "config": family(first)},
            "unaligned": {"name": second.label, "sha256": digest_of(digests["unaligned"])},
        },
        full_norm=sum(squares.values()) ** 0.5,
        provenance=provenance,
        force=force,
        resume=resume,
        written=advance,
    )


def write_vector(
    out: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    change: Callable[[str], Delta],
    stored: Stored,
    *,
    settings: dict[str, Any],
    identity: dict[str, Any],
    inputs: dict[str, Any],
    full_norm: float,
    provenance: dict[str, Any] | None = None,
    more: Callable[[dict[str, dict[str, Any]]], dict[str, Any]] | None = None,
    given: list[str] | None = None,
    seed: int | None = None,
    force: bool = False,
    resume: bool = False,
    written: Callable[[str], None] | None = None,
) -> SafetyVector:
    """Write the vector whose weights have ``shapes`` and whose deltas ``change`` gives, one at a time.

    Args:
        settings: for the manifest: ``scope``, ``rank``, ``keep``, ``method`` and what else decided the result.
        identity: JSON-able; what a resumed run must have in common. inputs: for the manifest, with digests.
        full_norm: ‖Δ‖ before it was cut to a rank. provenance: where it comes from.
        more: given the table of written tensors (``shape``, ``norm``, ``effective_rank`` of each), further keys of the
            manifest. written: called with each weight that is finished.
    """
    specs = [spec for name, shape in shapes.items() for spec in stored.specs(name, shape)]
    layout = build_layout(VECTOR, specs, {"format": "pt"})
    folder = OutputFolder(Path(out), [layout], identity=digest_of(identity), force=force, resume=resume)
    kept: dict[str, dict[str, Any]] = {}
    with folder:
        for name, shape in shapes.items():
            if any(spec.name not in folder.finished for spec in stored.specs(name, shape)):
                for key, tensor in stored.pieces(name, change(name)):
                    data = as_bytes(tensor.contiguous())
                    folder.write(key, data)
                    figures = {"norm": math.sqrt(sum_of_squares(tensor))}
                    if key.endswith("#s"):
                        figures["effective_rank"] = effective_rank(tensor)
                    folder.done(key, sha256(data), figures)
            counted = f"{name}#s" if len(stored_keys(name, shape, stored.rank)) > 1 else name
            kept[name] = {"shape": list(shape), "norm": folder.figures[counted]["norm"]}
            if f"{name}#s" in folder.figures:
                kept[name]["effective_rank"] = folder.figures[f"{name}#s"].get("effective_rank")
            if written:
                written(name)
        manifest = new_manifest(KIND, config=settings, inputs=inputs, given=given, seed=seed)
        manifest |= settings
        manifest["norm"] = sum(t["norm"] ** 2 for t in kept.values()) ** 0.5
        manifest["full_norm"] = full_norm
        manifest["provenance"] = provenance or {}
        manifest |= more(kept) if more else {}
        manifest["tensors"] = kept
        folder.finish(manifest)
    return SafetyVector(out)


def family(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a vector's manifest says of the architecture it belongs to."""
    return {k: checkpoint.config[k] for k in ("architectures", "model_type") if k in checkpoint.config}


def _difference(
    a: Checkpoint, b: Checkpoint, name: str, workspace: Workspace, digests: dict[str, dict[str, str]] | None
) -> Tensor:
    first = a.read_float(name, workspace, "first")
    second = b.read_float(name, workspace, "second")
    if digests is not None:
        digests["aligned"][name], digests["unaligned"][name] = sha256(as_bytes(first)), sha256(as_bytes(second))
    first.sub_(second)
    if not all_finite(first):
        raise NumericError(f"{name} holds NaN or Inf in {a.label} or {b.label}", "Fetch or train that model again.")
    return first
