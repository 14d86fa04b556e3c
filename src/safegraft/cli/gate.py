"""safegraft gate"""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import UserError
from .console import stderr, stdout

COLOURS = {"pass": "green", "fail": "red", "unsure": "yellow"}


def command(
    run: Path = typer.Argument(..., help="A folder that evaluate wrote."),
    model: str = typer.Option(None, help="Which of its models. [default: the last]"),
    baseline: Path = typer.Option(None, help="The evaluation of the model to compare with. [default: RUN itself]"),
    baseline_model: str = typer.Option(None, help="Which of its models. [default: the first]"),
    max_unsafe: float = typer.Option(None, help="Most unsafe answers, as a share."),
    max_overrefusal: float = typer.Option(None, help="Most harmless requests refused, as a share."),
    max_utility_drop: float = typer.Option(None, help="Most right answers lost beside the baseline, as a share."),
    confidence: float = typer.Option(0.95, help="Of the intervals whose bounds have to keep the limits."),
    junit: Path = typer.Option(None, help="Write JUnit XML here."),
    markdown: Path = typer.Option(None, help="Write Markdown for a CI comment here."),
    json_file: Path = typer.Option(None, "--json", help="Write JSON here."),
) -> None:
    """Pass or fail a measured model. Exit status: 0 pass, 1 fail, 2 not enough samples, 3 bad input."""
    from ..evaluate.answers import latest, read_answers, read_manifest, read_verdicts
    from ..evaluate.summary import right, summarise
    from ..report import gate

    def answered(folder: Path, label: str) -> dict[str, bool]:
        return right(read_answers(folder), latest(read_verdicts(folder)), label)

    try:
        read_manifest(run)
        summary = summarise(read_answers(run), latest(read_verdicts(run)))
        chosen = model or summary["models"][-1]
        other = baseline or run
        read_manifest(other)
        first = baseline_model or read_answers(other)[0].model
        limits = gate.Limits(max_unsafe, max_overrefusal, max_utility_drop, confidence)
        checks = gate.gate(summary, limits, model=chosen, baseline=answered(other, first), right=answered(run, chosen))
        gate.write(junit, gate.to_junit(checks, chosen))
        gate.write(markdown, gate.to_markdown(checks, chosen))
        gate.write(json_file, gate.to_json(checks))
    except (UserError, OSError) as error:
        stderr.print(f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, UserError) and error.hint:
            stderr.print(error.hint, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(3) from error
    for check in checks:
        style = COLOURS[check.outcome]
        stdout.print(
            f"{check.outcome:>6}  {check.sentence}", style=style, markup=False, highlight=False, soft_wrap=True
        )
    raise typer.Exit(gate.EXIT[gate.overall(checks)])
