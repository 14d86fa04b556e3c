"""Cases × attacks → answers → verdicts, on disk as they come; stopped at any moment, it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError
from ..manifest import digest_of, folder_digest, new_manifest
from ..runs import claim
from .answers import (
    ANSWERS,
    KIND,
    MANIFEST,
    PLAN,
    VERDICTS,
    Answer,
    Judged,
    append,
    key_of,
    latest,
    mend,
    read_answers,
    read_manifest,
    read_verdicts,
)
from .attacks.base import Attack, Attacked, generator
from .benchmarks import Case, Loaded
from .records import ChatModel, Exchange, Judge, Sampling, ask
from .summary import summarise
from .tasks import holds
from .thinking import split
from .utility.base import KIND as SCORED
from .utility.base import Utility, measure

CHUNK = 160
"""Answers asked for and written at a time. The chunks follow from the plan alone, so that a resumed run batches its
prompts as an uninterrupted one does."""
SUMMARY = "summary.json"
ON_REASONING = " on reasoning"
"""Added to a judge's name for its verdicts on what stood in think blocks."""
BY_KEY = "key"
"""The judge of tasks: whether the expected words are in the answer."""
Progress = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


Attacks = Mapping[str, Attack | Callable[[ChatModel], Attack] | None]
"""By name; None asks plainly, and what needs the model under test is made when that is there."""


@dataclass(frozen=True)
class Subject:
    """A model to measure. ``open``: a context in which it is loaded, entered when its turn comes. ``about``: what is
    known of it (path, digest), for the manifest."""

    label: str
    open: Callable[[], AbstractContextManager[ChatModel]]
    about: Mapping[str, Any]


def about_model(place: str | Path) -> dict[str, Any]:
    """What the manifest says of a model: its path, the SHA-256 of its weights where it is a folder here, and, where
    Safegraft merged it, the method, the strength and how much was added to each tensor."""
    found: dict[str, Any] = {"path": str(place)}
    if (Path(place) / "config.json").is_file():
        found["sha256"] = folder_digest(Path(place))
    manifest = Path(place) / MANIFEST
    if manifest.is_file():
        held = json.loads(manifest.read_text(encoding="utf-8"))
        ratios = {n: t["ratio"] for n, t in held.get("result", {}).get("tensors", {}).items() if "ratio" in t}
        if ratios:
            config = held["config"]
            found["merge"] = {"method": config["method"], "strength": config["strength"], "ratios": ratios}
    return found


def local_subject(label: str, place: str | Path, batch: int | None) -> Subject:
    """A chat model that transformers loads, ``batch`` conversations at a time; None: see models.hf."""

    @contextmanager
    def opened() -> Iterator[ChatModel]:
        from .models.hf import HfChatModel, load_chat

        yield HfChatModel(*load_chat(place), batch=batch)

    return Subject(label, opened, about_model(place))


@dataclass(frozen=True)
class _Planned:
    case: Case
    attack: str
    key: str


def evaluate(
    subjects: Sequence[Subject],
    loaded: Sequence[Loaded],
    judges: Mapping[str, Judge],
    out: Path,
    *,
    attacks: Attacks,
    utility: Sequence[Utility] = (),
    sampling: Sampling,
    seed: int = 0,
    defense: str | None = None,
    resume: bool = False,
    force: bool = False,
    given: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask every subject every case under every attack, judge the answers, and write ``out``.

    ``out`` then holds answers.jsonl, verdicts.jsonl, summary.json and, last, manifest.json. Only harmful cases are
    attacked; the others are asked plainly.

    Args:
        attacks: see Attacks. judges: by name, for harmful and harmless cases; tasks are judged by
            their key. utility: tasks that ask and score by themselves; their result files stay under ``out``/utility.
            defense: named in the manifest (the subjects bring it with them).

    Returns:
        The summary; see ``summarise``.

    Raises:
        ConfigError: nothing to do, or two models or cases of one name. OutputError: ``out`` is taken.
    """
    cases = [case for one in loaded for case in one.cases]
    _check(subjects, cases, judges, attacks, utility)
    plan = {
        "models": [{"label": s.label, **s.about} for s in subjects],
        "benchmarks": [{"name": x.benchmark.name, "source": x.source, "sha256": x.sha256, "cases": len(x.cases),
                        "paper": x.benchmark.paper, "licence": x.benchmark.licence} for x in loaded]
        + [{"name": x.name, **x.about} for x in utility],
        "cases": digest_of([asdict(c) for c in cases]), "attacks": list(attacks), "defense": defense,
        "sampling": asdict(sampling), "seed": seed,
    }  # fmt: skip
    _begin(out, plan, resume=resume, force=force)
    for subject in subjects:
        with ExitStack() as stack:
            opened = cache(partial(stack.enter_context, subject.open()))
            _ask(subject.label, opened, cases, attacks, sampling, seed, out, progress)
            measure(subject.label, opened, utility, out, progress)
    judge(out, judges, progress)
    summary = _write_summary(out)
    manifest = new_manifest(
        KIND, config={**plan, "judges": list(judges)}, given=list(given), seed=seed,
        inputs={s.label: dict(s.about) for s in subjects},
    )  # fmt: skip
    _save(out / MANIFEST, manifest)
    return summary


def judge(out: Path, judges: Mapping[str, Judge], progress: Progress | None = None) -> None:
    """Add the verdicts that are missing, in chunks; answers are not made again.

    Raises:
        ConfigError: ``out`` holds no answers, or a line is damaged.
    """
    mend(out / VERDICTS)
    answers, held = read_answers(out), latest(read_verdicts(out))
    tasks = [a for a in answers if a.kind == "task" and a.key not in held.get(BY_KEY, {})]
    append(
        out / VERDICTS, [Judged(a.key, BY_KEY, "correct" if holds(a.judged, a.expected) else "wrong") for a in tasks]
    )
    others = [a for a in answers if a.kind not in ("task", SCORED)]
    for name, one in judges.items():
        cut = [a for a in others if a.thinking == "truncated" and a.key not in held.get(name, {})]
        append(out / VERDICTS, [Judged(a.key, name, "truncated") for a in cut])
        whole = [(a, a.judged) for a in others if a.thinking != "truncated"]
        thoughts = [(a, a.reasoning) for a in others if a.reasoning]
        for label, texts in ((name, whole), (name + ON_REASONING, thoughts)):
            todo = [(a, text) for a, text in texts if a.key not in held.get(label, {})]
            for start in range(0, len(todo), CHUNK):
                part = todo[start : start + CHUNK]
                found = one.verdicts([Exchange(a.prompt, text) for a, text in part])
                rows = [Judged(a.key, label, v.label, v.reason) for (a, _), v in zip(part, found, strict=True)]
                append(out / VERDICTS, rows)
                if progress:
                    progress(f"judge {label}", start + len(part), len(todo))


def rejudge(out: Path, judges: Mapping[str, Judge], progress: Progress | None = None) -> dict[str, Any]:
    """Let further judges read the answers of a finished run, and write its summary anew.

    Raises:
        ConfigError: ``out`` holds no finished evaluation.
    """
    manifest = read_manifest(out)
    judge(out, judges, progress)
    manifest["config"]["judges"] = list(dict.fromkeys([*manifest["config"]["judges"], *judges]))
    summary = _write_summary(out)
    _save(out / MANIFEST, manifest)
    return summary


def _check(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    judges: Mapping[str, Judge],
    attacks: Attacks,
    utility: Sequence[Utility],
) -> None:
    if not subjects or not (cases or utility) or not attacks:
        raise ConfigError("there is nothing to measure: no model, no case or no attack")
    labels = [s.label for s in subjects]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two models have one name: {', '.join(labels)}", "Name them: LABEL=PATH.")
    names = [(c.benchmark, c.id) for c in cases]
    tasks = [x.name for x in utility]
    if len(set(names)) < len(names) or len({*tasks, *(b for b, _ in names)}) < len(tasks) + len({b for b, _ in names}):
        raise ConfigError("two benchmarks have one name", "Rename a task's file.")
    if not judges and any(c.kind != "task" for c in cases):
        raise ConfigError("there is no judge", "Name one with --judge; phrases is always there.")


def _begin(out: Path, plan: dict[str, Any], *, resume: bool, force: bool) -> None:
    """Make ``out`` ours, or go on in it."""
    if claim(out, PLAN, "an evaluation", resume=resume, force=force):
        held = json.loads((out / PLAN).read_text(encoding="utf-8"))
        if held != plan:
            other = ", ".join(k for k in plan if held.get(k) != plan[k])
            raise OutputError(f"{out} is of another evaluation: {other} differ", "Choose another --out.")
        (out / MANIFEST).unlink(missing_ok=True)
        return
    try:
        _save(out / PLAN, plan)
        (out / ANSWERS).touch()
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}", "Choose another --out.") from error


def _ask(
    label: str,
    opened: Callable[[], ChatModel],
    cases: Sequence[Case],
    attacks: Attacks,
    sampling: Sampling,
    seed: int,
    out: Path,
    progress: Progress | None,
) -> None:
    planned = [
        _Planned(case, attack, key_of(label, case.benchmark, case.id, attack))
        for attack, made in attacks.items()
        for case in cases
        if made is None or case.kind == "harmful"
    ]
    planned += [
        _Planned(case, "none", key_of(label, case.benchmark, case.id, "none"))
        for case in cases
        if case.kind != "harmful" and None not in attacks.values()
    ]
    planned.sort(key=lambda p: (p.attack, len(p.case.prompt), p.key))
    mend(out / ANSWERS)
    held = {a.key for a in read_answers(out)}
    chunks = [planned[i : i + CHUNK] for i in range(0, len(planned), CHUNK)]
    todo = [(i, chunk) for i, chunk in enumerate(chunks) if any(p.key not in held for p in chunk)]
    if not todo:
        return
    model = opened()
    ready = {name: one(model) if callable(one) else one for name, one in attacks.items()}
    for index, chunk in todo:
        rows = _answers(label, model, chunk, ready, sampling, seed)
        append(out / ANSWERS, [row for row in rows if row.key not in held])
        if progress:
            progress(label, min((index + 1) * CHUNK, len(planned)), len(planned))


def _answers(
    label: str,
    model: ChatModel,
    chunk: Sequence[_Planned],
    attacks: Mapping[str, Attack | None],
    sampling: Sampling,
    seed: int,
) -> list[Answer]:
    asked = [Attacked(ask(planned.case.prompt)) for planned in chunk]
    for name, attack in attacks.items():
        places = [i for i, planned in enumerate(chunk) if planned.attack == name]
        if attack is None or not places:
            continue
        rngs = [generator(seed, name, f"{chunk[i].case.benchmark}/{chunk[i].case.id}") for i in places]
        for i, made in zip(places, attack.frames([asked[i].conversation for i in places], rngs), strict=True):
            asked[i] = made
    said = model.replies([each.conversation for each in asked], sampling)
    return [
        Answer(
            p.key, label, p.case.benchmark, p.case.id, p.case.kind, p.case.category, p.attack, p.case.prompt,
            p.case.key, reply.text, each.decode(thought.answer), thought.reasoning, thought.outcome, reply.finished,
            reply.tokens,
        )
        for p, reply, thought, each in zip(chunk, said, (split(r.text) for r in said), asked, strict=True)
    ]  # fmt: skip


def _write_summary(out: Path) -> dict[str, Any]:
    summary = summarise(read_answers(out), latest(read_verdicts(out)))
    _save(out / SUMMARY, summary)
    return summary


def _save(file: Path, value: Any) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)
