"""HumanEval+ and MBPP+ by EvalPlus (arXiv:2305.01210), its program in an environment of its own.

Its dependencies do not agree with ours (an older protobuf), so it lives in a virtual environment in a folder that the
user names, together with its problems. The model is asked here; EvalPlus's ``sanitize`` takes the code out of the
answers and its ``evaluate`` runs it against its tests, both inside the sandbox. Its ``eval_results.json`` is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..answers import Answer, Judged, key_of
from ..environments import install, installed, python_of
from ..records import ChatModel, Reply, Sampling, ask
from ..thinking import split
from . import sandbox
from .base import KIND, Progress, Scored, journal, lines, save
from .harness import require_code
from .tasks import PLUS, local_files, read_rows

VERSION = "0.3.1"
METRIC = "pass@1"
TOKENS = 768
"""New tokens of an answer, as in EvalPlus's own generation."""
CHUNK = 128
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "contract", "base_input", "plus_input", "atol")
ASKED = (
    "Solve the following programming problem. Reply with one self-contained Python code block.\n\n"
    "```python\n{problem}\n```"
)
"""In our words: EvalPlus's own generation asks in others and begins the answer for the model."""
REPLIES, SAMPLES, PROBLEMS = "replies.jsonl", "samples.jsonl", "problems.jsonl"
CLEAN, RESULTS, LOG = "samples-sanitized.jsonl", "eval_results.json", "evalplus.log"
LIMITS = {"CPU": 3600, "AS": 4 << 30, "NPROC": 64, "NOFILE": 1024, "FSIZE": 512 * sandbox.MEGABYTE}
"""Of EvalPlus's own process; it limits each program that it runs to 4 GB and by time as well."""
SCRATCH = 1 << 30
"""Bytes of /tmp: EvalPlus keeps the expected outputs there."""
SECONDS_EACH, SECONDS = 120.0, 600.0
"""Wall clock: for each problem, and beside."""


def setup(folder: Path) -> str:
    """Make the environment, install EvalPlus in it, and fetch its problems; what is there already is left alone.

    Returns:
        What is there now, in a sentence.

    Raises:
        OutputError: ``folder`` is something else, or cannot be written.
        ConfigError: pip could not install it; the message ends with pip's.
    """
    install(folder, "evalplus", VERSION, "EvalPlus")
    lacking = [name for name in PLUS if not (folder / "data" / PLUS[name][1][1]).exists() and not _fetch(folder, name)]
    if lacking:
        files = " and ".join(PLUS[name][1][0] for name in lacking)
        return (
            f"EvalPlus {VERSION} is in {folder}, without the problems of {' and '.join(lacking)}, which it could not "
            f"download: put {files} of its releases into a folder and name it with --data."
        )
    return f"EvalPlus {VERSION} and its problems are in {folder}."


def _fetch(folder: Path, name: str) -> bool:
    """Let EvalPlus download the problems, and keep a copy of its file."""
    module = {"humaneval+": "humaneval", "mbpp+": "mbpp"}[name]
    getter = {"humaneval+": "_ready_human_eval_plus_path", "mbpp+": "_ready_mbpp_plus_path"}[name]
    code = f"from evalplus.data.{module} import {getter} as get; print(get(), end='')"
    done = subprocess.run(
        [str(python_of(folder)), "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(folder.resolve() / "cache")},
    )  # fmt: skip
    found = Path(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else None
    if found is None or not found.is_file():
        return False
    (folder / "data").mkdir(exist_ok=True)
    shutil.copyfile(found, folder / "data" / PLUS[name][1][1])
    return True


@dataclass(frozen=True)
class PlusTask:
    """HumanEval+ or MBPP+, ready to be asked. A problem counts as solved where both its original tests and EvalPlus's
    pass; the result file tells the two apart."""

    name: str
    environment: Path
    about: Mapping[str, Any]
    problems: list[dict[str, Any]] = field(repr=False)
    tokens: int = TOKENS
    needs: frozenset[str] = frozenset()

    def measure(self, label: str, model: ChatModel, folder: Path, progress: Progress | None) -> list[Scored]:
        """See Utility. Leaves replies.jsonl, samples.jsonl, samples-sanitized.jsonl, eval_results.json (EvalPlus's) and
        evalplus.log.

        Raises:
            ConfigError: EvalPlus failed; its log is in ``folder``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        replies = self._replies(label, model, folder / REPLIES, progress)
        thoughts = {ident: split(reply.text) for ident, reply in replies.items()}
        asked = [(p, thoughts[p["task_id"]]) for p in self.problems]
        save(folder / SAMPLES, lines([{"task_id": p["task_id"], "solution": t.answer} for p, t in asked]))
        if not (folder / RESULTS).exists():
            self._run(folder)
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["eval"]
        out = []
        for problem, thought in asked:
            ident = problem["task_id"]
            solved = all(found[ident][0][f"{tests}_status"] == "pass" for tests in ("base", "plus"))
            right = "truncated" if thought.outcome == "truncated" else "correct" if solved else "wrong"
            key, reply = key_of(label, self.name, ident, "none"), replies[ident]
            answer = Answer(
                key, label, self.name, ident, KIND, "", "none", problem["prompt"], "", reply.text, thought.answer,
                thought.reasoning, thought.outcome, reply.finished, reply.tokens,
            )  # fmt: skip
            out.append(Scored(answer, Judged(key, METRIC, right)))
        return out

    def _replies(self, label: str, model: ChatModel, kept: Path, progress: Progress | None) -> dict[str, Reply]:
        held = {row["task_id"]: Reply(row["text"], row["tokens"], row["finished"]) for row in journal(kept)}
        for start in range(0, len(self.problems), CHUNK):
            part = self.problems[start : start + CHUNK]
            if any(p["task_id"] not in held for p in part):
                made = model.replies(
                    [ask(ASKED.format(problem=p["prompt"].strip())) for p in part], Sampling(self.tokens)
                )
                fresh = {p["task_id"]: r for p, r in zip(part, made, strict=True) if p["task_id"] not in held}
                with kept.open("a", encoding="utf-8") as file:
                    file.write(lines([{"task_id": i, "text": r.text, "tokens": r.tokens, "finished": r.finished}
                                      for i, r in fresh.items()]))  # fmt: skip
                held |= fresh
            if progress:
                progress(f"{label}: {self.name}", start + len(part), len(self.problems))
        return held

    def _run(self, folder: Path) -> None:
        """EvalPlus's two programs in the sandbox, on copies; its results come back."""
        dataset = PLUS[self.name][0]
        with tempfile.TemporaryDirectory(prefix="safegraft-") as inside:
            place = Path(inside)
            place.chmod(0o777)
            save(place / PROBLEMS, lines(self.problems))
            save(place / "none.jsonl", "")
            shutil.copyfile(folder / SAMPLES, place / SAMPLES)
            ours, other = ("HUMANEVAL", "MBPP") if dataset == "humaneval" else ("MBPP", "HUMANEVAL")
            environment = {
                f"{ours}_OVERRIDE_PATH": str(place / PROBLEMS), f"{other}_OVERRIDE_PATH": str(place / "none.jsonl"),
            }  # fmt: skip
            said = ""
            for module, options in (
                ("sanitize", ["--samples", str(place / SAMPLES)]),
                ("evaluate", ["--dataset", dataset, "--samples", str(place / CLEAN), "--parallel", "2"]),
            ):
                done = sandbox.run(
                    [str(python_of(self.environment)), "-I", "-B", "-m", f"evalplus.{module}", *options],
                    readable=[self.environment, *_interpreter(self.environment)], writable=[place], limits=LIMITS,
                    environment=environment, scratch=SCRATCH, seconds=SECONDS + SECONDS_EACH * len(self.problems),
                )  # fmt: skip
                said += f"evalplus.{module}: status {done.status}\n{done.stdout}{done.stderr}\n"
                if done.status != 0:
                    break
            save(folder / LOG, said)
            results = place / CLEAN.replace(".jsonl", "_eval_results.json")
            if not results.exists():
                last = [line for line in said.splitlines() if line.strip()][-1]
                raise ConfigError(f"EvalPlus failed: {last}", f"All it said is in {folder / LOG}.")
            shutil.copyfile(place / CLEAN, folder / CLEAN)
            save(folder / RESULTS, results.read_text(encoding="utf-8"))


def _interpreter(environment: Path) -> Sequence[Path]:
    """The installation that the environment's interpreter belongs to."""
    real = python_of(environment).resolve().parent.parent
    return [real] if str(real) != "/" else []


def load(
    name: str,
    environment: Path | None,
    *,
    data: Path | None = None,
    limit: int | None = None,
    tokens: int | None = None,
    allow_code: bool = False,
) -> PlusTask:
    """HumanEval+ or MBPP+ with its problems.

    Args:
        name: humaneval+ or mbpp+. environment: what ``setup`` made. data: a folder to look for its file in before that.
        limit: its first problems, ≥ 1. tokens: new tokens of an answer, TOKENS if not given.

    Raises:
        ConfigError: running code was not allowed or cannot be shut in here, there is no environment, or the problems
            are not to be had.
    """
    require_code(name, allow_code)
    if environment is None or installed(environment, "evalplus") != VERSION:
        where = f"in {environment}" if environment else "named with --evalplus"
        raise ConfigError(
            f"{name} needs EvalPlus {VERSION}, and there is none {where}",
            "Make its environment: safegraft utility evalplus --setup FOLDER.",
        )
    dataset, files = PLUS[name]
    found = local_files({"test": files}, data).get("test") or environment / "data" / files[1]
    if not found.exists():
        raise ConfigError(
            f"the problems of {name} are not in {environment}",
            f"Run safegraft utility evalplus --setup again with a network, or put {files[0]} of its releases into a "
            "folder and name it with --data.",
        )
    problems = read_rows(found, COLUMNS)[:limit]
    digest = hashlib.sha256("".join(json.dumps(p, sort_keys=True) for p in problems).encode()).hexdigest()
    about = {
        "source": str(found), "sha256": digest, "cases": len(problems), "paper": "arXiv:2305.01210",
        "licence": "Apache-2.0", "metric": METRIC, "filter": f"base and plus tests of {dataset}",
        "evalplus": {"version": VERSION, "tokens": tokens or TOKENS, "limit": limit},
    }  # fmt: skip
    return PlusTask(name, environment.resolve(), about, problems, tokens or TOKENS)
