"""What a model's linear layers were given on safety-relevant prompts: one matrix H = XᵀX/rows an input, on disk.

A folder with ``calibration.safetensors`` and ``manifest.json``. Weights that read the same input (q, k and v; gate and
up) share one matrix, stored under the first one's name; the manifest's ``weights`` says which weight has which.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, MismatchError
from .checkpoint import Checkpoint
from .files import ShardFile, read_manifest
from .shards import sha256
from .source import Workspace, as_bytes

FILE = "calibration.safetensors"
KIND = "safegraft calibration"


class Calibration:
    """A saved calibration, read lazily.

    Attributes:
        path, manifest: where it lies and what it says of itself. label: how the user named it.

    Raises:
        CheckpointError: the folder is not a calibration, or is not whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.label = Path(path), str(path)
        self.manifest: dict[str, Any] = read_manifest(
            self.path, FILE, KIND, ("weights", "inputs", "config", "outputs"),
            "Make one from the aligned model: safegraft calibrate ALIGNED --out CALIBRATION",
        )  # fmt: skip
        self.file = ShardFile(self.path / FILE)
        self._weights: dict[str, dict[str, str]] = self.manifest["weights"]
        stored = self.file.layout.entries
        for name, item in self._weights.items():
            spec = stored[item["input"]].spec if item["input"] in stored else None
            if spec is None or len(set(spec.shape)) != 1 or len(spec.shape) != 2 or spec.dtype != torch.float32:
                raise CheckpointError(f"{path} is damaged: {FILE} has no square float32 matrix for {name}")

    def names(self) -> Sequence[str]:
        """The weights that have a matrix, under the aligned model's names."""
        return list(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def size(self, name: str) -> int:
        """n of a weight's H [n, n]."""
        return self.file.layout.entries[self._weights[name]["input"]].spec.shape[0]

    def hessian(self, name: str, workspace: Workspace) -> Tensor | None:
        """H [n, n] of a weight [m, n] in float32, in ``workspace``'s memory or on its device; None where there is none.

        Raises:
            CheckpointError: the bytes are not those the manifest has the digest of.
        """
        if name not in self._weights:
            return None
        key = self._weights[name]["input"]
        entry = self.file.layout.entries[key]
        out = workspace.take("hessian", entry.spec.shape, torch.float32)
        self.file.read_into(as_bytes(out), entry.offset)
        if sha256(as_bytes(out)) != self.manifest["outputs"]["tensors"].get(key):
            raise CheckpointError(
                f"{self.label}: the bytes of {key} are not those its manifest was written for",
                "The calibration was changed or damaged; make it again.",
            )
        return workspace.lift("hessian", out)

    def check_base(self, base: Checkpoint) -> None:
        """Raise MismatchError unless every weight here is in ``base`` with as many columns (headers only)."""
        lost = [n for n in self.names() if n not in base]
        if lost:
            raise MismatchError(
                f"{base.label} has no {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
                + f", which the calibration {self.label} is about",
                "Calibrate on the base itself: the aligned model that the fine-tune was made from.",
            )  # fmt: skip
        for name in self.names():
            shape = base.spec(name).shape
            if len(shape) != 2 or shape[1] != self.size(name):
                raise MismatchError(
                    f"{name} of {base.label} is {list(shape)}; the calibration {self.label} has inputs of "
                    f"{self.size(name)}",
                    "Calibrate on the base itself: the aligned model that the fine-tune was made from.",
                )

    def differing(self, digests: dict[str, str]) -> list[str]:
        """The weights whose bytes were others when this was made; ``digests``: SHA-256 by the aligned model's names."""
        return [n for n, item in self._weights.items() if n in digests and digests[n] != item["sha256"]]
