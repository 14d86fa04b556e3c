"""A model's folder of safetensors shards, opened lazily."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import Entry, ShardFile
from .source import MERGEABLE, TensorSpec, Workspace, as_bytes

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
EMBEDDING_SUFFIXES = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")
HEAD_SUFFIXES = ("lm_head.weight", "embed_out.weight")
CHUNK = 1 << 17
"""Entries of a tensor that a pass over it takes at a time: what a core's cache holds."""

_CONVERT = {
    "bitsandbytes": "load it with transformers, call model.dequantize() and save_pretrained()",
    "gptq": "merge into the unquantised checkpoint it was made from, then quantise the result again",
    "awq": "merge into the unquantised checkpoint it was made from, then quantise the result again",
    "fp8": "load it with transformers and dtype=torch.bfloat16 (dequantised), then save_pretrained()",
    "gguf": "load it with transformers' from_pretrained(folder, gguf_file=...), then save_pretrained()",
}


def resolve(reference: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of ``reference``: a folder, or a Hub id ``owner/name`` (``owner/name@revision``).

    Hub files go to and come from huggingface_hub's cache; ``HF_HUB_OFFLINE=1`` reads the cache alone.

    Raises:
        CheckpointError: neither a folder nor a model the Hub or its cache has.
    """
    text = str(reference)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{text} is a file", "Give the folder that holds the model, or a Hub id.")
    name, _, wanted = text.partition("@")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        raise CheckpointError(f"there is no folder {text}", "Give a folder, or a Hub id such as owner/name.")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=wanted or revision,
                ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{text} is not a folder here, and the Hub could not give it: {first}",
            "Check the spelling; for a gated model run `hf auth login`; offline, download it first.",
        ) from error


class Checkpoint:
    """One model: a folder with ``config.json`` and one or many safetensors shards, with or without an index.

    Opening reads headers only. ``read`` gives fresh memory; ``read_into`` fills a worker's buffers.

    Attributes:
        path: the folder. config: its ``config.json`` (empty if there is none). label: how the user named it.

    Raises:
        CheckpointError: no weights, a pickle or quantised checkpoint, a damaged or missing shard.
    """

    def __init__(self, path: Path, *, label: str | None = None) -> None:
        self.path = path
        self.label = label or str(path)
        self.config: dict[str, Any] = _read_json(path / "config.json") if (path / "config.json").exists() else {}
        _refuse_quantised(self.label, self.config)
        self.shards: dict[str, ShardFile] = {}
        self._where: dict[str, str] = {}
        self.index = _read_json(path / INDEX) if (path / INDEX).exists() else None
        for filename in self._shard_names():
            shard = ShardFile(path / filename)
            self.shards[filename] = shard
            for name in shard.layout.entries:
                if name in self._where:
                    raise CheckpointError(f"{self.label}: {name} is in both {self._where[name]} and {filename}")
                self._where[name] = filename
        self._check_index()
        for name in self._where:
            if self.spec(name).dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                raise CheckpointError(f"{self.label} holds fp8 weights ({name})", f"Way out: {_CONVERT['fp8']}.")
        self.tied = self._tied_names()

    @classmethod
    def open(cls, reference: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Open a local folder or a Hub id."""
        return cls(resolve(reference, revision=revision), label=str(reference))

    def names(self) -> Sequence[str]:
        return list(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def entry(self, name: str) -> tuple[ShardFile, Entry]:
        shard = self.shards[self._where[name]]
        return shard, shard.layout.entries[name]

    def spec(self, name: str) -> TensorSpec:
        return self.entry(name)[1].spec

    def shard_of(self, name: str) -> str:
        return self._where[name]

    @property
    def nbytes(self) -> int:
        return sum(shard.layout.nbytes for shard in self.shards.values())

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        spec = self.spec(name)
        return self.read_into(torch.empty(spec.shape, dtype=spec.dtype), name).to(device)

    def read_into(self, out: Tensor, name: str) -> Tensor:
        """Fill ``out`` (contiguous, the tensor's dtype and shape, CPU) from the file."""
        shard, entry = self.entry(name)
        shard.read_into(as_bytes(out), entry.offset)
        return out

    def read_float(self, name: str, workspace: Workspace, slot: str) -> Tensor:
        """The tensor as float32, in ``workspace``'s memory or on its device."""
        spec = self.spec(name)
        return workspace.lift_float(slot, self.read_into(workspace.take(slot, spec.shape, spec.dtype), name))

    def chunks(self, name: str, workspace: Workspace, slot: str, first: int = 0) -> Iterator[Tensor]:
        """The tensor's elements in order from ``first``, flat, in its stored dtype, a piece at a time."""
        numel = self.spec(name).numel
        for start in range(first, numel, CHUNK):
            yield self.part(name, start, min(CHUNK, numel - start), workspace, slot)

    def part(self, name: str, first: int, count: int, workspace: Workspace, slot: str) -> Tensor:
        """``count`` elements from ``first``, flat, in the stored dtype."""
        shard, entry = self.entry(name)
        out = workspace.take(slot, [count], entry.spec.dtype)
        shard.read_into(as_bytes(out), entry.offset + first * entry.spec.dtype.itemsize)
        return out

    def counterpart(self, name: str) -> str | None:
        """This checkpoint's name for ``name``: itself, or the embedding that a tied head shares."""
        if name in self._where:
            return name
        if name.endswith(HEAD_SUFFIXES) and self.config_value("tie_word_embeddings", True):
            return self.embedding()
        return None

    @property
    def ties_head(self) -> bool:
        """Whether head and embedding are one weight, stored once or twice."""
        return bool(self.tied) or (
            self.embedding() is not None
            and not any(n.endswith(HEAD_SUFFIXES) for n in self._where)
            and bool(self.config_value("tie_word_embeddings", True))
        )

    def embedding(self) -> str | None:
        return next((n for n in self._where if n.endswith(EMBEDDING_SUFFIXES)), None)

    def config_value(self, key: str, default: Any = None) -> Any:
        """A value of config.json, looked up in ``text_config`` as well (multimodal wrappers)."""
        text = self.config.get("text_config")
        return self.config.get(key, text.get(key, default) if isinstance(text, dict) else default)

    def sidecars(self) -> list[Path]:
        """Every file of the folder (relative) but weights, their index, and what Safegraft writes itself."""
        out = []
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            if not file.is_file() or any(part.startswith(".") for part in relative.parts):
                continue
            if file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or relative.name == INDEX:
                continue
            if str(relative) in ("manifest.json", "README.md") or relative.suffixes[-2:] == [".index", ".json"]:
                continue
            out.append(relative)
        return out

    def _shard_names(self) -> list[str]:
        if self.index is not None:
            listed = self.index.get("weight_map")
            if not isinstance(listed, dict):
                raise CheckpointError(f"{self.label}: {INDEX} has no weight_map", "Fetch the index again.")
            odd = [n for n in listed.values() if not isinstance(n, str) or Path(n).name != n]
            if odd:
                raise CheckpointError(f"{self.label}: {INDEX} names {odd[0]!r}, which is no file of this folder")
            names = sorted(set(listed.values()))
            missing = [n for n in names if not (self.path / n).exists()]
            if missing:
                raise CheckpointError(
                    f"{self.label}: the index names {len(missing)} file(s) that are not there: "
                    f"{', '.join(missing[:5])}",
                    "The download or copy is not complete; fetch the missing files.",
                )
            if not names:
                raise CheckpointError(f"{self.label}: {INDEX} names no file")
            return names
        if (self.path / WEIGHTS).exists():
            return [WEIGHTS]
        found = sorted(p.name for p in self.path.glob("*.safetensors") if not p.name.startswith("adapter_"))
        if found:
            return found
        raise _no_weights(self.path, self.label)

    def _check_index(self) -> None:
        if self.index is None:
            return
        listed = self.index["weight_map"]
        wrong = [n for n, f in listed.items() if self._where.get(n) != f]
        if wrong:
            raise CheckpointError(
                f"{self.label}: the index places {len(wrong)} tensor(s) where they are not, e.g. {wrong[0]} in "
                f"{listed[wrong[0]]}",
                "Delete the index if the shards are complete, or fetch the model again.",
            )

    def _tied_names(self) -> dict[str, str]:
        """Stored heads that are the embedding once more: ``{head: embedding}``."""
        embedding = self.embedding()
        if embedding is None or not self.config_value("tie_word_embeddings", False):
            return {}
        shape = self.spec(embedding).shape
        return {
            n: embedding
            for n in self._where
            if n.endswith(HEAD_SUFFIXES) and self.spec(n).shape == shape and self.spec(n).dtype.is_floating_point
        }

    def is_mergeable(self, name: str) -> bool:
        return self.spec(name).dtype in MERGEABLE


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and modification time of every weight file: enough to notice that an input changed between two runs."""
    out = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        stat = file.stat()
        out[file.name] = [stat.st_size, stat.st_mtime_ns]
    return out


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _refuse_quantised(label: str, config: dict[str, Any]) -> None:
    text = config.get("text_config")
    quantisation = config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if not quantisation:
        return
    given = quantisation if isinstance(quantisation, dict) else {}
    by_bits = "bitsandbytes" if given.get("load_in_4bit") or given.get("load_in_8bit") else "unknown"
    method = str(given.get("quant_method") or by_bits).lower()
    step = next((text for key, text in _CONVERT.items() if key in method or method in key), None)
    raise CheckpointError(
        f"{label} is quantised ({method}); adding a safety vector needs its full weights",
        f"Way out: {step or 'dequantise it with the tool that quantised it, and save it as safetensors'}.",
    )


def _no_weights(path: Path, label: str) -> CheckpointError:
    def has(pattern: str) -> bool:
        return any(path.glob(pattern))

    if has("adapter_config.json"):
        return CheckpointError(
            f"{label} is an adapter, not a whole model", "An adapter can stand for the fine-tune (--model) only."
        )
    if has("*.bin") or has("*.pt") or has("*.pth"):
        return CheckpointError(
            f"{label} is a pickle checkpoint; loading one runs whatever code it carries",
            'Convert it once, on a machine where that does not matter: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\"",
        )
    if has("*.gguf"):
        return CheckpointError(f"{label} is a GGUF file", f"Way out: {_CONVERT['gguf']}.")
    return CheckpointError(f"{label} holds no *.safetensors file", "Give the folder that holds the weights.")


def near_misses(names: Sequence[str], known: Sequence[str], sentence: str, most: int = 5) -> list[str]:
    """``sentence`` (with ``{}``) for the first few of ``names``, each with the closest of ``known``, and a count."""
    out = []
    for name in names[:most]:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        out.append(sentence.format(name) + (f" (closest: {close[0]})" if close else ""))
    if len(names) > most:
        out.append(f"… and {len(names) - most} more like it")
    return out
