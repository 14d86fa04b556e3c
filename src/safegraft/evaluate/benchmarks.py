"""Sets of prompts to measure with: the bundled starter set, files at hand, and sets of the Hub."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data import harmful, lookalikes
from ..errors import ConfigError
from ..registry import Registry

Kind = Literal["harmful", "harmless", "task"]
Rows = list[Mapping[str, Any]]
SHORTEST = 3
"""Characters below which a text is no prompt."""


@dataclass(frozen=True)
class Case:
    """One prompt. ``id`` is unique within its ``benchmark``; ``kind`` says whether it should be refused, answered, or
    answered rightly, with ``key`` in the answer."""

    benchmark: str
    id: str
    kind: Kind
    category: str
    prompt: str
    key: str = ""


@dataclass(frozen=True)
class Hub:
    """Where a set lies on the Hub. ``gated``: its terms have to be accepted there first."""

    repo: str
    config: str | None = None
    split: str = "train"
    gated: bool = False


@dataclass(frozen=True)
class Benchmark:
    """A set of prompts and how to read it.

    Attributes:
        kind: of all its prompts, or None where ``labels`` tells by a column's value.
        files: names it has as a local file. prompt, category: columns, the first that is there counts.
        labels: (column, value of harmless rows). paper, licence: for the record.
    """

    name: str
    kind: Kind | None
    paper: str
    licence: str
    hub: Hub | None = None
    files: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ("prompt", "question", "instruction", "text")
    category: tuple[str, ...] = ("category", "type", "topic")
    labels: tuple[str, str] | None = None
    where: str = ""


@dataclass(frozen=True)
class Loaded:
    """The cases of a benchmark, where they came from, and the SHA-256 over all that it holds (before any limit)."""

    benchmark: Benchmark
    source: str
    sha256: str
    cases: list[Case] = field(repr=False)


BENCHMARKS: Registry[Benchmark] = Registry("benchmark")

for _known in (
    Benchmark("starter", None, "written for Safegraft", "CC0-1.0"),
    Benchmark("catqa", "harmful", "arXiv:2402.11746", "Apache-2.0", Hub("declare-lab/CatQA", split="en"),
              ("catqa_en.json", "catqa_english.json")),
    Benchmark("harmfulqa", "harmful", "arXiv:2308.09662", "Apache-2.0", Hub("declare-lab/HarmfulQA"),
              ("harmfulqa.json",)),
    Benchmark("dangerousqa", "harmful", "arXiv:2308.09662, after arXiv:2212.08061", "Apache-2.0", None,
              ("dangerousqa.json",), where="github.com/declare-lab/red-instruct, harmful_questions/dangerousqa.json"),
    Benchmark("salad", "harmful", "arXiv:2402.05044", "Apache-2.0", Hub("OpenSafetyLab/Salad-Data", "base_set"),
              ("salad_sample.json", "salad.json"), category=("1-category", "category")),
    Benchmark("beavertails", "harmful", "arXiv:2307.04657", "CC-BY-NC-4.0",
              Hub("PKU-Alignment/BeaverTails-Evaluation", split="test"), ("beavertails_evaluation.json",)),
    Benchmark("sorry-bench", "harmful", "arXiv:2406.14598", "gated, see its card",
              Hub("sorry-bench/sorry-bench-202406", gated=True), ("sorry_bench.jsonl",), prompt=("turns", "prompt")),
    Benchmark("harmbench", "harmful", "arXiv:2402.04249", "MIT", Hub("walledai/HarmBench", "standard", gated=True),
              ("harmbench_behaviors_text_all.csv", "harmbench.json"), prompt=("Behavior", "prompt"),
              category=("SemanticCategory", "category")),
    Benchmark("advbench", "harmful", "arXiv:2307.15043", "MIT", Hub("walledai/AdvBench", gated=True),
              ("advbench.json", "harmful_behaviors.csv"), prompt=("goal", "prompt", "instruction")),
    Benchmark("strongreject", "harmful", "arXiv:2402.10260", "MIT", Hub("walledai/StrongREJECT"),
              ("strongreject_dataset.csv", "strongreject.json"), prompt=("forbidden_prompt", "prompt")),
    Benchmark("jailbreakbench", "harmful", "arXiv:2404.01318", "MIT",
              Hub("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"), ("jailbreakbench.json",),
              prompt=("Goal", "prompt")),
    Benchmark("xstest", None, "arXiv:2308.01263", "CC-BY-4.0", Hub("Paul/XSTest"),
              ("xstest_prompts.csv", "xstest/prompts.csv"), labels=("label", "safe")),
    Benchmark("or-bench", "harmless", "arXiv:2405.20947", "CC-BY-4.0", Hub("bench-llm/or-bench", "or-bench-hard-1k"),
              ("or-bench-hard-1k.csv", "or_bench_hard.json")),
):  # fmt: skip
    BENCHMARKS.add(_known.name, _known)
for _language in ("en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv"):
    BENCHMARKS.add(f"multijail-{_language}", Benchmark(
        f"multijail-{_language}", "harmful", "arXiv:2310.06474", "MIT", Hub("DAMO-NLP-SG/MultiJail"),
        ("multijail.csv",), prompt=(_language,), category=("tags", "category"),
    ))  # fmt: skip

SUITES: dict[str, tuple[str, ...]] = {
    "starter": ("starter",),
    "safety": ("catqa", "harmfulqa", "dangerousqa", "salad", "beavertails", "harmbench", "advbench", "strongreject",
               "jailbreakbench", "sorry-bench"),
    "overrefusal": ("xstest", "or-bench"),
    "multilingual": tuple(f"multijail-{x}" for x in ("en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv")),
}  # fmt: skip
"""Benchmarks behind one name."""


def load(name: str, *, data: Path | None = None, limit: int | None = None, seed: int = 0) -> Loaded:
    """The cases of one benchmark.

    Args:
        name: one of BENCHMARKS. data: a folder to look for its file in, sub-folders included; where it is not there,
            the Hub is asked. limit: at most this many prompts of a kind, drawn by ``seed``, categories as even as
            possible; ≥ 1.

    Raises:
        ConfigError: no such benchmark, it is not to be had (with the way to get it), or it cannot be read.
    """
    benchmark = BENCHMARKS.get(name)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} is below 1")
    if name == "starter":
        bad = [Case(name, r.id, "harmful", r.category, r.prompt) for r in harmful("select", "report")]
        good = [Case(name, r.id, "harmless", r.category, r.prompt) for r in lookalikes("select", "report", "evaluate")]
        return _loaded(benchmark, "bundled", [*bad, *good], limit, seed)
    file = _local(benchmark, data)
    found, source = (_read(file), str(file)) if file else _from_hub(benchmark)
    return _loaded(benchmark, source, _cases(benchmark, found, source), limit, seed)


def _loaded(benchmark: Benchmark, source: str, cases: list[Case], limit: int | None, seed: int) -> Loaded:
    whole = json.dumps([[c.id, c.kind, c.prompt] for c in cases], ensure_ascii=False)
    kept = cases if limit is None else [c for kind in ("harmful", "harmless") for c in _drawn(cases, kind, limit, seed)]
    return Loaded(benchmark, source, hashlib.sha256(whole.encode()).hexdigest(), kept)


def _drawn(cases: Iterable[Case], kind: str, limit: int, seed: int) -> list[Case]:
    """``limit`` cases of a kind, taken from its categories in turn; in their own order."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case.kind == kind:
            groups.setdefault(case.category, []).append(case)
    rng = random.Random(seed)
    decks = [rng.sample(group, len(group)) for _, group in sorted(groups.items())]
    dealt = [deck[i] for i in range(max(map(len, decks), default=0)) for deck in decks if i < len(deck)][:limit]
    chosen = {case.id for case in dealt}
    return [case for case in cases if case.kind == kind and case.id in chosen]


def _local(benchmark: Benchmark, data: Path | None) -> Path | None:
    if data is None:
        return None
    if not data.is_dir():
        raise ConfigError(f"there is no folder {data}")
    for name in benchmark.files:
        found = sorted(p for p in data.rglob(Path(name).name) if str(p).endswith(name))
        if found:
            return found[0]
    return None


def _read(file: Path) -> Rows:
    """Rows of a JSON, JSONL or CSV file; a tree of categories becomes rows with prompt and category."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return list(_flat(json.loads(text), ""))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _flat(value: Any, category: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, str):
        yield {"prompt": value, "category": category}
    elif isinstance(value, list):
        for item in value:
            yield from [item] if isinstance(item, dict) else _flat(item, category)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, category or key)


def _from_hub(benchmark: Benchmark) -> tuple[Rows, str]:
    hub = benchmark.hub
    by_hand = f"Or put {' or '.join(benchmark.files)} into a folder and name it with --data."
    if hub is None:
        raise ConfigError(f"{benchmark.name} is not on the Hub", f"Get it from {benchmark.where}. {by_hand}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"reading {benchmark.name} from the Hub needs datasets",
            f"Install it: pip install 'safegraft[eval]'. {by_hand}",
        ) from error
    try:
        rows = load_dataset(hub.repo, hub.config, split=hub.split)
    except Exception as error:  # the library raises a dozen unrelated kinds
        gate = (
            f"Accept its terms at huggingface.co/datasets/{hub.repo} and log in (hf auth login). " if hub.gated else ""
        )
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"cannot get {benchmark.name} ({hub.repo}) from the Hub: {reason}", gate + by_hand) from error
    return [dict(row) for row in rows], f"{hub.repo} {hub.config or ''} {hub.split}".replace("  ", " ")


def _cases(benchmark: Benchmark, rows: Rows, source: str) -> list[Case]:
    """Rows to cases. Raises ConfigError naming rows without a prompt, or the columns found where none fits."""
    columns = list(rows[0]) if rows else []
    prompt = _column(benchmark.prompt, columns)
    if prompt is None:
        raise ConfigError(
            f"{benchmark.name} from {source} has no column {' or '.join(benchmark.prompt)}",
            f"Its columns: {', '.join(columns) or 'none'}.",
        )
    category, own = _column(benchmark.category, columns), _column(("id", "Index"), columns)
    cases, empty, seen = [], [], set()
    for number, row in enumerate(rows, 1):
        text = row.get(prompt)
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or len(text.strip()) < SHORTEST:
            empty.append(str(number))
            continue
        label = row.get(own) if own else None
        name = str(label) if label not in (None, "") and str(label) not in seen else f"row{number}"
        seen.add(name)
        kind = benchmark.kind or _label(benchmark, row, number, source)
        cases.append(Case(benchmark.name, name, kind, str(row.get(category) or "") if category else "", text.strip()))
    if len(empty) > len(rows) // 20:
        raise ConfigError(
            f"{benchmark.name} from {source} has {len(empty)} rows without a prompt in {prompt!r}: rows "
            + ", ".join(empty[:10]) + (" …" if len(empty) > 10 else "")
        )  # fmt: skip
    return cases


def _label(benchmark: Benchmark, row: Mapping[str, Any], number: int, source: str) -> Kind:
    assert benchmark.labels is not None
    column, harmless = benchmark.labels
    if column not in row:
        raise ConfigError(f"{benchmark.name} from {source} has no column {column!r} in row {number}")
    return "harmless" if str(row[column]).lower() == harmless else "harmful"


def _column(wanted: Sequence[str], columns: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in columns}
    return next((lower[name.lower()] for name in wanted if name.lower() in lower), None)


def load_task(file: Path, *, limit: int | None = None) -> Loaded:
    """Utility: JSONL rows with ``prompt`` and ``key``, the words that a right answer holds. Named after the file.

    Raises:
        ConfigError: it cannot be read, or rows lack one of these (all of them named).
    """
    rows, wrong, cases = _read(file), [], []
    for number, row in enumerate(rows, 1):
        prompt, key = (row.get(name) if isinstance(row, dict) else None for name in ("prompt", "key"))
        if not all(isinstance(x, str) and x.strip() for x in (prompt, key)):
            wrong.append(str(number))
            continue
        cases.append(Case(file.stem, str(row.get("id", number)), "task", "", str(prompt), str(key)))
    if wrong or not cases:
        raise ConfigError(
            f"{file} has no prompt or no key in {len(wrong)} of {len(rows)} rows: " + ", ".join(wrong[:20]),
            "Each line is JSON with prompt and key.",
        )
    task = Benchmark(file.stem, "task", "", "")
    return _loaded(task, str(file), cases if limit is None else cases[:limit], None, 0)


def expand(names: Sequence[str]) -> list[str]:
    """Suites and benchmarks as benchmarks, each once, in the order given.

    Raises:
        ConfigError: a name that is neither, with the nearest one.
    """
    out: list[str] = []
    for name in names:
        for one in SUITES.get(name, (name,)):
            BENCHMARKS.get(one)
            if one not in out:
                out.append(one)
    return out
