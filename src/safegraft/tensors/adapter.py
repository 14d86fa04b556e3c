"""A PEFT LoRA adapter seen as deltas on its base: low-rank factors, never the full matrix.

Parameters as in peft's LoraConfig; the update of a linear layer is ``scaling · B @ A`` with ``scaling = alpha / r``
(``alpha / sqrt(r)`` for rsLoRA, arXiv:2312.03732), r and alpha per module where rank_pattern / alpha_pattern name it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, MismatchError
from .checkpoint import HEAD_SUFFIXES, Checkpoint, near_misses, resolve
from .files import ShardFile
from .lowrank import Delta, LowRank
from .source import CPU, TensorSpec, all_finite, as_bytes

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_UNLIKE_LORA = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA with replicated layers",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "LoRA with trainable tokens",
}
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MERGE_FIRST = "Merge it into its base with peft's merge_and_unload(), save, and give that folder as --model."


@dataclass(frozen=True)
class _Module:
    a: str
    b: str
    scaling: float
    embedding: bool


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).exists()


class Adapter:
    """A LoRA adapter as a TensorSource of deltas, keyed by the base's tensor names.

    Args:
        path: the adapter's folder. base: the checkpoint it was trained on.

    Raises:
        CheckpointError: not LoRA, DoRA, a pickle, or damaged. MismatchError: it names modules the base lacks.
    """

    def __init__(self, path: Path, base: Checkpoint, *, label: str | None = None) -> None:
        self.path, self.base = path, base
        self.label = label or str(path)
        self.config = read_config(path, self.label)
        if not (path / WEIGHTS).exists():
            if (path / "adapter_model.bin").exists():
                raise CheckpointError(
                    f"{self.label} is a pickle adapter; loading one runs whatever code it carries",
                    "Load it with peft and save it again: save_pretrained() writes safetensors.",
                )
            raise CheckpointError(f"{self.label} has no {WEIGHTS}", "The adapter is not complete; fetch it again.")
        self.file = ShardFile(path / WEIGHTS)
        self.lora: dict[str, _Module] = {}
        self.replaced: dict[str, str] = {}
        self._sort_out()

    @property
    def base_reference(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    def names(self) -> Sequence[str]:
        return list(self.lora | self.replaced)

    def __contains__(self, name: object) -> bool:
        return name in self.lora or name in self.replaced

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, torch.float32, self.base.spec(name).shape)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self.delta(name, None).dense().to(device)

    def delta(self, name: str, base: Tensor | None) -> Delta:
        """The adapter's change of ``name``, on the device of ``base``: W_b in float32, which modules that are replaced
        whole are compared with (read here if not given)."""
        shape, device = self.base.spec(name).shape, CPU if base is None else base.device
        if name in self.replaced:
            if base is None:
                base = self.base.read(name).float()
            change = self.tensor(self.replaced[name]).to(device).float() - base
            if name not in self.lora:
                return Delta(shape, full=change)
            if change.any():  # peft stores the layer below a LoRA of embeddings too, which is mostly the base's
                return Delta(shape, full=change + self._product(name, device).dense())
        return self._product(name, device)

    def _product(self, name: str, device: torch.device) -> Delta:
        shape = self.base.spec(name).shape
        module = self.lora[name]
        a, b = (self.tensor(key).to(device).float() for key in (module.a, module.b))
        if module.embedding:
            return Delta(shape, low=LowRank(a.T * module.scaling, b))
        if self.config.get("fan_in_fan_out"):
            return Delta(shape, low=LowRank(a.T * module.scaling, b))
        return Delta(shape, low=LowRank(b * module.scaling, a.T))

    def raw_bytes(self) -> bytes:
        return (self.path / WEIGHTS).read_bytes()

    def tensor(self, key: str) -> Tensor:
        """One stored tensor, by its key in the file. Raises NumericError where it holds NaN or Inf."""
        entry = self.file.layout.entries[key]
        out = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
        self.file.read_into(as_bytes(out), entry.offset)
        if not all_finite(out):
            from ..errors import NumericError

            raise NumericError(f"{self.label}: {key} holds NaN or Inf", "Train or fetch the adapter again.")
        return out

    def _sort_out(self) -> None:
        stored = self.file.layout.entries
        unknown, problems = [], []
        for key in stored:
            name = key.removeprefix(_PREFIX)
            if name.endswith((".lora_A.weight", ".lora_embedding_A")):
                b = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
                if b not in stored:
                    problems.append(f"{key} has no B factor beside it")
                continue
            if name.endswith((".lora_B.weight", ".lora_embedding_B")):
                module, embedding = re.sub(r"\.lora_(B\.weight|embedding_B)$", "", name), name.endswith("_B")
                a = key.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")
                target = self._target(f"{module}.weight")
                if a not in stored:
                    problems.append(f"{key} has no A factor beside it")
                elif target is None:
                    unknown.append(f"{module}.weight")
                elif not self._left_to_the_embedding(f"{module}.weight", target):
                    rank = stored[a].spec.shape[0]
                    self.lora[target] = _Module(a, key, self._scaling(module, rank), embedding)
                    self._check_shape(target, stored[a].spec.shape, stored[key].spec.shape, embedding, problems)
            elif ".lora_" in name:
                problems.append(f"{key} is of a kind that is not handled")
            else:
                target = self._target(name)
                if target is None:
                    unknown.append(name)
                elif self._left_to_the_embedding(name, target):
                    continue
                elif self.base.spec(target).shape != stored[key].spec.shape:
                    problems.append(
                        f"{name} is {list(stored[key].spec.shape)}, the base's is {list(self.base.spec(target).shape)}"
                    )
                else:
                    self.replaced[target] = key
        if self.config.get("ensure_weight_tying") and self.base.ties_head and self.base.embedding() not in self:
            problems += [
                f"{key} has no embedding beside it" for key in stored if any(h[:-6] in key for h in HEAD_SUFFIXES)
            ]
        problems += near_misses(unknown, self.base.names(), f"the adapter changes {{}}, which {self.base.label} lacks")
        if problems:
            raise MismatchError(
                f"the adapter {self.label} does not fit {self.base.label}:\n" + "\n".join(f"- {p}" for p in problems),
                f"Give the base it was trained on: {self.base_reference or 'its config names none'}.",
            )

    def _left_to_the_embedding(self, name: str, target: str) -> bool:
        """Whether ``name`` is a tied head whose change the embedding's entry holds already (ensure_weight_tying).

        Raises:
            CheckpointError: only one end of a tied weight was trained, or each apart; no tied model can hold that.
        """
        if target != self.base.embedding() or not self.base.ties_head:
            return False
        if self.config.get("ensure_weight_tying"):
            return name.replace(".base_layer.", ".").endswith(HEAD_SUFFIXES)
        raise CheckpointError(
            f"{self.label} changes {name}, but {self.base.label} ties its embedding to its head and the adapter was "
            "not trained with ensure_weight_tying: the two ends would no longer be equal",
            "Merge it with peft into a copy of the base with tie_word_embeddings=False, and give that as --model.",
        )

    def _target(self, name: str) -> str | None:
        for candidate in (name, name.replace(".base_layer.", "."), name.removeprefix("model.")):
            found = self.base.counterpart(candidate)
            if found is not None:
                return self.base.tied.get(found, found)
        return None

    def _check_shape(
        self, target: str, a: tuple[int, ...], b: tuple[int, ...], embedding: bool, problems: list[str]
    ) -> None:
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            problems.append(
                f"{target}: factors {list(a)} and {list(b)} do not multiply (only linear layers are handled)"
            )
            return
        flipped = embedding or self.config.get("fan_in_fan_out")
        shape = (a[1], b[0]) if flipped else (b[0], a[1])
        if shape != self.base.spec(target).shape:
            problems.append(f"{target}: update {list(shape)}, the base's weight {list(self.base.spec(target).shape)}")

    def _scaling(self, module: str, rank: int) -> float:
        alpha = by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        expected = by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", rank))
        if int(expected) != rank:
            raise CheckpointError(
                f"{self.label}: {module} is stored with rank {rank}, its config says {expected}",
                "The adapter's weights and config do not belong together; fetch it again.",
            )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_config(path: Path, label: str) -> dict[str, Any]:
    """``adapter_config.json``, with every kind that cannot be merged exactly refused by name."""
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG} is not readable JSON: {error}") from error
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise CheckpointError(f"{label} is a {kind} adapter; only LoRA can be merged", "Merge it with peft first.")
    if config.get("use_dora"):
        raise CheckpointError(f"{label} is a DoRA adapter: its change is not the product of two factors", _MERGE_FIRST)
    for key, name in _UNLIKE_LORA.items():
        if config.get(key):
            raise CheckpointError(f"{label} is {name}, which is not plain LoRA on linear layers", _MERGE_FIRST)
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_MOVE_THE_BASE):
        raise CheckpointError(
            f"{label} was started with init_lora_weights={start!r}, which moves the base's weights as well: "
            "its factors alone are not its change",
            "Save it again with peft's path_initial_model_for_weight_conversion, or merge it with merge_and_unload().",
        )
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{label} was trained with bias={config.get('bias')!r}, lora_bias={bool(config.get('lora_bias'))}",
            _MERGE_FIRST,
        )
    return config


def open_base_of(adapter: Path, given: str | Path | None) -> Checkpoint:
    """The adapter's base: the one given, else the one its config names."""
    if given is not None:
        return Checkpoint.open(given)
    config = read_config(adapter, str(adapter))
    named = config.get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"{adapter} does not say what it was trained on", "Give it with --base.")
    return Checkpoint(resolve(named, revision=config.get("revision")), label=str(named))


def by_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """peft's rule: a key is a regular expression that must match the end of the module's name, at a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(?:.*\.)?({key})$", module):
            return value
    return default
