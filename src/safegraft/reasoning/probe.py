"""The whole job of ``safegraft safekey probe``: what the heads say of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..evaluate.metrics import Rate, rate
from ..evaluate.models.hf import HfChatModel, load_chat
from ..evaluate.records import Sampling, ask
from ..manifest import digest_of, folder_digest, new_manifest
from ..tensors.checkpoint import Checkpoint
from ..tensors.private import private_folder
from ..tensors.shards import sha256
from ..tensors.writer import check_free, replace_folder, write_whole
from ..train.safekey.losses import DualPathHead
from ..train.safekey.spans import Frame, RowError, Spanned, Trace, frame_of, spanned
from ..train.sources import read_rows_as_they_are
from .heads import read_heads
from .segment import CLOSE, METHOD, SegmentationError, segment
from .traces import label_of

KIND = "safegraft safekey scores"
SCORES = "scores.jsonl"
LONGEST = 1 << 20
"""Tokens of a prompt and its understanding, which are never cut."""
CHUNK = 32
"""Prompts that are answered at a time."""
Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""


@dataclass(frozen=True)
class Prompt:
    """``response``: a trace at hand, or "" for the model's own. ``harmful``: where the row says it."""

    id: str
    line: int
    prompt: str
    response: str
    harmful: bool | None


@dataclass(frozen=True)
class Score:
    """The probability that the query is harmful, 0 … 1, by each head; None with the reason where there is no U."""

    id: str
    line: int
    u: float | None
    xu: float | None
    harmful: bool | None
    understanding: str
    reason: str = ""


@dataclass(frozen=True)
class Probed:
    """``right``: of rows with a label, those a head puts on the right side of one half, by head."""

    scores: list[Score]
    right: dict[str, Rate]
    warnings: list[str]


def probe(
    model: str,
    heads: str | Path,
    prompts: str,
    out: str | Path,
    *,
    tokens: int = 160,
    batch: int = 16,
    force: bool = False,
    given: Sequence[str] = (),
    progress: Report | None = None,
) -> Probed:
    """Score prompts with the heads that ``safekey train --save-heads`` kept; write ``scores.jsonl`` and a manifest.

    The heads read the last hidden states over the understanding U. A row that has no response is given the model's
    own: it writes ``tokens`` greedily, and U is where the rules of ``segment`` see it end.

    Args:
        prompts: a file or Hub data set of rows with prompt (or question), perhaps a response that begins with
            ``<think>``, perhaps a label (see ``traces.label_of``). tokens: room for U, ≥ 1. batch: at a time, ≥ 1.

    Raises:
        ConfigError: a value out of range, no rows, or a template without a think block. MismatchError: other heads.
        CheckpointError: model or heads cannot be read. OutputError: ``out`` is taken.
    """
    report: Report = progress or (lambda what, done, total: None)
    if tokens < 1:
        raise ConfigError(f"tokens {tokens} is below 1")
    out = Path(out).absolute()
    check_free(out, force=force)
    rows, bad = _read(prompts)
    checkpoint = Checkpoint.open(model)
    network, tokenizer = load_chat(checkpoint.path)
    head, theirs = read_heads(heads, network.config.hidden_size)
    frame = frame_of(tokenizer)
    asked = HfChatModel(network, tokenizer, batch=batch)
    scores: list[Score] = []
    for start in range(0, len(rows), CHUNK):
        chunk = _answered(rows[start : start + CHUNK], asked, tokens)
        scores += [_score(row, network, tokenizer, frame, head.to(network.device)) for row in chunk]
        report("scoring", len(scores), len(rows))
    right = {
        name: rate((getattr(s, name) > 0.5) == s.harmful for s in known)
        for name in ("u", "xu")
        if (known := [s for s in scores if s.u is not None and s.harmful is not None])
    }
    digest = folder_digest(checkpoint.path)
    settings = {"model": model, "heads": str(heads), "prompts": prompts, "tokens": tokens, "annotator": METHOD}
    inputs = {
        "model": {"name": checkpoint.label, "sha256": digest},
        "heads": {"name": str(heads), "sha256": digest_of(theirs["outputs"])},
        "prompts": {"name": prompts, "sha256": digest_of([[r.prompt, r.response] for r in rows])},
    }
    manifest = new_manifest(KIND, config=settings, inputs=inputs, given=list(given))
    manifest["result"] = {
        "scored": sum(s.u is not None for s in scores),
        "without": [{"id": s.id, "line": s.line, "reason": s.reason} for s in scores if s.u is None] + bad,
        "right": {n: {"hits": r.hits, "n": r.n, "interval": [r.low, r.high]} for n, r in right.items()},
    }
    _write(out, scores, manifest, force)
    trained_on = theirs["config"]["out"]
    warnings = [] if _is_of(theirs, checkpoint.path) else [f"the heads were trained with {trained_on}, not this model"]
    return Probed(scores, right, warnings)


def _read(prompts: str) -> tuple[list[Prompt], list[dict[str, Any]]]:
    called, found, _ = read_rows_as_they_are(prompts)
    rows, bad = [], []
    for line, row in found:
        try:
            rows.append(_prompt(row, line))
        except ValueError as error:
            bad.append({"id": str(line), "line": line, "reason": str(error)})
    if not rows:
        told = "".join(f"\n- line {b['line']}: {b['reason']}" for b in bad[:10])
        raise ConfigError(f"{called} has no row with a prompt{told}", "Rows need prompt, and perhaps response.")
    return rows, bad


def _prompt(row: Any, line: int) -> Prompt:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError("it is not an object with named fields")
    text = row.get("prompt", row.get("question"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("it has no prompt")
    response = row.get("response") or ""
    if not isinstance(response, str):
        raise ValueError("its response is no text")
    labelled = "harmful" in row or "label" in row
    return Prompt(str(row.get("id", line)), line, text, response, label_of(row, None) if labelled else None)


def _answered(rows: Sequence[Prompt], model: HfChatModel, tokens: int) -> list[Prompt]:
    """``rows``, each with a trace."""
    empty = [row for row in rows if not row.response]
    said = model.replies([ask(row.prompt) for row in empty], Sampling(tokens)) if empty else []
    texts = {row.line: reply.text for row, reply in zip(empty, said, strict=True)}
    return [replace(row, response=texts.get(row.line, row.response)) for row in rows]


@torch.inference_mode()
def _score(row: Prompt, network: Any, tokenizer: Any, frame: Frame, head: DualPathHead) -> Score:
    response = row.response if CLOSE in row.response else f"{row.response}\n{CLOSE}"
    try:
        spans = segment(row.prompt, response)
        trace = Trace(row.id, row.prompt, response, bool(row.harmful), spans.understanding, spans.key)
        item = spanned(tokenizer, frame, trace, max_length=LONGEST)
    except (SegmentationError, RowError) as error:
        return Score(row.id, row.line, None, None, row.harmful, "", str(error))
    first, second = scores_of(network, item, head)
    return Score(row.id, row.line, first, second, row.harmful, response[slice(*spans.understanding)])


def scores_of(network: Any, item: Spanned, head: DualPathHead) -> tuple[float, float]:
    """What the two heads say of a trace, 0 … 1; only the tokens up to the end of U are run."""
    end = item.understanding[1]
    ids = torch.tensor([item.ids[:end]], device=network.device)
    hidden = network.base_model(input_ids=ids, use_cache=False)[0]
    places = torch.arange(end, device=network.device)[None]

    def marked(span: tuple[int, int]) -> torch.Tensor:
        return torch.where((places >= span[0]) & (places < span[1]), 0, -1)

    first, second = head(hidden, marked(item.understanding), marked(item.query), 1)
    return float(first.sigmoid()), float(second.sigmoid())


def _is_of(manifest: Mapping[str, Any], folder: Path) -> bool:
    """Whether the heads of ``manifest`` were trained with the model in ``folder``."""
    own = folder / "manifest.json"
    if not own.exists():
        return False
    found = json.loads(own.read_text(encoding="utf-8"))
    return bool(found.get("inputs") == manifest.get("inputs") and found.get("run") == manifest.get("run"))


def _write(out: Path, scores: Sequence[Score], manifest: dict[str, Any], force: bool) -> None:
    lines = [
        {"id": s.id, "line": s.line, "u": s.u, "xu": s.xu, "harmful": s.harmful, "understanding": s.understanding}
        for s in scores
        if s.u is not None
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with private_folder(out.with_name(f"{out.name}.partial")) as folder:
        write_whole(folder / SCORES, text.encode())
        manifest["outputs"] = {"files": {SCORES: sha256(text.encode())}}
        write_whole(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        check_free(out, force=force)
        folder.chmod(0o755)
        replace_folder(folder, out)
