"""Tasks of EleutherAI's lm-evaluation-harness (the library ``lm_eval``), from the Hub or from local files.

Definitions are the harness's own: prompts, few-shot examples, filters, metrics. Only the source of the rows is replaced
where local files are given, and its metric ``code_eval``, which would run generated code in this process, by the
sandbox's.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UserError
from ...manifest import digest_of
from ..answers import Answer, Judged, key_of
from ..records import ChatModel
from . import sandbox
from .base import KIND, Progress, Scored, lines, save
from .quiet import quiet, shut_in
from .tasks import ANY, KNOWN, METRICS, Known, local_files, read_rows

REPLIES, SAMPLES, RESULTS = "replies.jsonl", "samples.jsonl", "results.json"
RIGHT_OR_WRONG = ("exact_match", "acc", "math_verify", "prompt_level_strict_acc", "pass@1", "pass_at_1", "pass_at_k")
"""Metrics whose value for one row is 0 or 1."""


@dataclass(frozen=True)
class HarnessTask:
    """One task, or the tasks of a group, ready to be asked. ``metric`` and ``filter`` name the score that is taken."""

    name: str
    metric: str
    filter: str
    about: Mapping[str, Any]
    needs: frozenset[str]
    tasks: Mapping[str, Any] = field(repr=False)
    limit: int | None = None
    seed: int = 0

    def measure(self, label: str, model: ChatModel, folder: Path, progress: Progress | None) -> list[Scored]:
        """See Utility. Leaves replies.jsonl, samples.jsonl (the harness's, a row for each filter) and results.json (the
        harness's, without the samples).

        Raises:
            ConfigError: a score is neither 0 nor 1.
        """
        import lm_eval
        from lm_eval.utils import handle_non_serializable

        from .chatlm import ChatLM

        folder.mkdir(parents=True, exist_ok=True)
        shown = f"{label}: {self.name}"
        chat = ChatLM(model, folder / REPLIES, (lambda done, n: progress(shown, done, n)) if progress else None)
        for task in self.tasks.values():  # the draw goes on from model to model otherwise
            task.set_fewshot_seed(self.seed)
        with quiet():
            found: Any = lm_eval.evaluate(
                chat, {"tasks": dict(self.tasks)}, limit=self.limit, bootstrap_iters=0, apply_chat_template=True,
                fewshot_as_multiturn=True, confirm_run_unsafe_code=True,
            )  # fmt: skip
        samples = found.pop("samples")
        scored = [self._scored(label, name, row, chat.held) for name, row in self._chosen(samples)]
        rows = [{"task": name, **row} for name, part in samples.items() for row in part]
        save(folder / SAMPLES, lines(rows, handle_non_serializable))
        save(folder / RESULTS, json.dumps(found, indent=1, ensure_ascii=False, default=handle_non_serializable) + "\n")
        return scored

    def _chosen(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for name in self.tasks:
            rows = sorted((r for r in samples[name] if r["filter"] == self.filter), key=lambda r: int(r["doc_id"]))
            yield from ((name, row) for row in rows)

    def _scored(self, label: str, task: str, row: Mapping[str, Any], held: Mapping[str, Any]) -> Scored:
        from .chatlm import answer, conversation
        from .chatlm import key_of as request_key

        value = row[self.metric]
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value not in (0, 1):
            raise ConfigError(f"{self.name}: {self.metric} of row {row['doc_id']} is {value!r}, not right or wrong")
        ident = str(row["doc_id"]) if len(self.tasks) == 1 else f"{task}/{row['doc_id']}"
        said = [held[request_key(arguments)] for arguments in row["arguments"]]
        turns = conversation(row["arguments"][0][0])
        prompt = next(m.content for m in reversed(turns) if m.role == "user")
        if "text" in said[0]:
            thought, text, finished = answer(said[0], row["arguments"][0])
            reply, tokens = said[0]["text"], said[0]["tokens"]
        else:
            best = max(range(len(said)), key=lambda i: float(said[i]["logp"]))
            text = reply = str(row["arguments"][best][1])
            thought, finished, tokens = None, True, 0
        right = "truncated" if thought and thought.outcome == "truncated" else "correct" if value == 1 else "wrong"
        key = key_of(label, self.name, ident, "none")
        return Scored(
            Answer(
                key, label, self.name, ident, KIND, "" if len(self.tasks) == 1 else task, "none", prompt,
                str(row["target"]), reply, text, thought.reasoning if thought else "",
                thought.outcome if thought else "none", finished, tokens,
            ),
            Judged(key, METRICS.get(self.metric, self.metric), right),
        )  # fmt: skip


def load(
    name: str,
    *,
    data: Path | None = None,
    limit: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    allow_code: bool = False,
) -> HarnessTask:
    """A task with its rows.

    Args:
        name: of KNOWN, or ``lm_eval:TASK``. data: a folder to look for its files in; where they are not there, the Hub
            is asked. limit: its first rows, of a group of each task, ≥ 1. tokens: new tokens of an answer instead of
            the task's own. seed: of the draw of few-shot examples. allow_code: generated code may be run (shut in).

    Raises:
        ConfigError: lm_eval is not installed, there is no such task, it runs code and that was not allowed or cannot be
            shut in here, its rows are not to be had, or it has no score that is right or wrong for each row.
    """
    known = KNOWN.get(name)
    if known and known.code:
        require_code(name, allow_code)
    manager, children = _definitions(name, known)
    local = local_files(known.files, data) if known else {}
    rows = {split: known.convert(read_rows(file, known.columns)) for split, file in local.items()} if known else {}
    with quiet(), shut_in():
        tasks = _tasks(manager, name, known, children, rows)
        if any("ifeval" in each for each in tasks):
            _require_sentences(name)
        return _ready(name, known, tasks, local, limit, tokens, seed, allow_code)


def require_code(name: str, allowed: bool) -> None:
    """Raises ConfigError unless generated code may and can be run."""
    if not allowed:
        raise ConfigError(
            f"{name} runs code that the model wrote", "Allow it, shut in, with --allow-code-execution, or leave it out."
        )
    sandbox.require()


def _require_sentences(name: str) -> None:
    """IFEval counts sentences with NLTK's model, which the harness tries to download when its task is loaded."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise ConfigError(
            f"{name} needs NLTK's punkt_tab, which is not here and could not be downloaded",
            "Where there is a network: python -m nltk.downloader punkt_tab; then copy ~/nltk_data here.",
        ) from error


def _definitions(name: str, known: Known | None) -> tuple[Any, list[str]]:
    """The harness's manager, and the names of the tasks in a group."""
    try:
        from lm_eval import tasks
    except ImportError as error:
        raise ConfigError(
            f"{name} needs lm-evaluation-harness", "Install it: pip install 'safegraft[eval]'."
        ) from error
    assert tasks.__file__
    with quiet():
        if known:
            manager = tasks.TaskManager(include_defaults=False, include_path=Path(tasks.__file__).parent / known.folder)
        else:
            manager = tasks.TaskManager()
    task = known.task if known else name.removeprefix(ANY)
    if task not in manager.task_index:
        raise ConfigError(
            f"lm-evaluation-harness has no task {task!r}", "lm-eval ls tasks names them. Is it of another version?"
        )
    return manager, list((manager.task_index[task].cfg or {}).get("task") or []) if task in manager.all_groups else []


def _tasks(
    manager: Any, name: str, known: Known | None, children: list[str], rows: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Task objects by name. An inline group is how the harness lets a task's settings be replaced."""
    task = known.task if known else name.removeprefix(ANY)
    wanted: Any = task
    if rows:
        local = {"custom_dataset": lambda **_: _dataset(rows), "dataset_path": "", "dataset_name": None}
        local |= dict.fromkeys(known.without if known else ())
        wanted = {"group": "local", "task": [{"task": each, **local} for each in children or [task]]}
    try:
        return dict(manager.load([wanted])["tasks"])
    except UserError:
        raise
    except Exception as error:  # the harness and its libraries raise a dozen unrelated kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        files = " and ".join(" or ".join(names) for names in known.files.values()) if known else ""
        hint = f"Without the Hub: put {files} into a folder and name it with --data. " if files and not rows else ""
        more = "pip install 'safegraft[eval]' has what the known tasks need." if isinstance(error, ImportError) else ""
        raise ConfigError(f"cannot load {name}: {reason}", hint + more) from error


def _dataset(rows: Mapping[str, list[dict[str, Any]]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(part) for split, part in rows.items()})


def _ready(
    name: str, known: Known | None, tasks: dict[str, Any], local: Mapping[str, Path], limit: int | None,
    tokens: int | None, seed: int, allow_code: bool,
) -> HarnessTask:  # fmt: skip
    needs, cases, docs = set(), 0, []
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            require_code(name, allow_code)
            if not _shut_in(task):
                raise ConfigError(
                    f"{name} runs what the model wrote by a program of its own, which cannot be shut in",
                    "Choose another task.",
                )
        kind = task.OUTPUT_TYPE
        if kind == "generate_until":
            if tokens is not None:
                task.set_config("generation_kwargs", {"max_gen_toks": tokens}, update=True)
            if task.get_config("gen_prefix"):
                needs.add("continue")
        elif kind in ("multiple_choice", "loglikelihood"):
            needs.add("likelihood")
        else:
            raise ConfigError(f"{name} is of kind {kind}, which is no chat task", "Choose another task.")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        rows = task.eval_docs
        cases += len(rows) if limit is None else min(limit, len(rows))
        docs.append(_digest(rows))
    first = next(iter(tasks.values()))
    metric, chosen = (known.metric, known.filter) if known else _score(name, first)
    about = {
        "source": ", ".join(map(str, local.values())) or str(first.get_config("dataset_path")),
        "sha256": digest_of(docs), "cases": cases, "paper": known.paper if known else "",
        "licence": known.licence if known else "", "metric": METRICS.get(metric, metric), "filter": chosen,
        "harness": {"version": _version(), "tasks": {n: t.VERSION for n, t in tasks.items()},
                    "shots": first.get_config("num_fewshot"), "limit": limit, "tokens": tokens},
    }  # fmt: skip
    return HarnessTask(name, metric, chosen, about, frozenset(needs), tasks, limit, seed)


def _shut_in(task: Any) -> bool:
    """Whether all that scores a task runs code through the metric that ``quiet.shut_in`` puts in code_eval's place."""
    scorers = [task.get_config("process_results"), *(m["metric"] for m in task.get_config("metric_list") or [])]
    own = [scorer for scorer in scorers if callable(scorer)]
    known = [any(isinstance(x, sandbox.CodeEval) for x in vars(sys.modules[f.__module__]).values()) for f in own]
    return bool(known) and all(known)


def _score(name: str, task: Any) -> tuple[str, str]:
    """The first metric that is right or wrong for each row, and the first filter."""
    metrics = list(task.aggregation())
    found = next((m for m in metrics if m in RIGHT_OR_WRONG), None)
    if found is None:
        raise ConfigError(
            f"{name} has no score that is right or wrong for each row: {', '.join(metrics)}", "Choose another task."
        )
    filters = task.get_config("filter_list") or [{"name": "none"}]
    return found, str(filters[0]["name"])


def _digest(rows: Any) -> str:
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps(row, sort_keys=True, default=str).encode())
    return whole.hexdigest()


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
