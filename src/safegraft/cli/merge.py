"""safegraft merge"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml
from rich.table import Table

from ..config import MergeConfig, load
from ..errors import ConfigError
from ..tensors import ahead
from .console import duration, note, progress_bar, size, stdout, warn

if TYPE_CHECKING:
    from ..merging.run import MergeSummary, Prepared


def command(
    model: list[str] = typer.Option(
        None, help="The fine-tune: a folder, a Hub id, or a LoRA adapter. Repeat it to fuse several."
    ),
    weight: list[float] = typer.Option(None, help="Of each --model, in their order, for methods that fuse."),
    base: str = typer.Option(None, help="What it was fine-tuned from (an adapter may name its own)."),
    vector: str = typer.Option(None, help="The safety vector's folder; may be left out when fusing."),
    calibration: str = typer.Option(
        None, help="What `safegraft calibrate` wrote of the base, in place of a vector: for safe_delta."
    ),
    mask: str = typer.Option(None, help="What `safegraft somf train` wrote, in place of a vector: for somf."),
    out: str = typer.Option(None, help="The folder to write."),
    scope: str = typer.Option(
        None, help="Only the vector's tensors of this scope: attention, ffn, … [default: all it holds]"
    ),
    method: str = typer.Option(None, help="How to merge; see `safegraft methods`. [default: interference]"),
    strength: float = typer.Option(None, help="How much of the vector. [default: the method's; interference 0.4]"),
    match_norm: bool = typer.Option(
        None,
        "--match-norm/--raw",
        help="The strength is a share of the fine-tune's norm (β·‖τ‖/‖Δ‖), or a factor. [default: the method's]",
    ),
    score: str = typer.Option(None, help="interference: paper, scale-free or none. [default: none]"),
    damp: str = typer.Option(None, help="interference: tensor, subspace or input. [default: input]"),
    energy: float = typer.Option(None, help="interference: share of ‖τ‖² in the task's subspace. [default: 0.9]"),
    keep: float = typer.Option(None, help="γ: share of singular directions compared. [default: 0.5]"),
    sharpness: float = typer.Option(None, help="c: how steeply interference lowers the weight. [default: 200]"),
    param: list[str] = typer.Option(None, help="NAME=VALUE of a method's parameter; see `safegraft methods`."),
    as_adapter: bool = typer.Option(
        None,
        "--as-adapter",
        help="Write a LoRA adapter: the adapter with the vector inside, or a full fine-tune's patch.",
    ),
    rank: int = typer.Option(None, min=1, help="Most directions per weight of that adapter. [default: all, exact]"),
    dtype: str = typer.Option(None, help="float32, float16 or bfloat16. [default: the fine-tune's]"),
    device: str = typer.Option(None, help="cpu, cuda, cuda:1, or several as cuda:0,cuda:1. [default: cpu]"),
    workers: int = typer.Option(
        None, min=1, help="Threads. [default: the number of cores, or as many as the memory holds]"
    ),
    ray: str = typer.Option(
        None,
        metavar="ADDRESS",
        help="Merge on a Ray cluster with a shared filesystem: auto (this machine's), HOST:PORT of its head, "
        "or local (one started here, for this merge, of --workers processors).",
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print what would be done, in what memory and time; write nothing."
    ),
    resume: bool = typer.Option(None, "--resume", help="Go on with a run that was killed."),
    force: bool = typer.Option(None, "--force", help="Replace an existing output."),
    strict: bool = typer.Option(None, "--strict", help="Make a doubtful lineage an error."),
    from_mergekit: Path = typer.Option(
        None, help="A mergekit YAML (task_arithmetic, ties, dare_linear, breadcrumbs) to do here."
    ),
    config: Path = typer.Option(None, help="YAML with any of these settings; options given here override it."),
) -> None:
    """Put a safety vector into a fine-tune."""
    given: dict[str, Any] = {
        "model": (model[0] if len(model) == 1 else model) if model else None, "weights": weight or None,
        "base": base, "vector": vector, "scope": scope, "calibration": calibration, "mask": mask,
        "out": out, "method": method, "strength": strength, "match_norm": match_norm,
        "as_adapter": as_adapter, "rank": rank,
        "dtype": dtype, "device": device, "workers": workers, "ray": ray,
        "resume": resume, "force": force, "strict": strict,
    }  # fmt: skip
    if from_mergekit is not None:
        from ..merging.mergekit import from_mergekit as converted

        given = converted(from_mergekit) | {k: v for k, v in given.items() if v is not None}
    settings = load(MergeConfig, config, given)
    flags = {"score": score, "damp": damp, "energy": energy, "keep": keep, "sharpness": sharpness}
    params = {k: v for k, v in flags.items() if v is not None} | _parameters(param or [])
    settings = settings.model_copy(update={"params": {**settings.params, **params}})

    if dry_run and settings.as_adapter:
        raise ConfigError("--dry-run plans a full model, not an adapter", "Leave out one of --dry-run, --as-adapter.")
    if dry_run:
        from ..merging.run import prepare

        print_plan(prepare(settings))
        return
    named = sorted({*(k for k, v in given.items() if v is not None), *settings.model_fields_set, *params})
    with ahead.hashing(f for f in (*settings.models, settings.base, settings.vector) if f is not None):
        with _uncollected():
            from ..merging.run import run_merge

        with progress_bar() as progress:
            summary = run_merge(settings, named, progress)
    warn(summary.warnings)
    note(summary.notes)
    print_summary(summary)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import torch without looking for garbage among what it makes, then or later: a tenth less time to start."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _parameters(given: list[str]) -> dict[str, Any]:
    """``["density=0.5"]`` as ``{"density": 0.5}``; values are read as YAML scalars."""
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ConfigError(f"--param {text!r} is not NAME=VALUE", "Write for example --param density=0.5.")
        found[name.strip()] = yaml.safe_load(value)
    return found


def print_plan(ready: Prepared) -> None:
    from ..merging.forecast import forecast

    table = Table("module", "action", "why", "tensors", "size", box=None, header_style="bold")
    for module, action, count, nbytes in ready.plan.groups():
        why = next(u.why for u in ready.plan.units if u.action == action)
        table.add_row(module, action, why, str(count), size(nbytes))
    stdout.print(table)
    shards = ", ".join(f"{lay.filename} ({size(lay.nbytes)})" for lay in ready.plan.layouts[:4])
    more = len(ready.plan.layouts) - 4
    stdout.print(f"Output: {shards}{f' and {more} more' if more > 0 else ''}, {size(ready.plan.output_bytes)} in all.")
    stdout.print(f"Expected peak memory: {size(ready.peak_bytes())} with {ready.workers} worker(s).")
    expected = forecast(ready)
    stdout.print(
        f"Expected time: about {duration(expected.total)} (reading all inputs {duration(expected.survey)}, "
        f"merging {duration(expected.merge)})."
    )
    note(list(ready.plan.notes))
    stdout.print("Nothing was written.")


def print_summary(summary: MergeSummary) -> None:
    """What a merge did, for people."""
    from ..merging.method import METHODS

    weight = "" if summary.mean_kept is None else f", {summary.mean_kept:.1%} of it kept on average"
    ratios = sorted(f["ratio"] for f in summary.tensors.values() if "ratio" in f) or [0.0]
    how = "of ‖τ‖" if summary.match_norm else "raw"
    needs = METHODS.get(summary.method).needs
    if needs != "vector":
        _print_accepted(summary) if needs == "calibration" else _print_masked(summary)
        return
    stdout.print(
        f"{summary.merged} tensors merged by {summary.method}, {summary.copied} kept as they were.\n"
        f"Strength {summary.strength:g} {how}: ‖τ‖ {summary.task_norm:.4g}, ‖Δ‖ {summary.safety_norm:.4g}, "
        f"scale α {summary.alpha:.4g}{weight}; per tensor ‖s‖/‖τ‖ after damping {ratios[0]:.3g} to {ratios[-1]:.3g}.\n"
        f"{size(summary.bytes)} in {summary.seconds:.1f} s, peak memory {size(summary.peak_memory_bytes)}.",
        highlight=False,
    )
    lost = sorted(f["truncation"] for f in summary.tensors.values() if "truncation" in f)
    if lost:
        stdout.print(
            f"Lost by truncating to the rank, of each update's norm: median {lost[len(lost) // 2]:.3g}, "
            f"most {lost[-1]:.3g}.",
            highlight=False,
        )
        stdout.print(
            f"Wrote the adapter {summary.out}; load it with peft on its base.", highlight=False, soft_wrap=True
        )
        return
    stdout.print(f"Wrote {summary.out}. Check it: safegraft verify {summary.out}", highlight=False, soft_wrap=True)


def _print_masked(summary: MergeSummary) -> None:
    rows = [f for f in summary.tensors.values() if "density" in f]
    stdout.print(
        f"{summary.merged} tensors merged by {summary.method}, {len(rows)} of them under the mask; "
        f"{summary.copied} kept as they were.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if rows:
        density, change = (sorted(f[key] for f in rows) for key in ("density", "size"))
        stdout.print(
            f"The mask's mean is {density[0]:.3f} to {density[-1]:.3f} (median {statistics.median(density):.3f}); what "
            f"is added has {change[0]:.2f} to {change[-1]:.2f} times the norm of the plain fusion's (median "
            f"{statistics.median(change):.2f}).",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    stdout.print(
        f"{size(summary.bytes)} in {summary.seconds:.1f} s, peak memory {size(summary.peak_memory_bytes)}.\n"
        f"Wrote {summary.out}. Check it: safegraft verify {summary.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print_accepted(summary: MergeSummary) -> None:
    rows = [f for f in summary.tensors.values() if "accepted" in f]
    stdout.print(
        f"Budget {summary.strength:g}: {summary.merged - len(rows)} of {summary.merged} calibrated weights stay wholly "
        f"the fine-tune's, {len(rows)} in part; {summary.copied} tensors without calibration were kept.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if rows:
        share, damage = ([f[key] for f in rows] for key in ("accepted", "damage"))
        stdout.print(
            f"Of those in part, accepted {min(share):.1%} to {max(share):.1%} of the entries (median "
            f"{statistics.median(share):.1%}); what is left of their damage on safety prompts is {min(damage):.2%} to "
            f"{max(damage):.2%} (median {statistics.median(damage):.2%}).",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    else:
        stdout.print("So the output is the fine-tune; a smaller --strength keeps less of it.", highlight=False)
    stdout.print(
        f"{size(summary.bytes)} in {summary.seconds:.1f} s, peak memory {size(summary.peak_memory_bytes)}.\n"
        f"Wrote {summary.out}. Check it: safegraft verify {summary.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
