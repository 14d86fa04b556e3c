"""The whole job of ``safegraft safekey annotate``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError
from ..manifest import digest_of, new_manifest
from ..tensors.private import remove
from ..tensors.writer import check_free, replace_folder, write_whole
from ..train.sources import SHAPES, pair_of, read_rows_as_they_are
from .annotators import Annotator
from .traces import ANNOTATED, KIND, LABELS, REFUSED, Annotated, Raw, counts, label_of, line_of, read_annotated

IDENTITY, MARKED = "identity", "marked.jsonl"
CHUNK = 64
"""Rows that are marked, and kept for a resumed run, at a time."""
Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


def annotate(
    data: str,
    out: str | Path,
    annotator: Annotator,
    *,
    label: str | None = None,
    min_confidence: float = 0.5,
    resume: bool = False,
    force: bool = False,
    given: Sequence[str] = (),
    progress: Progress | None = None,
) -> Annotated:
    """Mark U and K in every trace of ``data`` and write them to the folder ``out``.

    Each row is in ``annotated.jsonl`` with its offsets, or in ``refused.jsonl`` with its id, line and reason, and in no
    case in neither. Offsets are characters of the response, tags included.

    Args:
        data: a file or Hub data set; shapes of rows in ``train.sources.SHAPES``, labels in ``traces.label_of``.
        label: harmful or benign, for rows that do not say it. min_confidence: rows below are refused, 0 … 1.
        resume: go on with what an earlier run with the same settings had done. force: replace ``out``.

    Raises:
        ConfigError: a value out of range, no labels, nothing that can be annotated. OutputError: ``out`` is taken, or
        there is something else to resume. EndpointError: the annotator's endpoint fails; what was marked is kept.
    """
    if label is not None and label not in LABELS:
        raise ConfigError(f"label {label!r} is neither harmful nor benign")
    if not 0 <= min_confidence <= 1:
        raise ConfigError(f"min_confidence {min_confidence} is outside 0 … 1")
    out = Path(out).absolute()
    check_free(out, force=force)
    called, rows, refused = _rows(data, label)
    settings = {"data": data, "annotator": annotator.name, "label": label, "min_confidence": min_confidence}
    content = digest_of([[r.id, r.line, r.prompt, r.response, r.harmful] for r in rows])
    partial = _begin(out, digest_of([settings, content]), resume=resume, force=force)
    marked = _mark(rows, annotator, partial / MARKED, min_confidence, progress)
    kept = [line for line, _ in marked.values() if line]
    refused += [{"id": r.id, "line": r.line, "reason": marked[r.line][1]} for r in rows if not marked[r.line][0]]
    if not kept:
        remove(partial)
        raise ConfigError(
            f"none of the {len(refused)} row(s) of {called} can be annotated:\n{_first(refused)}",
            "Rows need a query and a response that begins with <think>; or try --annotator openai.",
        )
    texts = {
        ANNOTATED: "".join(kept),
        REFUSED: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in sorted(refused, key=lambda r: r["line"])),
    }
    result = {
        "annotated": len(kept),
        "refused": len(refused),
        "harmful": sum(json.loads(line)["harmful"] for line in kept),
        "confidence": counts(json.loads(line)["confidence"] for line in kept),
        "reasons": _reasons(refused),
    }
    inputs = {"data": {"name": called, "sha256": content}}
    manifest = new_manifest(KIND, config=settings, inputs=inputs, given=list(given))
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    manifest |= {"result": result, "outputs": {"files": digests}}
    for name, text in texts.items():
        write_whole(partial / name, text.encode())
    (partial / MARKED).unlink()
    (partial / IDENTITY).unlink()
    write_whole(partial / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    replace_folder(partial, out)
    return read_annotated(out)


def _rows(data: str, label: str | None) -> tuple[str, list[Raw], list[dict[str, Any]]]:
    """What ``data`` is called, its rows, and those that are refused before they are looked at."""
    called, found, _ = read_rows_as_they_are(data)
    rows: list[Raw] = []
    refused: list[dict[str, Any]] = []
    seen: set[str] = set()
    unlabelled = 0
    for line, row in found:
        name = str(row.get("id", line)) if isinstance(row, Mapping) else str(line)
        try:
            if isinstance(row, ValueError):
                raise row
            pair, _ = pair_of(row)
            if name in seen:
                raise ValueError("its id is another row's")
            try:
                harmful = label_of(row, label)
            except ValueError:
                unlabelled += 1
                raise
        except ValueError as error:
            refused.append({"id": name, "line": line, "reason": str(error)})
            continue
        seen.add(name)
        rows.append(Raw(name, line, pair.prompt, pair.answer, harmful))
    if unlabelled and not rows:
        raise ConfigError(
            f"no row of {called} says whether its query is harmful",
            "Give --label harmful or --label benign for the whole file, or a field harmful (true, false) to each row.",
        )
    if not rows:
        raise ConfigError(f"{called} has no row that can be used:\n{_first(refused)}", f"Shapes of rows: {SHAPES}.")
    return called, rows, refused


def _begin(out: Path, identity: str, *, resume: bool, force: bool) -> Path:
    partial = out.with_name(f"{out.name}.partial")
    mark = partial / IDENTITY
    if partial.exists() and resume:
        if not mark.exists() or mark.read_text(encoding="utf-8") != identity:
            raise OutputError(
                f"{partial} belongs to a run with other rows or settings",
                "Repeat that run's settings to resume it, or start again with --force.",
            )
        return partial
    if partial.exists() and not force:
        raise OutputError(
            f"{partial} is there from a run that did not finish", "Go on with --resume, or start again with --force."
        )
    remove(partial)
    partial.mkdir(parents=True)
    write_whole(mark, identity.encode())
    return partial


def _mark(
    rows: Sequence[Raw], annotator: Annotator, file: Path, least: float, progress: Progress | None
) -> dict[int, tuple[str, str]]:
    """By line: the annotated row, or "" and why it is refused. Appends to ``file`` and takes over what it holds."""
    done = dict(_marked(file))
    left = [row for row in rows if row.line not in done]
    for start in range(0, len(left), CHUNK):
        chunk = left[start : start + CHUNK]
        lines = []
        for row, spans in zip(chunk, annotator.mark(chunk), strict=True):
            if isinstance(spans, str):
                done[row.line] = "", spans
            elif spans.confidence < least:
                done[row.line] = "", f"its confidence {spans.confidence:g} is below {least:g}"
            else:
                done[row.line] = line_of(row, spans, annotator.name), ""
            lines.append(json.dumps([row.line, *done[row.line]], ensure_ascii=False) + "\n")
        with file.open("a", encoding="utf-8") as opened:
            opened.write("".join(lines))
        if progress:
            progress(len(rows) - len(left) + start + len(chunk), len(rows))
    return {row.line: done[row.line] for row in rows}


def _marked(file: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """What an earlier attempt had marked; a torn last line is cut off."""
    if not file.exists():
        return
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        write_whole(file, kept)
    for line in kept.decode().split("\n"):
        if line:
            number, annotated, reason = json.loads(line)
            yield number, (annotated, reason)


def _reasons(refused: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in refused:
        found[row["reason"]] = found.get(row["reason"], 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _first(refused: Sequence[Mapping[str, Any]], most: int = 10) -> str:
    lines = [f"- {row['id']} (line {row['line']}): {row['reason']}" for row in refused[:most]]
    return "\n".join([*lines, f"- and {len(refused) - most} more"] if len(refused) > most else lines)
