"""A learnt mask on disk: which part of fine-tunes' changes is safe to keep.

A folder with ``mask.safetensors`` and ``manifest.json``. For a weight ``N`` of the aligned model there are its logits
``N`` (float32 or bfloat16, shaped as the granularity says); of a mask over LoRA factors ``N#left`` [m, r] and
``N#right`` [n, r], where the update of ``N`` [m, n] is the product of its left factor and its right factor transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, MismatchError
from ..manifest import digest_of
from .checkpoint import Checkpoint
from .files import ShardFile, build_layout, read_manifest
from .masking import Grain, Logits
from .shards import sha256
from .source import TensorSpec, Workspace, as_bytes
from .writer import OutputFolder

FILE = "mask.safetensors"
KIND = "safegraft mask"
SIDES = ("#left", "#right")
Masking = Logits | tuple[Logits, Logits]
"""The logits of a weight, or those of its left and its right LoRA factor."""


class Mask:
    """A saved mask, read lazily; a TensorSource of its logits.

    Attributes:
        path, manifest: where it lies and what it says of itself. label: how the user named it. grain: which entries
            share a logit. factors: whether it is one over LoRA factors.

    Raises:
        CheckpointError: the folder is not a mask, or is not whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.label = Path(path), str(path)
        self.manifest: dict[str, Any] = read_manifest(
            self.path, FILE, KIND, ("tensors", "inputs", "config", "fusion", "outputs"),
            "Learn one: safegraft somf train --aligned ALIGNED --model FINETUNE --out MASK",
        )  # fmt: skip
        config = self.manifest["config"]
        self.grain = Grain(config["granularity"], config["block"])
        self.factors = bool(config["mask_factors"])
        self.temperature = float(config["temperature"])
        self.file = ShardFile(self.path / FILE)
        self._shapes = {name: tuple(item["shape"]) for name, item in self.manifest["tensors"].items()}
        stored = self.file.layout.entries
        for name, shape in self._shapes.items():
            for key, expected in self._expected(name, shape).items():
                found = stored[key].spec.shape if key in stored else None
                if found is None or (expected is not None and found != expected):
                    raise CheckpointError(f"{path} is damaged: {FILE} has no logits {key} of shape {expected}")

    @property
    def weights(self) -> Sequence[str]:
        """The masked weights, under the aligned model's names."""
        return list(self._shapes)

    def __contains__(self, weight: object) -> bool:
        return weight in self._shapes

    def names(self) -> Sequence[str]:
        return list(self.file.layout.entries)

    def spec(self, name: str) -> TensorSpec:
        return self.file.layout.entries[name].spec

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self._get(name, Workspace(), "mask").clone().to(device)

    def masking(self, weight: str, workspace: Workspace) -> Masking:
        """The logits of one weight, in ``workspace``'s memory or on its device.

        Raises:
            CheckpointError: the bytes are not those the manifest has the digest of.
        """
        shape = self._shapes[weight]
        if not self.factors:
            return Logits(self._get(weight, workspace, "mask"), shape, self.grain)
        left, right = (self._get(weight + side, workspace, f"mask{side}") for side in SIDES)
        return Logits(left, tuple(left.shape), self.grain), Logits(right, tuple(right.shape), self.grain)

    def check_base(self, base: Checkpoint) -> None:
        """Raise MismatchError unless ``base`` has every masked weight in the same shape (headers only)."""
        wrong = [n for n, shape in self._shapes.items() if n not in base or base.spec(n).shape != shape]
        if wrong:
            found = list(base.spec(wrong[0]).shape) if wrong[0] in base else "not there"
            raise MismatchError(
                f"{wrong[0]} is {list(self._shapes[wrong[0]])} in the mask {self.label} and {found} in {base.label}"
                + (f"; {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""),
                "Give the aligned model that the mask was learnt on.",
            )

    def _expected(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...] | None]:
        if self.factors:
            return dict.fromkeys((name + side for side in SIDES), None)
        return {name: self.grain.shape(shape)}

    def _get(self, key: str, workspace: Workspace, slot: str) -> Tensor:
        entry = self.file.layout.entries[key]
        out = workspace.take(slot, entry.spec.shape, entry.spec.dtype)
        self.file.read_into(as_bytes(out), entry.offset)
        if sha256(as_bytes(out)) != self.manifest["outputs"]["tensors"].get(key):
            raise CheckpointError(
                f"{self.label}: the bytes of {key} are not those its manifest was written for",
                "The mask was changed or damaged; learn it again.",
            )
        return workspace.lift(slot, out)


def moved(masking: Masking, device: torch.device) -> Masking:
    """The same logits on another device."""
    if isinstance(masking, Logits):
        return masking.to(device)
    return masking[0].to(device), masking[1].to(device)


def write_mask(out: Path, logits: Mapping[str, Tensor], manifest: dict[str, Any], *, force: bool) -> Mask:
    """Write a mask's folder, whole or not at all. ``logits``: by their names in the file. Raises OutputError."""
    specs = [TensorSpec(name, s.dtype, tuple(s.shape)) for name, s in logits.items()]
    layout = build_layout(FILE, specs, {"format": "pt"})
    with OutputFolder(out, [layout], identity=digest_of(manifest["config"]), force=force) as folder:
        for name, s in logits.items():
            data = as_bytes(s.detach().cpu().contiguous())
            folder.write(name, data)
            folder.done(name, sha256(data))
        folder.finish(manifest)
    return Mask(out)
