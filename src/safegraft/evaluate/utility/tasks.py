"""Which tasks are known by name, and how their published files become the columns that the harness's tasks read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError

Row = Mapping[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True)
class Known:
    """A task of lm-evaluation-harness with a short name.

    Attributes:
        task: its name there. folder: where its definition lies there. metric, filter: the score that is taken.
        files: by split, names it has as a local file; columns: what its rows must have. convert: from such rows to the
            harness's. code: it runs what the model wrote. without: settings that name splits the files do not have.
    """

    task: str
    folder: str
    metric: str
    filter: str
    paper: str
    licence: str
    files: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    convert: Callable[[Rows], list[dict[str, Any]]] = lambda rows: [dict(row) for row in rows]
    code: bool = False
    without: tuple[str, ...] = ()


def medmcqa(rows: Rows) -> list[dict[str, Any]]:
    """The published file counts the right option from 1, the Hub's from 0. Raises ConfigError where neither fits."""
    seen = {int(row["cop"]) for row in rows}
    first = 0 if 0 in seen else 1
    if not seen <= set(range(first, first + 4)) or (first == 1 and 4 not in seen):
        raise ConfigError(
            f"medmcqa: the right options {sorted(seen)} are counted neither from 0 nor from 1",
            "Give the whole published file.",
        )
    return [{**row, "cop": int(row["cop"]) - first} for row in rows]


def medqa(rows: Rows) -> list[dict[str, Any]]:
    """Question and options under the names of the Hub's four-option version."""
    letters = ("A", "B", "C", "D")
    return [
        {"sent1": row["question"], "label": letters.index(row["answer_idx"]),
         **{f"ending{i}": row["options"][letter] for i, letter in enumerate(letters)}}
        for row in rows
    ]  # fmt: skip


def mbpp(rows: Rows) -> list[dict[str, Any]]:
    """The test split, tasks 11 to 510 (arXiv:2108.07732, appendix); the file holds all splits."""
    return [dict(row) for row in rows if 11 <= int(row["task_id"]) <= 510]


KNOWN = {
    "gsm8k": Known(
        "gsm8k", "gsm8k", "exact_match", "flexible-extract", "arXiv:2110.14168", "MIT",
        {"test": ("gsm8k_test.jsonl",), "train": ("gsm8k_train.jsonl",)}, ("question", "answer"),
    ),
    "math500": Known(
        "minerva_math500", "minerva_math", "math_verify", "none", "arXiv:2305.20050", "MIT",
        {"test": ("math500.jsonl", "MATH-500.jsonl")}, ("problem", "solution", "answer"),
    ),
    "medmcqa": Known(
        "medmcqa", "medmcqa", "acc", "none", "arXiv:2203.14371", "MIT",
        {"validation": ("medmcqa_dev.json", "medmcqa_dev.jsonl")}, ("question", "opa", "opb", "opc", "opd", "cop"),
        medmcqa, without=("training_split",),
    ),
    "medqa": Known(
        "medqa_4options", "medqa", "acc", "none", "arXiv:2009.13081", "MIT",
        {"test": ("medqa_us_test.jsonl",)}, ("question", "options", "answer_idx"), medqa,
        without=("training_split", "validation_split"),
    ),
    "mmlu_pro": Known(
        "mmlu_pro", "mmlu_pro", "exact_match", "custom-extract", "arXiv:2406.01574", "MIT",
        {"test": ("mmlu_pro_test.jsonl",), "validation": ("mmlu_pro_validation.jsonl",)},
        ("question", "options", "answer", "cot_content", "category"),
    ),
    "ifeval": Known(
        "ifeval", "ifeval", "prompt_level_strict_acc", "none", "arXiv:2311.07911", "Apache-2.0",
        {"train": ("ifeval_input_data.jsonl", "input_data.jsonl")}, ("key", "prompt", "instruction_id_list", "kwargs"),
    ),
    "humaneval": Known(
        "humaneval_instruct", "humaneval", "pass@1", "create_test", "arXiv:2107.03374", "MIT",
        {"test": ("HumanEval.jsonl.gz", "HumanEval.jsonl")}, ("task_id", "prompt", "entry_point", "test"), code=True,
    ),
    "mbpp": Known(
        "mbpp_instruct", "mbpp", "pass_at_1", "extract_code", "arXiv:2108.07732", "CC-BY-4.0",
        {"test": ("mbpp.jsonl",)}, ("task_id", "text", "test_list"), mbpp, code=True,
    ),
}  # fmt: skip
PLUS = {"humaneval+": ("humaneval", ("HumanEvalPlus.jsonl.gz", "HumanEvalPlus.jsonl")),
        "mbpp+": ("mbpp", ("MbppPlus.jsonl.gz", "MbppPlus.jsonl"))}  # fmt: skip
"""EvalPlus's tasks: its name of the data set, and names of its file."""
SUITES = {
    "utility": ("gsm8k", "math500", "medmcqa", "medqa", "mmlu_pro", "ifeval"),
    "code": ("humaneval", "mbpp"),
    "evalplus": ("humaneval+", "mbpp+"),
}
"""Tasks behind one name. Those that run generated code are only in suites of their own."""
ANY = "lm_eval:"
"""Before the name of a task of the harness that has no short name here."""
METRICS = {"pass_at_1": "pass@1"}
"""Harness's names for what is called otherwise elsewhere."""


def local_files(wanted: Mapping[str, tuple[str, ...]], data: Path | None) -> dict[str, Path]:
    """Files of a task in ``data``, by split; empty where none of its files is there.

    Raises:
        ConfigError: no such folder, or some of the files are there and others are not.
    """
    if data is None:
        return {}
    if not data.is_dir():
        raise ConfigError(f"there is no folder {data}")
    found: dict[str, Path] = {}
    for split, names in wanted.items():
        for name in names:
            here = sorted(data.rglob(name))
            if here and split not in found:
                found[split] = here[0]
    lacking = [" or ".join(names) for split, names in wanted.items() if split not in found]
    if found and lacking:
        there = ", ".join(str(p) for p in found.values())
        raise ConfigError(f"{there} needs {' and '.join(lacking)} beside it", f"Put it into {data}.")
    return found


def read_rows(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a JSON array or JSON Lines file, which may be gzipped, whatever its name says of the two.

    Raises:
        ConfigError: it cannot be read, a row is no object, or a column is missing (with the columns it has).
    """
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not rows:
        raise ConfigError(f"{file} is empty")
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if c not in row] if isinstance(row, dict) else list(columns)
        if missing:
            has = ", ".join(row) if isinstance(row, dict) else "none"
            raise ConfigError(f"{file}, row {number} has no {', '.join(missing)}", f"Its columns: {has}.")
    return list(rows)
