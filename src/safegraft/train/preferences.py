"""Preference pairs: to one request, an answer that is preferred and one that is not.

Rows that cannot be used are told by their number and the reason, never by their text: it may be harmful.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import harmful, instructions, lookalikes, phrases
from ..errors import ConfigError
from .data import Encoded, Row, encode
from .sources import EVERYDAY, STARTER, Problem, describe_bad, read_rows_as_they_are, with_answers

SHAPES = (
    "prompt, chosen and rejected (texts or messages); chosen and rejected as whole conversations; "
    "prompt, response_0, response_1 and safer_response_id (PKU-SafeRLHF)"
)
Turn = Mapping[str, str]


@dataclass(frozen=True)
class Preference:
    """``turns``: the conversation up to the answers, the user's last. ``chosen`` is preferred to ``rejected``."""

    turns: tuple[Turn, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class EncodedPair:
    """A preference, rendered and tokenised; the labels of both are those of the answers alone."""

    chosen: Encoded
    rejected: Encoded


@dataclass(frozen=True)
class Preferences:
    """``rows``: usable ones with their lines. ``bad``: the others. ``notes``: sentences for the user."""

    label: str
    rows: Sequence[tuple[int, Preference]]
    bad: Sequence[Problem] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ChosenPairs:
    """Pairs to learn from and pairs held out, rendered; ``preferences`` are all of them in that order."""

    preferences: list[Preference]
    train: list[EncodedPair]
    held_out: list[EncodedPair]
    bad: list[Problem]


def read_preferences(data: str, *, seed: int = 0) -> Preferences:
    """The pairs that ``data`` names.

    Args:
        data: ``starter``; a .json, .jsonl, .csv or .parquet file; or a Hub data set, ``owner/name`` with, if need be,
            ``:config`` and ``@split``. Each row has one of the shapes in ``SHAPES``. Of PKU-SafeRLHF's rows those
            count in which one answer is labelled safe and the other not. seed: of the starter's draw.

    Raises:
        ConfigError: there is no such file or data set, it cannot be read, or a library it needs is not installed.
    """
    if data == STARTER:
        return starter_preferences(seed)
    label, rows, notes = read_rows_as_they_are(data)
    good: list[tuple[int, Preference]] = []
    bad: list[Problem] = []
    unclear = 0
    for line, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            found = preference_of(row)
        except ValueError as error:
            bad.append((line, str(error)))
            continue
        if found is None:
            unclear += 1
        else:
            good.append((line, found))
    if unclear:
        notes = [*notes, f"{unclear} row(s) are left out in which both answers are safe, or neither is"]
    return Preferences(label, good, bad, notes)


def starter_preferences(seed: int) -> Preferences:
    """Harmful requests of the starter set with a refusal before an affirmative opening, and as many harmless ones with
    their answer before a refusal: without these, refusing everything would be the safest mask."""
    said, rng = phrases(), random.Random(seed)
    asked = harmful("align", "distil")
    refusals, openings = with_answers(asked, said.refusals, seed), with_answers(asked, said.affirmatives, seed)
    unsafe = [
        Preference(asked_plainly(no.prompt), no.answer, yes.answer) for no, yes in zip(refusals, openings, strict=True)
    ]  # fmt: skip
    drawn = rng.sample(lookalikes("align"), len(asked) - EVERYDAY)
    harmless: list[Row] = [*drawn, *rng.sample(instructions(), EVERYDAY)]
    safe = [Preference(asked_plainly(row.prompt), row.answer, rng.choice(said.refusals)) for row in harmless]
    note = (
        f"{len(unsafe)} harmful requests, where a refusal is preferred to an affirmative opening, and {len(safe)} "
        "harmless ones, where the answer is preferred to a refusal (else refusing everything would be the safest mask)"
    )
    caution = (
        "a fine-tune that answers harmful requests without such an opening learns no refusal from these pairs "
        "(docs/results/somf.md): for use, give --preferences on-policy, or a set whose rejected answers are such as it "
        "gives"
    )
    return Preferences(STARTER, list(enumerate([*unsafe, *safe], 1)), notes=[note, caution])


def choose_pairs(
    source: Preferences,
    tokenizer: Any,
    *,
    samples: int | None,
    allow_fewer: bool,
    held_out: int,
    max_length: int,
    seed: int,
) -> ChosenPairs:
    """``samples`` pairs to learn from and ``held_out`` others, drawn by ``seed``.

    Args:
        samples: all that are left where it is None. max_length: tokens after which a conversation is cut.

    Raises:
        ConfigError: fewer usable pairs than ``samples`` and not ``allow_fewer``, or none to learn from; with all the
            reasons.
    """
    order = random.Random(seed).sample(list(source.rows), len(source.rows))
    wanted = len(order) if samples is None else samples + held_out
    kept: list[Preference] = []
    items: list[EncodedPair] = []
    bad = list(source.bad)
    for line, row in order:
        if len(items) == wanted:
            break
        try:
            sides = [encode(tokenizer, row.turns, text, max_length=max_length) for text in (row.chosen, row.rejected)]
        except ConfigError as error:
            bad.append((line, str(error.args[0])))
            continue
        if sides[0].ids == sides[1].ids:
            bad.append((line, f"both answers are the same within {max_length} tokens"))
            continue
        kept.append(row)
        items.append(EncodedPair(*sides))
    bad.sort()
    left = len(items) - held_out
    if left < 1 or (samples is not None and left < samples and not allow_fewer):
        told = f":\n{describe_bad(bad)}" if bad else ""
        asked = "" if samples is None else f" of {samples} asked for"
        raise ConfigError(
            f"{source.label} has {max(left, 0)} usable pair(s){asked} beside {held_out} held out{told}",
            f"Mend the rows (shapes: {SHAPES}), ask for fewer (--samples, --check-pairs), or take what is there: "
            "--allow-fewer.",
        )
    return ChosenPairs([*kept[held_out:], *kept[:held_out]], items[held_out:], items[:held_out], bad)


def preference_of(row: Any) -> Preference | None:
    """A row in any of the known shapes; None where neither answer is clearly the safer one.

    Raises:
        ValueError: what is wrong with it, without its text.
    """
    if not isinstance(row, Mapping):
        raise ValueError("it is not an object with named fields")
    if "safer_response_id" in row:
        return _by_safety(row)
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(f"it has none of the known shapes; its fields: {', '.join(map(str, row)) or 'none'}")
    if "prompt" in row:
        turns = (
            asked_plainly(row["prompt"]) if isinstance(row["prompt"], str) else _turns(row["prompt"], "prompt", "user")
        )
        if not turns[-1]["content"].strip():
            raise ValueError("prompt is empty")
        return _distinct(turns, _answer(row, "chosen"), _answer(row, "rejected"))
    good, poor = (_turns(row[side], side, "assistant") for side in ("chosen", "rejected"))
    if good[:-1] != poor[:-1] or len(good) < 2:
        raise ValueError("chosen and rejected are not two answers to the same conversation")
    return _distinct(good[:-1], good[-1]["content"], poor[-1]["content"])


def _by_safety(row: Mapping[str, Any]) -> Preference | None:
    safer = row["safer_response_id"]
    labels = [row.get(f"is_response_{i}_safe") for i in (0, 1)]
    if safer not in (0, 1, "0", "1"):
        raise ValueError("safer_response_id is neither 0 nor 1")
    safer = int(safer)
    if labels != [None, None]:
        truth = [str(label).strip().lower() in ("true", "1") for label in labels]
        if truth[safer] is False or truth[1 - safer] is True:
            return None
    texts = [_answer(row, f"response_{i}") for i in (0, 1)]
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError("prompt is empty or no text")
    return _distinct(asked_plainly(row["prompt"]), texts[safer], texts[1 - safer])


def _distinct(turns: tuple[Turn, ...], chosen: str, rejected: str) -> Preference:
    if chosen == rejected:
        raise ValueError("both answers are the same")
    return Preference(turns, chosen, rejected)


def asked_plainly(prompt: str) -> tuple[Turn, ...]:
    """The conversation that is one request."""
    return ({"role": "user", "content": prompt},)


def _answer(row: Mapping[str, Any], key: str) -> str:
    """An answer given as text, or as messages of which the last one counts."""
    value = row.get(key)
    text = value if isinstance(value, str) else _turns(value, key, "assistant")[-1]["content"]
    if not text.strip():
        raise ValueError(f"{key} is empty")
    return text


def _turns(value: Any, key: str, last: str) -> tuple[Turn, ...]:
    """Messages as turns, the last of which is of the role ``last``."""
    whole = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not whole or not all(
        isinstance(t, Mapping) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in value
    ):
        raise ValueError(f"{key} is neither text nor a list of turns with role and content")
    if value[-1]["role"] != last:
        raise ValueError(f"{key} does not end with a turn of the {last}")
    return tuple({"role": t["role"], "content": t["content"]} for t in value)
