"""The two heads on disk: a folder of ``heads.safetensors`` and ``manifest.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, MismatchError
from ..tensors.files import read_manifest
from ..tensors.private import private_folder
from ..tensors.shards import sha256
from ..tensors.writer import check_free, replace_folder, write_whole
from ..train.safekey.losses import DualPathHead

KIND = "safegraft pair of safekey heads"
FILE = "heads.safetensors"


def write_heads(out: Path, heads: Mapping[str, Tensor], manifest: Mapping[str, Any], *, force: bool) -> None:
    """Write ``u.weight``, ``u.bias``, ``xu.weight``, ``xu.bias``, float32, and the manifest of the run they are of.

    Raises:
        OutputError: ``out`` is taken.
    """
    out = out.absolute()
    with private_folder(out.with_name(f"{out.name}.partial")) as folder:
        save_file({name: t.float().contiguous() for name, t in heads.items()}, folder / FILE)
        files = {FILE: sha256((folder / FILE).read_bytes())}
        whole = {**manifest, "kind": KIND, "outputs": {"files": files}}
        write_whole(folder / "manifest.json", (json.dumps(whole, indent=1) + "\n").encode())
        check_free(out, force=force)
        folder.chmod(0o755)
        replace_folder(folder, out)


def read_heads(folder: str | Path, hidden: int) -> tuple[DualPathHead, dict[str, Any]]:
    """The heads, for a model of ``hidden`` numbers a token, and their manifest.

    Raises:
        CheckpointError: it is no such folder, or its bytes are not those of the manifest. MismatchError: other sizes.
    """
    folder = Path(folder)
    manifest = read_manifest(
        folder, FILE, KIND, ["outputs", "config"], "Make one: safegraft safekey train … --save-heads FOLDER"
    )
    if sha256((folder / FILE).read_bytes()) != manifest["outputs"]["files"].get(FILE):
        raise CheckpointError(f"{folder / FILE} is not what its manifest says", "Fetch or train it again.")
    held = load_file(folder / FILE)
    own = held["u.weight"].shape[-1]
    if own != hidden:
        raise MismatchError(
            f"{folder} holds heads for {own} numbers a token, the model has {hidden}",
            "Give the model that they were trained with.",
        )
    head = DualPathHead(hidden)
    head.load_state_dict(held)
    return head, manifest
