"""safegraft somf train, safegraft somf fuse"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..config import MergeConfig, SomfConfig, load
from .console import counting_bar, note, progress_bar, stdout, warn
from .merge import print_plan, print_summary

if TYPE_CHECKING:
    from ..masking.run import Learnt

app = typer.Typer(
    help="SOMF: learn which part of one or several fine-tunes is safe to keep, and keep that.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip

MODEL = "The fine-tune: a folder, a Hub id, or a LoRA adapter. Repeat it for several."
ALIGNED = "The model that refuses, of which all are fine-tunes: a folder or Hub id."


@app.command("train")
def train_command(
    aligned: str = typer.Option(None, help=ALIGNED),
    model: list[str] = typer.Option(None, help=MODEL),
    weight: list[float] = typer.Option(None, help="Of each --model, in their order. [default: 1 each]"),
    preferences: str = typer.Option(
        None,
        help="starter, on-policy, a .json/.jsonl/.csv/.parquet file, or a Hub data set (owner/name[:config][@split]) "
        "with prompt, chosen and rejected, or of PKU-SafeRLHF's form. on-policy: the starter's requests, with the "
        "answers of the aligned model and of the plain fusion. [default: starter: refusals against affirmative "
        "openings, and answers to harmless requests against refusals]",
    ),
    answer_tokens: int = typer.Option(None, help="on-policy: tokens of an answer at most. [default: 64]"),
    out: Path = typer.Option(None, help="The folder to write."),
    scope: str = typer.Option(
        None, help="Which weights get a mask: attention, attention-block, ffn, hybrid, model or all. [default: all]"
    ),
    layers: str = typer.Option(
        None, help="Only these decoder layers: A:B is A up to and without B, counted from 0. [default: all]"
    ),
    granularity: str = typer.Option(
        None, help="A logit for every element, row or block. [default: element, the paper's]"
    ),
    block: int = typer.Option(None, help="Side of a block. [default: 64]"),
    mask_factors: bool = typer.Option(
        None,
        "--mask-factors",
        help="Mask LoRA factors apart, as published, in place of their product: less memory, but no mask over weights.",
    ),
    fusion: str = typer.Option(
        None, help="sum, task-arithmetic, ties, dare or mean. [default: sum of one, task-arithmetic of several]"
    ),
    scale: float = typer.Option(
        None, help="λ. [default: the paper's: task-arithmetic 0.3 for LoRA, 0.04 else; ties 0.4; dare 0.3; else 1]"
    ),
    density: float = typer.Option(None, help="ties: share of each change's entries kept. [default: 0.2, the paper's]"),
    drop: float = typer.Option(None, help="dare: share of each change's entries dropped. [default: 0.2, the paper's]"),
    temperature: float = typer.Option(None, help="T of the relaxed mask. [default: 0.5, the paper's]"),
    beta: float = typer.Option(None, help="β of DPO. [default: 0.1, the paper's]"),
    reference: str = typer.Option(
        None, help="DPO's reference, frozen: aligned, or fused (the plain fusion). [default: aligned]"
    ),
    lr: float = typer.Option(
        None, help="Rate at the start, then down to 0. [default: 1e-3, of the paper's 1e-3 … 1e-2]"
    ),
    batch: int = typer.Option(None, help="Pairs a step. [default: 16, the paper's]"),
    micro_batch: int = typer.Option(None, help="Pairs at a time; each draws its own mask. [default: at most 8]"),
    steps: int = typer.Option(None, help="[default: 1000, the paper's]"),
    samples: int = typer.Option(None, help="Pairs drawn from the data. [default: 5000, the paper's; all of starter]"),
    allow_fewer: bool = typer.Option(None, "--allow-fewer", help="Learn from what there is where that is less."),
    check_pairs: int = typer.Option(None, help="Pairs held out to tell what the mask does. [default: 32]"),
    max_length: int = typer.Option(None, help="Tokens after which a conversation is cut. [default: 512]"),
    optimizer: str = typer.Option(None, help="adamw, or adafactor with factored state. [default: adamw]"),
    logits_dtype: str = typer.Option(
        None, help="float32, or bfloat16 rounded at random: half the memory. [default: float32]"
    ),
    precision: str = typer.Option(
        None,
        help="Of the frozen weights: auto, float32 or bfloat16. [default: auto: bfloat16 on a GPU that has it]",
    ),
    seed: int = typer.Option(None, help="Of the pairs, their order and the masks drawn. [default: 0]"),
    save_steps: int = typer.Option(None, help="Steps between checkpoints. [default: 100]"),
    config: Path = typer.Option(None, help="YAML file with these settings; options given here win."),
    resume: bool = typer.Option(None, "--resume", help="Go on with a run that was stopped, from OUT.training."),
    force: bool = typer.Option(None, "--force", help="Replace an existing output and what a stopped run left."),
) -> None:
    """Learn a mask over the fine-tunes' changes by DPO on safety preferences (arXiv:2405.09055).

    The models are frozen, and so is DPO's reference. Exits with 1 where the mask is written but prefers the chosen
    answers no more than the plain fusion does.
    """
    given = {k: v for k, v in locals().items() if k not in ("config", "model", "weight") and v is not None}
    from ..masking.run import learn_mask

    given |= {"model": model} if model else {}
    given |= {"weights": weight} if weight else {}
    if "out" in given:
        given["out"] = str(out)
    settings = load(SomfConfig, config, given)
    with counting_bar() as report:
        found = learn_mask(settings, given=sorted(given), progress=report, say=lambda sentence: note([sentence]))
    _print_check(found, settings)
    warn(found.warnings)
    if found.useless:
        raise typer.Exit(1)


@app.command("fuse")
def fuse_command(
    aligned: str = typer.Option(None, help=ALIGNED),
    model: list[str] = typer.Option(None, help=MODEL),
    weight: list[float] = typer.Option(None, help="Of each --model, in their order. [default: 1 each]"),
    mask: str = typer.Option(None, help="What `safegraft somf train` wrote."),
    out: str = typer.Option(None, help="The folder to write."),
    kind: str = typer.Option("continuous", help="continuous: under σ(s); binary: under 1 where σ(s) > ½."),
    seed: int = typer.Option(None, help="Draw the mask with this seed. [default: it is not drawn]"),
    fusion: str = typer.Option(
        None, help="sum, task-arithmetic, ties, dare or mean. [default: what the mask was learnt with]"
    ),
    scale: float = typer.Option(None, help="λ. [default: what the mask was learnt with]"),
    dtype: str = typer.Option(None, help="float32, float16 or bfloat16. [default: the first fine-tune's]"),
    device: str = typer.Option(None, help="cpu, cuda, cuda:1, or several as cuda:0,cuda:1. [default: cpu]"),
    workers: int = typer.Option(
        None, min=1, help="Threads. [default: the number of cores, or as many as the memory holds]"
    ),
    ray: str = typer.Option(None, metavar="ADDRESS", help="Fuse on a Ray cluster; see `safegraft merge --help`."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print what would be done, in what memory and time; write nothing."
    ),
    resume: bool = typer.Option(None, "--resume", help="Go on with a run that was killed."),
    force: bool = typer.Option(None, "--force", help="Replace an existing output."),
    strict: bool = typer.Option(None, "--strict", help="Make doubts about the inputs an error."),
) -> None:
    """Fuse one or several fine-tunes under a mask: `safegraft merge --method somf` with the aligned model for base."""
    params = {"kind": kind, "seed": seed, "fusion": fusion, "scale": scale}
    given: dict[str, Any] = {
        "model": (model[0] if len(model) == 1 else model) if model else None, "weights": weight or None,
        "base": aligned, "mask": mask, "out": out, "method": "somf", "dtype": dtype, "device": device,
        "workers": workers, "ray": ray, "resume": resume, "force": force, "strict": strict,
        "params": {k: v for k, v in params.items() if v is not None},
    }  # fmt: skip
    settings = load(MergeConfig, None, given)
    from ..merging.run import prepare, run_merge

    if dry_run:
        print_plan(prepare(settings))
        return
    named = sorted(k for k, v in (given | params).items() if v is not None and k != "params")
    with progress_bar() as progress:
        summary = run_merge(settings, named, progress)
    warn(summary.warnings)
    note(summary.notes)
    print_summary(summary)


def _print_check(found: Learnt, settings: SomfConfig) -> None:
    looks = found.check.looks()
    table = Table(box=None, header_style="bold", title=f"{found.check.pairs} held-out pairs", title_justify="left")
    table.add_column("")
    for name in looks:
        table.add_column(name, justify="right")
    table.add_row("log p(chosen) − log p(rejected), nats", *(f"{look.margin:+.2f}" for look in looks.values()))
    table.add_row("chosen answer likelier", *(f"{look.preferred:.0%}" for look in looks.values()))
    table.add_row(f"DPO loss against the {settings.reference} model", *(f"{look.loss:.4f}" for look in looks.values()))
    stdout.print(table)
    told = found.mask.manifest
    stdout.print(
        f"{told['learning']['steps']} steps, loss {told['learning']['first_loss']:.4f} to "
        f"{told['learning']['last_loss']:.4f}; {len(found.mask.weights)} weights, "
        f"{found.kept:.1%} of the logits above 0, which is what the binary mask keeps.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    models = " ".join(f"--model {m}" for m in settings.models)
    stdout.print(
        f"Wrote {settings.out}. Use it: safegraft somf fuse --aligned {settings.aligned} {models} "
        f"--mask {settings.out} --kind binary --out FUSED",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
