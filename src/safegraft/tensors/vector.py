"""The safety vector on disk.

A folder with ``vector.safetensors`` and ``manifest.json``. For a weight ``N``: dense vectors hold ``N`` (float32) and,
for matrices, its leading singular triplets ``N#u`` [m, k], ``N#s`` [k], ``N#v`` [n, k]; low-rank vectors hold only
``N#u``, ``N#s``, ``N#v``, and the delta is their product. Stacks of matrices (fused experts) carry a leading dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, MismatchError
from . import ahead
from .files import Entry, ShardFile, read_manifest
from .lowrank import Delta, LowRank, Svd
from .scopes import Scope, in_scope
from .shards import sha256
from .source import TensorSpec, Workspace, as_bytes

VECTOR = "vector.safetensors"
KIND = "safegraft safety vector"


class SafetyVector:
    """A saved safety vector Δ = W_aligned − W_unaligned, read lazily.

    Args:
        scope: take only its tensors that belong to this scope, as if it held no others. directions: whether the
            singular triplets stored beside whole deltas are read with them.

    Attributes:
        path, manifest: where it lies and what it says of itself. norm: ‖Δ‖₂ over its tensors.

    Raises:
        CheckpointError: the folder is not a safety vector, or is not whole. MismatchError: none of its tensors belongs
        to ``scope``.
    """

    def __init__(self, path: str | Path, scope: Scope | None = None, *, directions: bool = True) -> None:
        self.path = Path(path)
        self.label, self.scope, self.directions = str(path), scope, directions
        self.manifest: dict[str, Any] = read_manifest(
            self.path, VECTOR, KIND, ("tensors", "rank", "norm", "inputs", "config", "outputs"),
            "Make one: safegraft vector subtract ALIGNED UNALIGNED --out VECTOR",
        )  # fmt: skip
        self.file = ShardFile(self.path / VECTOR)
        stored = self.file.layout.entries
        self._shapes = {name: tuple(item["shape"]) for name, item in self.manifest["tensors"].items()}
        self.rank: int | None = self.manifest["rank"]
        needed = [key for name, shape in self._shapes.items() for key in stored_keys(name, shape, self.rank)]
        missing = [key for key in needed if key not in stored]
        if missing:
            raise CheckpointError(f"{path} is damaged: {VECTOR} lacks {missing[0]} and {len(missing) - 1} more")
        for name, shape in self._shapes.items():
            found = stored[name].spec.shape if name in stored else _outer(stored[f"{name}#u"], stored[f"{name}#v"])
            if found != shape:
                raise CheckpointError(f"{path} is damaged: {name} is {list(found)}, its manifest says {list(shape)}")
        self.norm = float(self.manifest["norm"])
        if scope is not None:
            self._shapes = {name: shape for name, shape in self._shapes.items() if in_scope(name, scope)}
            if not self._shapes:
                raise MismatchError(
                    f"{path} holds no tensor of scope {scope}",
                    f"It was made with scope {self.manifest['config'].get('scope')}; see `safegraft vector info`.",
                )
            self.norm = math.sqrt(sum(self.tensor_norm(name) ** 2 for name in self._shapes))
        self._digests: dict[str, str] = self.manifest["outputs"]["tensors"]

    def doubts(self) -> list[str]:
        """What was found wrong with it when it was distilled, as sentences."""
        told = self.manifest.get("validity") or {}
        return [f"{self.label}: {warning}" for warning in told.get("warnings", [])]

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, torch.float32, self._shapes[name])

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self.delta(name, Workspace()).dense().to(device)

    def tensor_norm(self, name: str) -> float:
        return float(self.manifest["tensors"][name]["norm"])

    def delta(self, name: str, workspace: Workspace, *, check: bool = False) -> Delta:
        """Δ of one tensor, in ``workspace``'s memory or on its device, with its stored singular triplets.

        Raises:
            CheckpointError: with ``check``, the bytes read are not those the manifest has the digest of.
        """
        shape, keys = self._shapes[name], self.keys(name)
        full = self._get(name, workspace, "vector.full", check) if name in keys else None
        known = None
        if f"{name}#s" in keys:
            s = self._get(f"{name}#s", workspace, "vector.s", check)
            known = Svd(
                self._get(f"{name}#u", workspace, "vector.u", check),
                s,
                self._get(f"{name}#v", workspace, "vector.v", check),
                complete=full is None or bool((s[..., -1:] == 0).all()),
            )
        if full is not None:
            return Delta(shape, full=full, known=known)
        assert known is not None
        return Delta(shape, low=LowRank(known.u * known.s, known.v), known=known)

    def keys(self, name: str) -> list[str]:
        """What is read of the file for ``delta``."""
        stored = self.file.layout.entries
        triplets = self.directions or name not in stored
        return [key for key in (name, *(f"{name}#{part}" for part in "usv" if triplets)) if key in stored]

    def rows(self, name: str, first: int, count: int, workspace: Workspace) -> Delta:
        """``count`` rows of a matrix's Δ from ``first``, as factors where the vector holds those; or entries of a
        tensor of one dimension."""
        entry = self.file.layout.entries.get(name)
        if entry is None:
            whole = self.delta(name, workspace).low
            assert whole is not None
            part = LowRank(whole.left[first : first + count], whole.right)
            return Delta(part.shape, low=part)
        shape = self._shapes[name]
        out = workspace.take("vector.rows", (count, *shape[1:]), entry.spec.dtype)
        self.file.read_into(as_bytes(out), entry.offset + first * math.prod(shape[1:]) * entry.spec.dtype.itemsize)
        return Delta(tuple(out.shape), full=workspace.lift("vector.rows", out))

    def _get(self, key: str, workspace: Workspace, slot: str, check: bool = False) -> Tensor:
        entry = self.file.layout.entries[key]
        out = workspace.take(slot, entry.spec.shape, entry.spec.dtype)
        self.file.read_into(as_bytes(out), entry.offset)
        if check and self._digest(entry, out) != self._digests.get(key):
            raise CheckpointError(
                f"{self.label}: the bytes of {key} are not those its manifest was written for",
                "The vector was changed or damaged; make or fetch it again.",
            )
        return workspace.lift(slot, out)

    def _digest(self, entry: Entry, read: Tensor) -> str:
        return ahead.known(self.file.fd, entry.offset, entry.spec.nbytes) or sha256(as_bytes(read))


def describe(vector: SafetyVector) -> Iterator[dict[str, Any]]:
    """Per tensor: name, shape, norm, RMS, and the effective rank of its stored directions.

    Effective rank is exp(entropy of σ²/Σσ²) (Roy & Vetterli 2007, with energies), over the stored triplets: a lower
    bound for dense vectors whose triplets are truncated.
    """
    workspace = Workspace()
    for name in vector.names():
        spec = vector.spec(name)
        row: dict[str, Any] = {"name": name, "shape": spec.shape, "norm": vector.tensor_norm(name)}
        row["rms"] = row["norm"] / spec.numel**0.5
        row["effective_rank"] = None
        if f"{name}#s" in vector.file.layout.entries:
            row["effective_rank"] = effective_rank(vector._get(f"{name}#s", workspace, "describe"))
        yield row


def effective_rank(s: Tensor) -> float:
    """exp(entropy of σ²/Σσ²) of singular values ``s``, of any shape; 0 where all are 0."""
    energy = s.double().reshape(-1) ** 2
    if not energy.any():
        return 0.0
    share = energy[energy > 0] / energy.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def is_matrices(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape is a matrix or a stack of them that has an SVD."""
    return len(shape) in (2, 3) and min(shape[-2:]) >= 2


def _outer(u: Entry, v: Entry) -> tuple[int, ...]:
    return u.spec.shape[0], v.spec.shape[0]


def stored_keys(name: str, shape: tuple[int, ...], rank: int | None) -> list[str]:
    """What must be in the file for a delta of this shape to be whole."""
    if rank is not None and len(shape) == 2 and is_matrices(shape):
        return [f"{name}#u", f"{name}#s", f"{name}#v"]
    return [name]
