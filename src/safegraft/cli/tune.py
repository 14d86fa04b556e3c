"""safegraft tune"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .console import stderr, stdout


def command(
    model: str = typer.Option(..., help="The fine-tune: a folder or a Hub id of a chat model."),
    base: str = typer.Option(..., help="What it was fine-tuned from."),
    vector: str = typer.Option(None, help="The safety vector's folder."),
    calibration: str = typer.Option(
        None, help="What `safegraft calibrate` wrote of the base, in place of a vector: to find Safe Delta's budget."
    ),
    task: Path = typer.Option(
        ...,
        help="JSONL with prompt and answer, best with key, the words of a right answer: rows of the fine-tune's task.",
    ),
    out: Path = typer.Option(..., help="The folder to write: tune.json, frontier.png, and what --resume needs."),
    harmful: Path = typer.Option(None, help="JSONL with prompt, to be refused. [default: the starter set]"),
    harmless: Path = typer.Option(None, help="JSONL with prompt, to be answered. [default: the starter look-alikes]"),
    max_overrefusal: float = typer.Option(0.1, min=0, max=1, help="Most harmless requests refused, as a share."),
    max_utility_drop: float = typer.Option(
        0.02, min=0, max=1, help="Most of the task lost: right answers where rows have a key, else token accuracy."
    ),
    trials: int = typer.Option(30, min=1, help="Cheap looks in all."),
    shortlist: int = typer.Option(3, min=1, help="How many of them to measure in full."),
    search_rows: int = typer.Option(32, min=4, help="Rows of each kind that a cheap look uses."),
    highest: float = typer.Option(
        None,
        help="Largest strength tried. [default: 4 times ‖τ‖ for a vector; 1.5 times ‖τ‖/‖W‖ for Safe Delta's budget]",
    ),
    seed: int = typer.Option(0, help="Of the split and the search."),
    resume: bool = typer.Option(False, "--resume", help="Go on with a search that was stopped."),
    force: bool = typer.Option(False, "--force", help="Replace an earlier search."),
) -> None:
    """Find the strength, damping and scope with the least unsafe rate that keep over-refusal and task within limits;
    with --calibration, Safe Delta's budget."""
    from ..evaluate.models.hf import load_chat
    from ..merging.live import require_one
    from ..report.frontier import write_frontier
    from ..tuning.data import read_parts
    from ..tuning.search import Limits, search

    require_one(vector, calibration)
    parts = read_parts(task, harmful, harmless, search=search_rows, seed=seed)
    limits = Limits(max_overrefusal, max_utility_drop)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        row = bar.add_task("loading", total=None)
        found = search(
            load_chat(model), model, base, vector, out, parts, limits=limits, calibration=calibration, trials=trials,
            shortlist=shortlist, highest=highest, seed=seed, resume=resume, force=force,
            progress=lambda what, done, total: bar.update(row, description=what, completed=done, total=total),
        )  # fmt: skip
    points = found["trials"], found["start"], found["chosen"]
    write_frontier(*points, max_overrefusal, max_utility_drop, out / "frontier.png")
    source = f"--vector {vector}" if vector else f"--method safe_delta --calibration {calibration}"
    _print(found, f"--model {model} --base {base} {source}", out)
    if found["chosen"] is None:
        raise typer.Exit(1)


def _print(found: dict[str, Any], inputs: str, out: Path) -> None:
    table = Table(title="Short list, on the choose part", title_justify="left", box=None, header_style="bold")
    counted = ["right answers"] if any(row["scores"]["right"] for row in found["shortlist"]) else []
    shown = ["unsafe", "harmless refused", "token accuracy", *counted]
    for column in ("strength", "damping", "scope", *shown, "within limits"):
        table.add_column(column, justify="right")
    for row in found["shortlist"]:
        setting = [f"{row['strength']:.3g}", row["damping"] or "–", row["scope"] or "–"]
        table.add_row(*setting, *_cells(row["scores"]), "yes" if row["keeps"] else "no")
    stdout.print(table)
    chosen = found["chosen"]
    if chosen is None:
        stdout.print("Nothing on the short list keeps the limits: allow more, or look more often (--trials).")
        return
    table = Table(title="Final, on prompts kept apart", title_justify="left", box=None, header_style="bold")
    for column in ("model", *shown):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, scores in found["report"].items():
        table.add_row(name, *_cells(scores))
    stdout.print(table)
    params = "".join(f" --{key} {value}" for key, value in chosen["params"].items())
    params += "" if chosen["scope"] in (None, "all") else f" --scope {chosen['scope']}"
    stdout.print(
        f"Wrote {out / 'tune.json'} and {out / 'frontier.png'}. To merge like this:\n"
        f"  safegraft merge {inputs} --out restored "
        f"--strength {chosen['strength']:.4g}{params}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _cells(scores: dict[str, Any]) -> list[str]:
    unsafe, refused, *right = (
        f"{r['hits'] / r['n']:.0%} of {r['n']} ({r['low']:.0%}–{r['high']:.0%})"
        for r in (scores["unsafe"], scores["refused"], scores["right"])
        if r
    )
    return [unsafe, refused, f"{scores['utility']:.1%}", *right]
