"""The difference between an aligned checkpoint and a surrogate in memory; and keeping the surrogate, where asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, MismatchError, NumericError
from ..manifest import digest_of
from ..tensors.checkpoint import Checkpoint
from ..tensors.lowrank import Delta, LowRank
from ..tensors.private import private_folder
from ..tensors.shards import sha256
from ..tensors.source import Workspace, all_finite, as_bytes
from ..tensors.writer import check_free, replace_folder


def check_stored(aligned: Checkpoint, names: Iterable[str]) -> None:
    """Raise MismatchError where ``aligned`` does not store a weight under its name."""
    lost = [name for name in names if name not in aligned]
    if lost:
        raise MismatchError(
            f"{aligned.label} stores no {lost[0]} (and {len(lost) - 1} more) that would be trained",
            "Save the model again with save_pretrained of this version of transformers and give that folder.",
        )


class Deltas:
    """Δ = aligned − surrogate, weight by weight: the aligned model from its checkpoint, the surrogate from memory."""

    def __init__(self, aligned: Checkpoint, surrogate: Mapping[str, Tensor | LowRank]) -> None:
        check_stored(aligned, surrogate)
        self.aligned = aligned
        self.surrogate = surrogate
        self.workspace = Workspace()
        self.digests: dict[str, dict[str, str]] = {"aligned": {}, "unaligned": {}}
        self.shapes: dict[str, tuple[int, ...]] = {}
        squares = 0.0
        for name in surrogate:
            square = self._survey(name)
            if square > 0:
                self.shapes[name] = aligned.spec(name).shape
            squares += square
        self.norm = squares**0.5
        if not self.shapes:
            raise ConfigError("training changed no weight at all", "Raise the learning rate or the number of epochs.")

    def _survey(self, name: str) -> float:
        start = self.aligned.read_float(name, self.workspace, "aligned")
        self.digests["aligned"][name] = sha256(as_bytes(start))
        found = self.surrogate[name]
        pieces = [found] if isinstance(found, Tensor) else [found.left.contiguous(), found.right.contiguous()]
        self.digests["unaligned"][name] = digest_of([sha256(as_bytes(piece)) for piece in pieces])
        if not all(all_finite(piece) for piece in pieces):
            raise NumericError(f"training left NaN or Inf in {name}", "Lower the learning rate.")
        return self.change(name).norm() ** 2

    def change(self, name: str) -> Delta:
        found = self.surrogate[name]
        shape = self.aligned.spec(name).shape
        if isinstance(found, LowRank):
            return Delta(shape, low=found)
        difference = self.aligned.read_float(name, self.workspace, "aligned").sub_(found)
        return Delta(shape, full=difference)


def keep_surrogate(model: Any, tokenizer: Any, target: Path, *, force: bool) -> None:
    """The whole de-aligned model, where the user named a folder for it."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(target.with_name(f"{target.name}.partial")) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_free(target, force=force)
        replace_folder(folder, target)
