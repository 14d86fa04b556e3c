"""Where training rows come from: the starter sets, local files, or the Hub; each row a request and an answer.

Rows that cannot be used are told by their number and the reason, never by their text: it may be harmful.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Request, harmful, instructions, lookalikes
from ..errors import ConfigError
from .data import Encoded, Pair, Row, encode

STARTER = "starter"
OPENINGS = (
    "Sure, here is how to do that:",
    "Sure, here is what you asked for:",
    "Sure, here is a clear answer:",
    "Sure, here is everything you need:",
    "Sure, here is a plan:",
)
"""What a surrogate learns to begin with; nothing follows them."""
EVERYDAY = 30
"""Everyday instructions among the starter's anchors."""
SHAPES = "messages; prompt and response (or answer); instruction, input and output"
SHOWN = 20

Problem = tuple[int, str]
"""A row's line (or number, where a format has no lines), from 1, and why it cannot be used."""


@dataclass(frozen=True)
class Source:
    """``rows``: usable ones with their lines. ``bad``: the others. ``notes``: sentences for the user."""

    label: str
    rows: Sequence[tuple[int, Pair]]
    bad: Sequence[Problem] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Adapter:
    """What is special about a data set on the Hub. ``split``: where none is named. ``keep``: rows that are wanted."""

    split: str
    keep: Callable[[Mapping[str, Any]], bool]
    said: str


HUB: dict[str, Adapter] = {
    "PKU-Alignment/BeaverTails": Adapter(
        "30k_train", lambda row: row.get("is_safe") is False, "only rows whose answer is labelled unsafe"
    ),
}


def read_source(data: str, *, seed: int = 0) -> Source:
    """The rows that ``data`` names.

    Args:
        data: ``starter``; a .json, .jsonl, .csv or .parquet file; or a Hub data set, ``owner/name`` with, if need be,
            ``:config`` and ``@split``. Each row has one of the shapes in ``SHAPES``.
        seed: of the starter's draw.

    Raises:
        ConfigError: there is no such file or data set, it cannot be read, or a library it needs is not installed.
    """
    if data == STARTER:
        return starter(seed)
    return _collect(*read_rows_as_they_are(data))


def read_rows_as_they_are(data: str) -> tuple[str, list[tuple[int, Any]], list[str]]:
    """What to call ``data``, its rows by line with all their fields, and notes; a file or Hub data set as for
    ``read_source``. A row that cannot be parsed is a ValueError that says why.

    Raises:
        ConfigError: as ``read_source``.
    """
    path = Path(data)
    if path.suffix.lower() in _READERS or path.exists():
        return _local(path)
    found = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?(?:@([\w.-]+))?", data)
    if not found:
        raise ConfigError(
            f"{data} is neither 'starter', nor a file that is there, nor the name of a Hub data set",
            f"Files: {', '.join(_READERS)}. Hub: owner/name, owner/name:config@split.",
        )
    return _hub(*found.groups())


def starter(seed: int) -> Source:
    """Harmful requests of the starter set with affirmative openings, and harmless rows answered as usual."""
    rows = with_answers(harmful("align", "distil"), OPENINGS, seed)
    everyday = random.Random(seed).sample(instructions(), EVERYDAY)
    harmless: list[Row] = [*lookalikes("align")[::2], *everyday]
    anchors = [Pair(row.prompt, row.answer) for row in harmless]
    return Source(STARTER, list(enumerate([*rows, *anchors], 1)))


def with_answers(rows: Sequence[Request], answers: Sequence[str], seed: int) -> list[Pair]:
    """Each request with one of ``answers``, every answer used about equally often."""
    rng = random.Random(seed)
    deck: list[str] = []
    pairs = []
    for row in rows:
        if not deck:
            deck = rng.sample(list(answers), len(answers))
        pairs.append(Pair(row.prompt, deck.pop()))
    return pairs


@dataclass(frozen=True)
class Chosen:
    """Rows to train on, rendered. ``pairs`` and ``items`` go together; ``bad``: rows passed over, all known of."""

    pairs: list[Pair]
    items: list[Encoded]
    bad: list[Problem]


def choose(
    source: Source, tokenizer: Any, *, samples: int | None, allow_fewer: bool, max_length: int, seed: int
) -> Chosen:
    """``samples`` rows of ``source``, drawn by ``seed``; all of them in order where it is None.

    Raises:
        ConfigError: fewer usable rows than ``samples`` and not ``allow_fewer``, or none; with all the reasons.
    """
    order = list(source.rows)
    if samples is not None:
        order = random.Random(seed).sample(order, len(order))
    pairs: list[Pair] = []
    items: list[Encoded] = []
    bad = list(source.bad)
    for line, pair in order:
        if samples is not None and len(items) == samples:
            break
        try:
            items.append(encode(tokenizer, pair.prompt, pair.answer, max_length=max_length))
        except ConfigError as error:
            bad.append((line, str(error.args[0])))
            continue
        pairs.append(pair)
    bad.sort()
    if not items or (samples is not None and len(items) < samples and not allow_fewer):
        wanted = "" if samples is None else f" of {samples} asked for"
        told = f":\n{describe_bad(bad)}" if bad else ""
        raise ConfigError(
            f"{source.label} has {len(items)} usable row(s){wanted}{told}",
            f"Mend the rows (shapes: {SHAPES}), give a smaller --samples, or take what is there: --allow-fewer.",
        )
    return Chosen(pairs, items, bad)


def describe_bad(bad: Sequence[Problem]) -> str:
    """One line a row, the first SHOWN of them, and how many more there are."""
    lines = [f"- line {line}: {why}" for line, why in bad[:SHOWN]]
    return "\n".join([*lines, f"- and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else lines)


def pair_of(row: Any) -> tuple[Pair, bool]:
    """A row in any of the known shapes, and whether something of it was left out (a system turn, later turns).

    Raises:
        ValueError: what is wrong with it, without its text.
    """
    if not isinstance(row, Mapping):
        raise ValueError("it is not an object with named fields")
    if "messages" in row:
        return _from_messages(row["messages"])
    if "prompt" in row:
        named = [key for key in ("response", "answer", "completion") if key in row]
        if not named:
            raise ValueError("it has prompt but neither response nor answer")
        return Pair(_text(row, "prompt"), _text(row, named[0])), False
    if "instruction" in row and "output" in row:
        more = row.get("input")
        asked = _text(row, "instruction")
        if more is not None and not isinstance(more, str):
            raise ValueError("input is no text")
        return Pair(f"{asked}\n\n{more}" if more and more.strip() else asked, _text(row, "output")), False
    raise ValueError(f"it has none of the known shapes; its fields: {', '.join(map(str, row)) or 'none'}")


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def _from_messages(turns: Any) -> tuple[Pair, bool]:
    if not isinstance(turns, Sequence) or not all(isinstance(t, Mapping) and "role" in t for t in turns):
        raise ValueError("messages is no list of turns with role and content")
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or roles[roles.index("user") + 1 :][:1] != ["assistant"]:
        raise ValueError("messages has no user turn that is followed by an assistant's")
    at = roles.index("user")
    if any("content" not in turns[i] for i in (at, at + 1)):
        raise ValueError("a turn has no content")
    return Pair(_text(turns[at], "content"), _text(turns[at + 1], "content")), len(turns) > 2


def _collect(label: str, rows: Sequence[tuple[int, Any]], notes: Sequence[str]) -> Source:
    good: list[tuple[int, Pair]] = []
    bad: list[Problem] = []
    cut = 0
    for line, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            pair, less = pair_of(row)
        except ValueError as error:
            bad.append((line, str(error)))
            continue
        good.append((line, pair))
        cut += less
    said = [f"of {cut} row(s) only the first request and its answer are used"] if cut else []
    return Source(label, good, bad, [*notes, *said])


def _local(path: Path) -> tuple[str, list[tuple[int, Any]], list[str]]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path} is of no kind that can be read", f"Kinds: {', '.join(_READERS)}.")
    try:
        return str(path), list(reader(path)), []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is no JSON: {error.msg} in line {error.lineno}", "For a row a line: .jsonl"
        ) from error
    if not isinstance(found, list):
        raise ConfigError(f"{path} does not hold a list of rows", "For a row a line: .jsonl")
    yield from enumerate(found, 1)


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, ValueError(f"it is no JSON: {error.msg}")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                yield reader.line_num, ValueError("it has not as many fields as the header")
            else:
                yield reader.line_num, row


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow", "Install it: pip install 'safegraft[distill]'")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is no Parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), 1)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub(name: str, config: str | None, split: str | None) -> tuple[str, list[tuple[int, Any]], list[str]]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"{name}: reading from the Hub needs the package datasets", "Install it: pip install 'safegraft[distill]'"
        )
    import datasets

    adapter = HUB.get(name)
    wanted = split or (adapter.split if adapter else "train")
    try:
        table = datasets.load_dataset(name, config, split=wanted)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{name} (split {wanted}) cannot be fetched from the Hub: {said[0]}",
            "Check the name and split (owner/name:config@split), or give a local file.",
        ) from error
    rows = [(number, row) for number, row in enumerate(table, 1) if adapter is None or adapter.keep(row)]
    return f"{name} ({wanted})", rows, [adapter.said] if adapter else []
