"""Annotated traces on disk: a folder of ``annotated.jsonl``, ``refused.jsonl`` and ``manifest.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..tensors.files import read_manifest
from ..tensors.shards import sha256
from ..train.safekey.spans import Trace
from .segment import SegmentationError, Spans, thinking

KIND = "safegraft set of annotated traces"
ANNOTATED, REFUSED = "annotated.jsonl", "refused.jsonl"
LABELS = {"harmful": True, "benign": False}


@dataclass(frozen=True)
class Raw:
    """One row to annotate. ``id``: its own, or its line's number."""

    id: str
    line: int
    prompt: str
    response: str
    harmful: bool


@dataclass(frozen=True)
class Annotated:
    """What ``annotate`` wrote, with its manifest. ``sha256``: of the rows as they are now, for spans may be mended."""

    folder: Path
    traces: list[Trace]
    manifest: dict[str, Any]
    sha256: str

    @property
    def refused(self) -> int:
        return int(self.manifest["result"]["refused"])


def label_of(row: Mapping[str, Any], default: str | None) -> bool:
    """Whether a row's query is harmful: its ``harmful`` (true, false, 1, 0) or ``label`` (harmful, benign), else
    ``default``.

    Raises:
        ValueError: it says neither, or something else.
    """
    if "harmful" in row:
        if row["harmful"] in (True, False, 0, 1):
            return bool(row["harmful"])
        raise ValueError("its field harmful is neither true nor false")
    if row.get("label") in LABELS:
        return LABELS[row["label"]]
    if default is None:
        raise ValueError("it does not say whether its query is harmful")
    return LABELS[default]


def line_of(row: Raw, spans: Spans, annotator: str) -> str:
    """A row of ``annotated.jsonl``. Offsets are characters of ``response``, tags included, ends excluded."""
    start, end = thinking(row.response)
    value = {
        "id": row.id,
        "line": row.line,
        "prompt": row.prompt,
        "response": row.response,
        "harmful": row.harmful,
        "thinking": [start, end],
        "understanding": list(spans.understanding),
        "key": list(spans.key),
        "confidence": spans.confidence,
        "annotator": annotator,
    }
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_annotated(folder: str | Path) -> Annotated:
    """What ``safegraft safekey annotate`` wrote, checked row by row.

    Raises:
        CheckpointError: ``folder`` is no such output. ConfigError: rows that cannot be used, all of them named.
    """
    folder = Path(folder)
    make = "Make one: safegraft safekey annotate DATA --out FOLDER"
    manifest = read_manifest(folder, ANNOTATED, KIND, ["result", "outputs"], make)
    try:
        text = (folder / ANNOTATED).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {folder / ANNOTATED}: {error}") from error
    traces, wrong = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                traces.append(_trace(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                wrong.append(f"- line {number}: {error if isinstance(error, SegmentationError) else repr(error)}")
    if wrong:
        raise ConfigError(
            f"{folder / ANNOTATED} has {len(wrong)} row(s) that cannot be used:\n" + "\n".join(wrong[:20]), make
        )
    return Annotated(folder, traces, manifest, sha256(text.encode()))


def _trace(row: Mapping[str, Any]) -> Trace:
    start, end = thinking(row["response"])
    (a, b), (c, d) = row["understanding"], row["key"]
    if not start <= a < b <= c < d <= end:
        raise SegmentationError("its spans do not lie one after the other inside its reasoning")
    if not isinstance(row["harmful"], bool) or not row["prompt"].strip():
        raise SegmentationError("it has no query, or no label")
    return Trace(str(row["id"]), row["prompt"], row["response"], row["harmful"], (a, b), (c, d))


def counts(confidences: Iterable[float]) -> dict[str, int]:
    """How often each confidence was given, highest first."""
    found: dict[str, int] = {}
    for value in sorted(confidences, reverse=True):
        found[f"{value:g}"] = found.get(f"{value:g}", 0) + 1
    return found
