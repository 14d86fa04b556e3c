"""Forward passes over safety-relevant prompts that leave, per linear layer, the second moments of its inputs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import harmful, phrases
from ..errors import CheckpointError, ConfigError, NumericError
from ..manifest import digest_of, new_manifest
from ..tensors.calibration import FILE, KIND, Calibration
from ..tensors.checkpoint import Checkpoint
from ..tensors.devices import devices_of
from ..tensors.files import build_layout
from ..tensors.scopes import SCOPES, Scope, in_scope
from ..tensors.shards import sha256
from ..tensors.source import TensorSpec, Workspace, all_finite, as_bytes
from ..tensors.writer import OutputFolder, check_free
from .data import encode, read_rows

Progress = Callable[[int, int], None]
"""Called with (forward passes done, in all)."""


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    prompts: Path | None = None,
    scope: Scope = "hybrid",
    limit: int = 128,
    max_length: int = 512,
    memory: float = 4e9,
    device: str = "cpu",
    seed: int = 0,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Measure H = XᵀX/rows [n, n] of the inputs of ``model``'s linear layers, over every token of the prompts.

    Conversations run one at a time, so nothing is padded. The matrices of a pass stay within ``memory``; where all do
    not fit, the prompts run several times, each time for the next layers, and no further than those. The model itself
    is loaded whole, in its stored dtype.

    Args:
        model: the aligned model, a folder or Hub id with a chat template. out: the folder to write.
        prompts: JSONL with ``prompt`` and perhaps ``answer``; if not given, the starter set's harmful requests that
            are for training, each with a short refusal.
        scope: which weights: attention, ffn, hybrid or all (all adds a head that is not tied).
        limit: at most so many prompts, ≥ 1, drawn by ``seed``. max_length: tokens a conversation is cut to, ≥ 2.
        memory: bytes of matrices held at a time; at least one is.
        device: cpu, cuda (the first GPU) or cuda:1. force: replace an existing ``out``. resume: go on from
            ``OUT.partial`` with the passes that are not done; the result is that of an uninterrupted run with the same
            ``memory``.

    Raises:
        ConfigError: a value out of range, or rows that cannot be used. CheckpointError: the model cannot be loaded, or
        has no linear layer in scope whose weight its files name. NumericError: an input holds NaN or Inf.
        OutputError: see OutputFolder.
    """
    _check(scope, limit, max_length, memory, device)
    check_free(Path(out), force=force)
    rows = read_rows(prompts, answers=None) if prompts else _starter(seed)
    rows = random.Random(seed).sample(rows, min(limit, len(rows)))
    checkpoint = Checkpoint.open(model)
    network, tokenizer = _load(checkpoint, device)
    conversations = [_ids(tokenizer, prompt, answer, max_length) for prompt, answer in rows]
    linear = {
        f"{name}.weight": module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and _wanted(f"{name}.weight", checkpoint, scope)
    }
    if not linear:
        raise CheckpointError(
            f"{checkpoint.label} has no linear layer in scope {scope!r} under a name of its files",
            "Safe Delta needs an architecture of torch.nn.Linear layers; choose another --scope or method.",
        )
    shared, idle = _shared_inputs(network, linear, conversations[0])
    shared |= idle
    passes = _passes(shared, linear, memory)
    layout = build_layout(FILE, [_spec(name, linear[name]) for name in shared], {"format": "pt"})
    settings = {
        "scope": scope, "limit": limit, "max_length": max_length, "seed": seed,
        "prompts": prompts.name if prompts else "starter set",
    }  # fmt: skip
    digests = {name: _digest(checkpoint, name) for names in shared.values() for name in names}
    identity = digest_of([settings, passes, [ids.tolist() for ids in conversations], digests])
    count = _Count(progress, len(passes) * len(conversations))
    with OutputFolder(Path(out), [layout], identity=identity, force=force, resume=resume) as folder:
        for names in passes:
            if all(name in folder.finished for name in names):
                count(len(conversations))
                continue
            for name, moments in _moments(
                network, {n: linear[n] for n in names}, conversations, count, stops=names[-1] not in idle
            ):
                data = as_bytes(moments.mean())
                folder.write(name, data)
                folder.done(name, sha256(data), {"rows": moments.rows})
        rows_of = {name: int(folder.figures[name]["rows"]) for name in shared}
        manifest = new_manifest(
            KIND,
            config=settings,
            seed=seed,
            inputs={
                "model": {"name": checkpoint.label},
                "prompts": {"name": settings["prompts"], "sha256": digest_of(rows), "count": len(rows)},
            },
        )
        manifest["tokens"] = sum(ids.numel() for ids in conversations)
        manifest["rows"] = rows_of
        manifest["weights"] = {
            name: {"input": key, "sha256": digests[name]}
            for key, names in shared.items()
            for name in names
            if rows_of[key]
        }
        folder.finish(manifest)
    return Calibration(out)


@dataclass
class _Moments:
    """``Σ xᵀx`` [n, n] in float32 over ``rows`` inputs."""

    total: Tensor
    rows: int = 0

    def add(self, inputs: Tensor) -> None:
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.total.addmm_(flat.T, flat)
        self.rows += len(flat)

    def mean(self) -> Tensor:
        return (self.total / max(1, self.rows)).cpu().contiguous()


class _Count:
    """Counts forward passes for ``progress``."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, passes: int = 1) -> None:
        self.done += passes
        if self.progress:
            self.progress(self.done, self.total)


class _EnoughError(Exception):
    """Nothing of interest comes after this layer."""


@torch.inference_mode()
def _moments(
    network: nn.Module, layers: dict[str, nn.Linear], conversations: Sequence[Tensor], count: _Count, *, stops: bool
) -> Iterator[tuple[str, _Moments]]:
    """Run every conversation, with ``stops`` as far as the last of ``layers``, and yield their moments, by name."""
    device = next(network.parameters()).device
    found = {n: _Moments(torch.zeros(m.in_features, m.in_features, device=device)) for n, m in layers.items()}
    last = next(reversed(layers))

    def note(name: str, given: Tensor) -> None:
        found[name].add(given)
        if stops and name == last:
            raise _EnoughError

    with _watching(layers, note):
        for ids in conversations:
            with suppress(_EnoughError):
                network(input_ids=ids.to(device), use_cache=False)
            count()
    for name in layers:
        if not all_finite(found[name].total):
            raise NumericError(f"the inputs of {name} hold NaN or Inf", "Load a model that answers as it should.")
        yield name, found.pop(name)


@contextmanager
def _watching(layers: dict[str, nn.Linear], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``note(name, input)`` before each of ``layers`` runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: note(name, given[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _shared_inputs(
    network: nn.Module, layers: dict[str, nn.Linear], ids: Tensor
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """``{first weight: all that read the very same tensor}`` in the order in which they run; one conversation tells.

    The second mapping holds layers that did not run (experts that were not chosen), each for itself.
    """
    seen: list[tuple[str, Tensor]] = []
    with _watching(layers, lambda name, given: seen.append((name, given))):
        network(input_ids=ids.to(next(network.parameters()).device), use_cache=False)
    groups: dict[int, list[str]] = {}
    for name, given in seen:  # every tensor is alive here, so ids are unique
        if not any(name in names for names in groups.values()):
            groups.setdefault(id(given), []).append(name)
    ran = [name for name, _ in seen]
    return {names[0]: names for names in groups.values()}, {n: [n] for n in layers if n not in ran}


def _passes(shared: dict[str, list[str]], layers: dict[str, nn.Linear], memory: float) -> list[list[str]]:
    """The inputs in running order, cut so that the matrices of each pass take at most ``memory`` bytes."""
    passes: list[list[str]] = [[]]
    held = 0
    for name in shared:
        size = _spec(name, layers[name]).nbytes
        if passes[-1] and held + size > memory:
            passes.append([])
            held = 0
        passes[-1].append(name)
        held += size
    return passes


def _spec(name: str, layer: nn.Linear) -> TensorSpec:
    return TensorSpec(name, torch.float32, (layer.in_features, layer.in_features))


def _wanted(name: str, checkpoint: Checkpoint, scope: Scope) -> bool:
    return name in checkpoint and name not in checkpoint.tied and in_scope(name, scope)


def _starter(seed: int) -> list[tuple[str, str]]:
    refusals = phrases().refusals
    rng = random.Random(seed)
    return [(row.prompt, rng.choice(refusals)) for row in harmful("align", "distil")]


def _ids(tokenizer: Any, prompt: str, answer: str, max_length: int) -> Tensor:
    """Token ids [1, tokens] of a conversation, or of a request as the model gets it where there is no answer."""
    if answer:
        return torch.tensor([encode(tokenizer, prompt, answer).ids[:max_length]])
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template", "Give a chat model, or set tokenizer.chat_template.")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:max_length]])


def _load(checkpoint: Checkpoint, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
        network = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {checkpoint.label}: {error}") from error
    return network.to(device).eval(), tokenizer


def _digest(checkpoint: Checkpoint, name: str) -> str:
    running, workspace = hashlib.sha256(), Workspace()
    for part in checkpoint.chunks(name, workspace, "digest"):
        running.update(as_bytes(part))
    return running.hexdigest()


def _check(scope: str, limit: int, max_length: int, memory: float, device: str) -> None:
    wrong = []
    if scope not in SCOPES:
        wrong.append(f"scope {scope!r} is not one of {', '.join(SCOPES)}")
    if limit < 1:
        wrong.append(f"limit {limit} is below 1")
    if max_length < 2:
        wrong.append(f"max_length {max_length} is below 2")
    if not memory > 0:
        wrong.append(f"memory {memory} is not above 0")
    try:
        if len(devices_of(device)) > 1:
            wrong.append(f"device {device!r}: a model runs on one")
    except ConfigError as error:
        wrong.append(str(error.args[0]))
    if wrong:
        raise ConfigError("settings that cannot be used:\n" + "\n".join(f"- {w}" for w in wrong))
