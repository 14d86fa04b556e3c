"""safegraft calibrate"""

from __future__ import annotations

from pathlib import Path

import typer

from .console import size, stderr, stdout


def command(
    model: str = typer.Argument(help="The aligned model that the fine-tune was made from: a folder or Hub id."),
    out: Path = typer.Option(..., help="The folder to write."),
    prompts: Path = typer.Option(
        None, help="JSONL with prompt and perhaps answer. [default: the starter set's harmful requests, refused]"
    ),
    scope: str = typer.Option("hybrid", help="Whose inputs: attention, ffn, hybrid or all."),
    limit: int = typer.Option(128, min=1, help="Most prompts used."),
    max_length: int = typer.Option(512, min=2, help="Tokens a conversation is cut to."),
    memory: float = typer.Option(4.0, min=0.001, help="GB of matrices held at a time; more means fewer passes."),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:1."),
    seed: int = typer.Option(0, help="Seed of which prompts are used."),
    resume: bool = typer.Option(False, "--resume", help="Go on with a run that was stopped, pass by pass (--memory)."),
    force: bool = typer.Option(False, "--force", help="Replace an existing output."),
) -> None:
    """Measure an aligned model's activations on safety prompts, for `merge --method safe_delta`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..train.calibrate import calibrate

    columns = (TextColumn("forward passes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        row = bar.add_task("passes", total=None)
        made = calibrate(
            model, out, prompts=prompts, scope=scope, limit=limit, max_length=max_length, memory=memory * 1e9,  # type: ignore[arg-type]
            device=device, seed=seed, force=force, resume=resume,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
        )  # fmt: skip
    manifest = made.manifest
    unseen = [name for name, rows in manifest["rows"].items() if not rows]
    stdout.print(
        f"{len(made.names())} weights with {len(manifest['rows']) - len(unseen)} different inputs, measured on "
        f"{manifest['tokens']} tokens of {manifest['inputs']['prompts']['count']} prompts, "
        f"{size(made.file.layout.nbytes)}.",
        highlight=False,
    )
    if unseen:
        stdout.print(f"{len(unseen)} inputs (experts that no prompt chose) were never used.", highlight=False)
    stdout.print(
        f"Wrote {out}. Use it: safegraft merge --method safe_delta --calibration {out} --base {model} …",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
