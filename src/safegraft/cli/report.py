"""safegraft report"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from ..errors import OutputError
from .console import stdout


def command(
    runs: list[Path] = typer.Argument(..., help="Folders that evaluate wrote."),
    out: Path = typer.Option(..., help="The HTML file to write; .md for Markdown."),
    examples: int = typer.Option(6, min=0, help="Prompts whose answers are shown side by side."),
    show_harmful: bool = typer.Option(
        False, "--show-harmful", help="Show harmful requests and unsafe answers in full."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
) -> None:
    """One page of evidence: rates with intervals, attacks, categories, comparisons, examples, digests."""
    from ..evaluate.answers import latest, read_answers, read_manifest, read_verdicts
    from ..evaluate.summary import evidence
    from ..report.evaluation import write_report

    if out.exists() and not force:
        raise OutputError(f"{out} exists already", "Choose another --out, or give --force.")
    manifests = [read_manifest(run) for run in runs]
    answers, verdicts = [], []
    labels = [m["label"] for manifest in manifests for m in manifest["config"]["models"]]
    for run in runs:
        prefix = f"{run.name}: " if len(set(labels)) < len(labels) else ""
        answers += [replace(a, model=prefix + a.model, key=prefix + a.key) for a in read_answers(run)]
        verdicts += [replace(v, key=prefix + v.key) for v in read_verdicts(run)]
    found = evidence(answers, latest(verdicts), examples=examples)
    write_report(found, manifests, out, reveal=show_harmful)
    stdout.print(f"Wrote {out}", highlight=False, soft_wrap=True)
