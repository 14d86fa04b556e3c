"""safegraft merge"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..config import MergeConfig, load
from .console import note, progress_bar, size, stdout, warn

if TYPE_CHECKING:
    from ..merging.run import MergeSummary, Prepared


def command(
    model: str = typer.Option(None, help="The fine-tune: a folder, a Hub id, or a LoRA adapter."),
    base: str = typer.Option(None, help="What it was fine-tuned from (an adapter may name its own)."),
    vector: str = typer.Option(None, help="The safety vector's folder."),
    out: str = typer.Option(None, help="The folder to write."),
    method: str = typer.Option(None, help="How to merge; see `safegraft methods`. [default: interference]"),
    strength: float = typer.Option(None, help="β: the vector is scaled to β·‖τ‖/‖Δ‖. [default: 0.1]"),
    keep: float = typer.Option(None, help="γ: share of singular directions compared. [default: 0.5]"),
    sharpness: float = typer.Option(None, help="c: how steeply interference lowers the weight. [default: 200]"),
    score: str = typer.Option(None, help="How interference is scored. [default: paper]"),
    dtype: str = typer.Option(None, help="float32, float16 or bfloat16. [default: the fine-tune's]"),
    device: str = typer.Option(None, help="cpu or cuda. [default: cpu]"),
    workers: int = typer.Option(None, min=1, help="Threads. [default: the number of cores]"),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print what would be done; write nothing."),
    resume: bool = typer.Option(None, "--resume", help="Go on with a run that was killed."),
    force: bool = typer.Option(None, "--force", help="Replace an existing output."),
    strict: bool = typer.Option(None, "--strict", help="Make a doubtful lineage an error."),
    config: Path = typer.Option(None, help="YAML with any of these settings; options given here override it."),
) -> None:
    """Put a safety vector into a fine-tune."""
    given: dict[str, Any] = {
        "model": model, "base": base, "vector": vector, "out": out, "method": method, "strength": strength,
        "dtype": dtype, "device": device, "workers": workers, "resume": resume, "force": force, "strict": strict,
    }  # fmt: skip
    settings = load(MergeConfig, config, given)
    params = {k: v for k, v in (("keep", keep), ("sharpness", sharpness), ("score", score)) if v is not None}
    settings = settings.model_copy(update={"params": {**settings.params, **params}})

    from ..merging.run import prepare, run_merge

    if dry_run:
        _print_plan(prepare(settings))
        return
    named = sorted({*(k for k, v in given.items() if v is not None), *settings.model_fields_set, *params})
    with progress_bar() as progress:
        summary = run_merge(settings, named, progress)
    warn(summary.warnings)
    note(summary.notes)
    _print_summary(summary)


def _print_plan(ready: Prepared) -> None:
    table = Table("module", "action", "why", "tensors", "size", box=None, header_style="bold")
    for module, action, count, nbytes in ready.plan.groups():
        why = next(u.why for u in ready.plan.units if u.action == action)
        table.add_row(module, action, why, str(count), size(nbytes))
    stdout.print(table)
    shards = ", ".join(f"{lay.filename} ({size(lay.nbytes)})" for lay in ready.plan.layouts[:4])
    more = len(ready.plan.layouts) - 4
    stdout.print(f"Output: {shards}{f' and {more} more' if more > 0 else ''}, {size(ready.plan.output_bytes)} in all.")
    stdout.print(f"Expected peak memory: {size(ready.peak_bytes())} with {ready.workers} worker(s).")
    note(list(ready.plan.notes))
    stdout.print("Nothing was written.")


def _print_summary(summary: MergeSummary) -> None:
    weight = "" if summary.mean_weight is None else f", mean weight w {summary.mean_weight:.3f}"
    ratios = sorted(f["ratio"] for f in summary.tensors.values()) or [0.0]
    stdout.print(
        f"{summary.merged} tensors merged by {summary.method}, {summary.copied} kept as they were.\n"
        f"Strength β {summary.strength:g}: ‖τ‖ {summary.task_norm:.4g}, ‖Δ‖ {summary.safety_norm:.4g}, "
        f"scale α {summary.alpha:.4g}{weight}; per tensor ‖w·s‖/‖τ‖ {ratios[0]:.3g} to {ratios[-1]:.3g}.\n"
        f"{size(summary.bytes)} in {summary.seconds:.1f} s, peak memory {size(summary.peak_memory_bytes)}.",
        highlight=False,
    )
    stdout.print(f"Wrote {summary.out}. Check it: safegraft verify {summary.out}", highlight=False, soft_wrap=True)
