"""safegraft evaluate, judge"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..errors import ConfigError
from .console import counting_bar, stdout, warn

if TYPE_CHECKING:
    from ..evaluate.records import ChatModel, Judge
    from ..evaluate.run import Attacks, Subject
    from ..evaluate.utility.base import Utility

NEEDED = {
    "translations": "a language: translation:LANG",
    "target": "the model under test",
    "attacker": "a second model",
}
VLLM = "http://localhost:8000/v1"
"""Where `vllm serve` answers unless told otherwise."""
ALL = ("starter", "safety", "overrefusal", "jailbreak", "utility")
"""Behind the suite all. What runs generated code is asked for by name."""
SHOWN = {"unsafe": "unsafe", "overrefusal": "over-refusal", "utility": "utility"}


def command(
    models: list[str] = typer.Argument(
        ..., help="Chat models: folders or Hub ids, or LABEL=PATH. The first is the one compared with."
    ),
    out: Path = typer.Option(..., help="The folder to write: answers, verdicts, summary, manifest."),
    suite: list[str] = typer.Option(
        None,
        help="starter, safety, overrefusal, multilingual, jailbreak, utility, code, evalplus, all, or the name of a "
        "benchmark or task; see `safegraft utility list`. [default: starter]",
    ),
    data: Path = typer.Option(
        None, help="A folder with files of benchmarks and tasks; what is not there comes from the Hub."
    ),
    task: list[Path] = typer.Option(None, help="Utility: JSONL with prompt and key (words a right answer holds)."),
    limit: int = typer.Option(
        None, min=1, help="At most this many prompts of a kind in each benchmark; the first rows of a task."
    ),
    judge: list[str] = typer.Option(
        None, help="Who tells unsafe from safe: NAME[:MODEL][@URL], see `safegraft judges list`. [default: phrases]"
    ),
    attack: list[str] = typer.Option(
        None,
        help="Ask the harmful prompts under this attack as well; see `safegraft attack list`. all: every one that "
        "needs nothing. translation:LANG reads multijail.csv of --data.",
    ),
    attack_file: Path = typer.Option(
        None, help="Attack prompts made elsewhere: JSONL with prompt, attack, source (id)."
    ),
    defense: str = typer.Option(
        None, help="self_reminder, system_prompt:TEXT, or safe_decoding:EXPERT (a folder), round every model."
    ),
    backend: str = typer.Option(
        "transformers", help="transformers, or openai (vllm): the models are names on the server at --base-url."
    ),
    base_url: str = typer.Option(None, help="Such as http://localhost:8000/v1 (vllm's default)."),
    tokens: int = typer.Option(256, min=1, help="New tokens of an answer."),
    task_tokens: int = typer.Option(
        None, min=1, help="New tokens of an answer to utility tasks. [default: each's own]"
    ),
    allow_code: bool = typer.Option(
        False, "--allow-code-execution", help="Code tasks may run what a model wrote, shut in a sandbox; see the docs."
    ),
    evalplus: Path = typer.Option(
        None, help="What `safegraft utility evalplus --setup` made, for humaneval+ and mbpp+."
    ),
    temperature: float = typer.Option(0.0, min=0, help="0 decodes greedily."),
    batch: int = typer.Option(None, min=1, help="Answers at a time. [default: what a quarter of the memory holds]"),
    seed: int = typer.Option(0, help="Of the draw under --limit, of attacks, and of sampling."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an evaluation that was stopped."),
    force: bool = typer.Option(False, "--force", help="Replace an earlier evaluation."),
) -> None:
    """Measure unsafe answers, over-refusal and utility of one or several models, with intervals."""
    from ..evaluate.benchmarks import expand, load, load_task
    from ..evaluate.records import Sampling
    from ..evaluate.run import evaluate
    from ..evaluate.utility import divide
    from ..evaluate.utility import load as load_utility

    names = [each for name in suite or ([] if task else ["starter"]) for each in (ALL if name == "all" else [name])]
    if "jailbreak" in names:
        names = ["starter" if name == "jailbreak" else name for name in names]
        attack = attack or ["all"]
    names, tasks = divide(names)
    wanted = expand(names)
    judges = _judges(judge or ["phrases"])
    subjects = [_subject(one, batch, defense, _server(backend, base_url)) for one in models]
    loaded = [load(name, data=data, limit=limit, seed=seed) for name in wanted]
    loaded += [load_task(file, limit=limit) for file in task or []]
    prompts = {case.id: case.prompt for one in loaded for case in one.cases if case.kind == "harmful"}
    utility = load_utility(
        tasks, data=data, limit=limit, tokens=task_tokens, seed=seed, allow_code=allow_code, evalplus=evalplus
    )
    _check_needs(utility, backend, defense)
    attacks = _attacks(attack or [], attack_file, prompts, data, next(iter(judges.values())))
    with counting_bar() as report:
        summary = evaluate(
            subjects, loaded, judges, out, attacks=attacks, utility=utility,
            sampling=Sampling(tokens, temperature), seed=seed, defense=defense, resume=resume, force=force,
            progress=report,
        )  # fmt: skip
    show(summary)
    stdout.print(f"Wrote {out}. To see it: safegraft report {out} --out report.html", highlight=False, soft_wrap=True)


def judge_command(
    run: Path = typer.Argument(..., help="A folder that evaluate wrote."),
    judge: list[str] = typer.Option(..., help="Who is to read its answers."),
) -> None:
    """Let further judges read the answers of a finished evaluation; nothing is generated again."""
    from ..evaluate.run import rejudge

    judges = _judges(judge)
    with counting_bar() as report:
        summary = rejudge(run, judges, report)
    show(summary)


def show(summary: dict[str, Any]) -> None:
    """A row a model and benchmark, rates with their 95 % intervals; then the comparisons."""
    table = Table(title="Rates with 95 % Wilson intervals", title_justify="left", box=None, header_style="bold")
    for column in ("model", "metric", "benchmark", "attack", "judge", "rate", "interval", "n"):
        table.add_column(column, justify="right" if column in ("rate", "interval", "n") else "left")
    for cell in summary["cells"]:
        r = cell["rate"]
        interval = f"{r['low']:.1%} – {r['high']:.1%}"
        table.add_row(cell["model"], SHOWN[cell["metric"]], cell["benchmark"], cell["attack"], cell["judge"],
                      f"{r['hits'] / r['n']:.1%}", interval, str(r["n"]))  # fmt: skip
    stdout.print(table)
    for name, found in summary["cut_off"].items():
        if found["cut"] > found["n"] // 2:
            said = f"{found['cut']} of {found['n']} answers to {name} were cut off before they ended"
            raised = "--tokens, or --task-tokens for utility tasks"
            warn([f"{said}: what comes later is not judged, and a key may come later. Raise {raised}."])
    for one in summary["comparisons"]:
        d = one["difference"]
        stdout.print(
            f"{one['second']} against {one['first']}, {SHOWN[one['metric']]} ({one['attack']}, {one['judge']}): "
            f"{100 * d['value']:+.1f} points ({100 * d['low']:+.1f} … {100 * d['high']:+.1f}), "
            f"p {one['p']:.2g}, after Holm {one['holm']:.2g}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _judges(names: list[str]) -> dict[str, Judge]:
    from ..evaluate.judges import parse

    return {name: parse(name) for name in names}


def _attacks(names: list[str], file: Path | None, prompts: dict[str, str], data: Path | None, judge: Judge) -> Attacks:
    """Asked plainly, and by every attack named. Raises ConfigError for one there is not, or that lacks something."""
    from ..evaluate.attacks import ATTACKS, dra_loop, from_file, multijail, translated

    found: dict[str, Any] = {"none": None}
    for name in names:
        kind, _, language = name.partition(":")
        if name == "all":
            found |= {each: one for each, one in ATTACKS if not one.needs}
        elif name == "dra_loop":
            found[name] = lambda model: dra_loop(model, judge)
        elif kind == "translation" and language:
            table = next(iter(sorted(data.rglob("multijail.csv"))), None) if data else None
            if table is None:
                raise ConfigError(f"{name} needs multijail.csv", "Name the folder it is in with --data.")
            found[name] = translated(multijail(table, language), language)
        else:
            one = ATTACKS.get(name)
            if one.needs:
                raise ConfigError(f"the attack {name!r} needs {NEEDED[one.needs]}", "From Python it can be given them.")
            found[name] = one
    if file is not None:
        found |= from_file(file, prompts)
    return found


def _check_needs(utility: Sequence[Utility], backend: str, defense: str | None) -> None:
    """Raises ConfigError where models can only be asked for answers, and a task needs more."""
    round_it = f"the defence {defense}" if defense else f"the backend {backend}" if backend != "transformers" else ""
    wanted = {"likelihood": "compares the likelihoods of given answers", "continue": "begins the answer for the model"}
    for need, said in wanted.items():
        lacking = [task.name for task in utility if need in task.needs]
        if lacking and round_it and (need == "likelihood" or backend != "transformers"):
            raise ConfigError(
                f"{', '.join(lacking)} {said}, which {round_it} does not allow",
                "Name the other tasks, or measure these apart with --backend transformers and no defence.",
            )


def _server(backend: str, base_url: str | None) -> str:
    """The URL of the server, empty for models loaded here."""
    if backend not in ("transformers", "openai", "vllm"):
        raise ConfigError(f"there is no backend {backend!r}", "transformers, openai or vllm.")
    if backend == "openai" and not base_url:
        raise ConfigError("the backend openai needs --base-url", "Such as http://localhost:8000/v1.")
    if backend == "transformers" and base_url:
        raise ConfigError("--base-url is for --backend openai or vllm")
    return base_url or (VLLM if backend == "vllm" else "")


def _subject(text: str, batch: int | None, defense: str | None, url: str) -> Subject:
    from ..evaluate.defenses import SafeDecoding, self_reminder, system_prompt
    from ..evaluate.run import Subject, about_model

    kind, _, value = (defense or "").partition(":")
    if kind not in ("", "self_reminder", "system_prompt", "safe_decoding") or (kind[:2] in ("sy", "sa") and not value):
        raise ConfigError(
            f"there is no defence {defense!r}", "self_reminder, system_prompt:TEXT or safe_decoding:EXPERT."
        )
    label, _, place = text.rpartition("=") if "=" in text and not Path(text).exists() else ("", "", text)
    if url and kind == "safe_decoding":
        raise ConfigError("safe_decoding needs the model in this process", "Use --backend transformers.")
    about = about_model(place) | ({"url": url} if url else {})

    def reworded(chat: ChatModel) -> ChatModel:
        return self_reminder(chat) if kind == "self_reminder" else system_prompt(chat, value) if kind else chat

    @contextmanager
    def opened() -> Iterator[ChatModel]:
        from ..evaluate.models.hf import HfChatModel, load_chat
        from ..evaluate.models.openai import Endpoint, OpenAiChatModel

        if url:
            yield reworded(OpenAiChatModel(Endpoint(url, place)))
            return
        model, tokenizer = load_chat(place)
        if kind == "safe_decoding":
            yield SafeDecoding(model, load_chat(value)[0], tokenizer, batch=batch or 32)
            return
        yield reworded(HfChatModel(model, tokenizer, batch=batch))

    return Subject(label or Path(place).name or place, opened, about)
