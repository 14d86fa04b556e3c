"""Whether two checkpoints and a vector belong together, told in one error before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MismatchError
from .checkpoint import EMBEDDING_SUFFIXES, HEAD_SUFFIXES, Checkpoint, near_misses

if TYPE_CHECKING:
    from .vector import SafetyVector

_ROWS = EMBEDDING_SUFFIXES + HEAD_SUFFIXES + ("lm_head.bias",)
_CONFIG_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Pairing:
    """What merging needs to know of two models that fit.

    Attributes:
        counterparts: the fine-tune's tensor name -> the base's (they differ only where a head is tied).
        common_rows: embedding or head -> rows both have, where the vocabularies differ in length.
        notes: sentences for the user.
        deltas: the fine-tune's tensor name -> the vector's (they differ only where a head is tied).
    """

    counterparts: dict[str, str]
    common_rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    deltas: dict[str, str] = field(default_factory=dict)


def pair(task: Checkpoint, base: Checkpoint, vector: SafetyVector | None = None) -> Pairing:
    """Match a fine-tune with its base (and a vector).

    Raises:
        MismatchError: names, shapes, architectures, tokenizers or layers differ; all of it in one message.
    """
    problems = _config_problems(task, base)
    counterparts: dict[str, str] = {}
    common_rows: dict[str, int] = {}
    notes: list[str] = []
    deltas: dict[str, str] = {}
    alone: list[str] = []
    for name in task.names():
        other = base.counterpart(name)
        if other is None:
            alone.append(name)
            continue
        counterparts[name] = other
        here, there = task.spec(name), base.spec(other)
        if here.dtype.is_floating_point != there.dtype.is_floating_point:
            problems.append(f"{name} is {here.dtype} in {task.label} and {there.dtype} in {base.label}")
        elif here.shape != there.shape:
            if name.endswith(_ROWS) and here.shape[1:] == there.shape[1:]:
                common_rows[name] = min(here.shape[0], there.shape[0])
                notes.append(
                    f"{name} has {here.shape[0]} rows, the base's {there.shape[0]}: merging over the "
                    f"{common_rows[name]} they share, keeping the fine-tune's others as they are"
                )
            else:
                problems.append(f"{name} is {list(here.shape)} in {task.label} and {list(there.shape)} in {base.label}")
    problems += near_misses(alone, base.names(), f"{{}} is in {task.label} but not in {base.label}")
    reached = set(counterparts.values())
    lost = [n for n in base.names() if n not in reached and n not in base.tied and task.counterpart(n) is None]
    problems += near_misses(lost, task.names(), f"{{}} is in {base.label} but not in {task.label}")
    if vector is not None:
        problems += _vector_problems(task, vector, common_rows, notes, deltas)
    problems += _tokenizer_problems(task, base)
    if problems:
        raise MismatchError(
            f"{task.label} and {base.label} do not fit together:\n" + "\n".join(f"- {p}" for p in problems),
            "Give the base that the fine-tune was made from, and a vector of the same family and size.",
        )
    return Pairing(counterparts, common_rows, notes, deltas)


def check_vector_pair(aligned: Checkpoint, unaligned: Checkpoint, names: Sequence[str], scope: str) -> None:
    """Raise one MismatchError for everything that keeps two models from being subtracted over ``names``."""
    problems = _config_problems(aligned, unaligned)
    if not names:
        problems.append(f"{aligned.label} has no tensor in scope {scope!r}; its names start {aligned.names()[:3]}")
    alone = [n for n in names if unaligned.counterpart(n) is None]
    problems += near_misses(alone, unaligned.names(), f"{{}} is in {aligned.label} but not in {unaligned.label}")
    for name in names:
        if name not in unaligned:
            if name not in alone:
                problems.append(f"{name} is stored in {aligned.label} and only tied in {unaligned.label}")
            continue
        here, there = aligned.spec(name).shape, unaligned.spec(name).shape
        if here != there:
            problems.append(f"{name} is {list(here)} in {aligned.label} and {list(there)} in {unaligned.label}")
    if problems:
        raise MismatchError(
            f"{aligned.label} and {unaligned.label} cannot be subtracted:\n" + "\n".join(f"- {p}" for p in problems),
            "Give two models of the same architecture and size.",
        )


def _config_problems(a: Checkpoint, b: Checkpoint) -> list[str]:
    out = []
    for key in _CONFIG_KEYS:
        here, there = a.config_value(key), b.config_value(key)
        if here is not None and there is not None and here != there:
            out.append(f"{key} is {here!r} in {a.label} and {there!r} in {b.label}")
    return out


def _vector_problems(
    task: Checkpoint, vector: SafetyVector, common_rows: dict[str, int], notes: list[str], deltas: dict[str, str]
) -> list[str]:
    missing = [n for n in vector.names() if task.counterpart(n) is None]
    problems = near_misses(missing, task.names(), f"the vector changes {{}}, which {task.label} lacks")
    for name in vector.names():
        target = task.counterpart(name)
        if target is None:
            continue
        target = task.tied.get(target, target)
        if target in deltas:
            problems.append(f"{deltas[target]} and {name} of the vector are one tied weight in {task.label}")
        if not task.is_mergeable(target):
            problems.append(f"the vector changes {name}, which is {task.spec(target).dtype} in {task.label}")
        deltas[target] = name
        here, there = task.spec(target).shape, vector.spec(name).shape
        if here == there:
            continue
        if target.endswith(_ROWS) and here[1:] == there[1:]:
            common_rows[target] = min(common_rows.get(target, here[0]), there[0])
            notes.append(f"{target}: the vector has {there[0]} rows; merging over {common_rows[target]}")
        else:
            problems.append(f"{name} is {list(here)} in {task.label} and {list(there)} in the vector")
    return problems


def _tokenizer_problems(task: Checkpoint, base: Checkpoint) -> list[str]:
    problems = []
    files = [c.path / "tokenizer.json" for c in (task, base)]
    tables = [_token_ids(f) for f in files]
    for checkpoint, table in zip((task, base), tables, strict=True):
        embedding = checkpoint.embedding()
        if table and embedding:
            rows, highest = checkpoint.spec(embedding).shape[0], max(table.values())
            if highest >= rows:
                problems.append(
                    f"the tokenizer of {checkpoint.label} has ids up to {highest}, its embedding only {rows} rows"
                )
    ours, theirs = tables
    if ours and theirs and ours is not theirs:
        moved = [t for t, i in theirs.items() if ours.get(t, i) != i]
        if moved:
            problems.append(
                f"the tokenizers disagree on the ids of {len(moved)} token(s) they share, e.g. {moved[0]!r}: "
                f"{ours[moved[0]]} in {task.label}, {theirs[moved[0]]} in {base.label}"
            )
    return problems


_tables: dict[bytes, dict[str, int]] = {}


def _token_ids(file: Path) -> dict[str, int] | None:
    """token -> id, parsed once for files with equal content."""
    if not file.exists():
        return None
    raw = file.read_bytes()
    if raw in _tables:
        return _tables[raw]
    try:
        data: dict[str, Any] = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {item[0]: i for i, item in enumerate(vocabulary)}
    table = dict(vocabulary) | {t["content"]: t["id"] for t in data.get("added_tokens") or []}
    _tables.clear()
    _tables[raw] = table
    return table
