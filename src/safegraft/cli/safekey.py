"""safegraft safekey annotate, train, probe"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import ConfigError
from .console import counting_bar, note, stdout, warn

if TYPE_CHECKING:
    from ..reasoning.annotators import Annotator

app = typer.Typer(
    help="Train reasoning models to have the safety aha-moment (SafeKey, arXiv:2505.16186).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("annotate")
def annotate_command(
    data: str = typer.Argument(help="Traces: a .json/.jsonl/.csv/.parquet file, or a Hub data set."),
    out: Path = typer.Option(..., help="The folder to write: annotated.jsonl, refused.jsonl, manifest.json."),
    label: str = typer.Option(None, help="harmful or benign, for rows that do not say it themselves."),
    annotator: str = typer.Option("rules", help="rules, or openai: a chat model at --base-url is asked."),
    base_url: str = typer.Option(None, help="Of any OpenAI-compatible endpoint, such as http://localhost:8000/v1."),
    model: str = typer.Option(None, help="The chat model's name at that endpoint."),
    min_confidence: float = typer.Option(0.5, help="Rows below are refused, 0 to 1."),
    resume: bool = typer.Option(False, "--resume", help="Go on with a run that was stopped."),
    force: bool = typer.Option(False, "--force", help="Replace an existing output."),
) -> None:
    """Mark where each trace's understanding of the query ends, and its key sentence, as character offsets.

    Rows that cannot be segmented are listed with the reason. Each row needs a query and a response that begins with
    a think block, and a label: a field harmful (true, false) or label (harmful, benign), or --label.
    """
    given = sorted(k for k, v in locals().items() if v not in (None, False))
    from ..reasoning.annotate import annotate

    with counting_bar() as report:
        found = annotate(
            data, out, _annotator(annotator, base_url, model), label=label, min_confidence=min_confidence,
            resume=resume, force=force, given=given, progress=lambda done, total: report("annotating", done, total),
        )  # fmt: skip
    result = found.manifest["result"]
    whole = result["annotated"] + result["refused"]
    stdout.print(
        f"{result['annotated']} of {whole} rows annotated ({result['annotated'] / whole:.1%}), "
        f"{result['harmful']} harmful and {result['annotated'] - result['harmful']} benign.",
        highlight=False,
    )
    shares = ", ".join(f"{n} at {value}" for value, n in result["confidence"].items())
    stdout.print(f"Confidence: {shares}.", highlight=False)
    for reason, n in result["reasons"].items():
        stdout.print(f"  {n} refused: {reason}", highlight=False, markup=False)
    stdout.print(f"Wrote {out}. Train: safegraft safekey train --data {out} …", highlight=False, soft_wrap=True)


def _annotator(name: str, base_url: str | None, model: str | None) -> Annotator:
    from ..reasoning.annotators import Asked, Rules

    if name == "rules":
        if base_url or model:
            raise ConfigError("--base-url and --model are of --annotator openai", "Add it, or leave them out.")
        return Rules()
    if name != "openai":
        raise ConfigError(f"there is no annotator {name!r}", "Choose rules or openai.")
    if not base_url or not model:
        raise ConfigError("--annotator openai needs --base-url and --model")
    from ..evaluate.models.openai import Endpoint, OpenAiChatModel

    return Asked(OpenAiChatModel(Endpoint(base_url, model)), model)


@app.command("train")
def train_command(
    model: str = typer.Option(None, help="The reasoning model: a folder or Hub id."),
    data: list[str] = typer.Option(None, help="Folders of `safekey annotate`; harmful and benign rows together."),
    out: Path = typer.Option(None, help="The folder to write: a plain checkpoint."),
    epochs: int = typer.Option(None, help="Passes over the rows. [default: 5, the paper's]"),
    aux_epochs: int = typer.Option(
        None, help="The last ones, in which the auxiliary terms count. [default: 2, the paper's]"
    ),
    lr: float = typer.Option(None, help="Peak learning rate, then a cosine to 0. [default: 1e-5, the paper's]"),
    batch: int = typer.Option(None, help="Rows a step, over all processes. [default: 128, the paper's]"),
    micro_batch: int = typer.Option(None, help="Rows at a time on one device. [default: at most 4]"),
    max_length: int = typer.Option(None, help="Tokens after which a row is cut. [default: 8192, the paper's]"),
    qmm: float = typer.Option(None, help="Weight of query-mask modelling. [default: 0.2, the paper's]"),
    head: float = typer.Option(None, help="Weight of the two heads together. [default: 0.2, the paper's]"),
    theta: float = typer.Option(None, help="Share of the head over U; the rest is over query and U. [default: 0.5]"),
    no_heads: bool = typer.Option(None, "--no-heads", help="Ablation: without the heads."),
    no_qmm: bool = typer.Option(None, "--no-qmm", help="Ablation: without query-mask modelling."),
    qmm_unmasked: bool = typer.Option(None, "--qmm-unmasked", help="Ablation: that term with the query in sight."),
    detach_heads: bool = typer.Option(
        None, "--detach-heads", help="Ablation: the model learns nothing from the heads."
    ),
    lora_rank: int = typer.Option(
        None, help="Train LoRA factors of this rank and add them to the output. [default: all weights]"
    ),
    gradient_checkpointing: bool = typer.Option(
        None, "--gradient-checkpointing", help="Recompute activations: less memory, more time."
    ),
    packed: bool = typer.Option(None, "--packed", help="Rows of a batch one after another, without padding."),
    attention: str = typer.Option(None, help="sdpa, eager or flash_attention_2. [default: sdpa]"),
    precision: str = typer.Option(
        None, help="auto, float32 or bfloat16 (autocast). [default: auto: bfloat16 on a GPU that has it]"
    ),
    dtype: str = typer.Option(None, help="Dtype of the output. [default: the model's]"),
    think_template: bool = typer.Option(
        None, "--think-template", help="Add <think> to a chat template that has no think block, in the output too."
    ),
    max_missing: float = typer.Option(None, help="Share of rows that may lack spans. [default: 0.1]"),
    save_heads: str = typer.Option(None, help="Keep the heads in this folder, for `safekey probe`."),
    save_steps: int = typer.Option(None, help="Steps between checkpoints in OUT.training. [default: an epoch]"),
    no_checkpoints: bool = typer.Option(None, "--no-checkpoints", help="Keep nothing to --resume from."),
    seed: int = typer.Option(None, help="Of the order, the heads and the LoRA factors. [default: 0]"),
    config: Path = typer.Option(None, help="YAML file with these settings; options given here win."),
    resume: bool = typer.Option(None, "--resume", help="Go on with a run that was stopped."),
    force: bool = typer.Option(None, "--force", help="Replace an existing output and what a stopped run left."),
) -> None:
    """Train a reasoning model on annotated traces with the SafeKey loss.

    Defaults are the paper's (arXiv:2505.16186). The heads are for training only: the output is a plain checkpoint.
    """
    given = {k: v for k, v in locals().items() if k != "config" and v is not None and v != []}
    from ..config import SafeKeyConfig, load

    if "out" in given:
        given["out"] = str(out)
    settings = load(SafeKeyConfig, config, given)
    from ..reasoning.train import train

    with counting_bar() as report:
        found = train(settings, given=sorted(given), progress=report)
    if found is None:
        return
    note(found.notes)
    for epoch in found.manifest["result"]["epochs"]:
        terms = ", ".join(f"{name} {value:.4f}" for name, value in epoch.items() if name != "epoch")
        stdout.print(f"Epoch {epoch['epoch']:.0f}: {terms}", highlight=False)
    kept = f", the heads to {settings.save_heads}" if settings.save_heads else ""
    stdout.print(f"Wrote {settings.out}{kept}.", highlight=False, soft_wrap=True)


@app.command("probe")
def probe_command(
    model: str = typer.Argument(help="The model that was trained: a folder."),
    prompts: str = typer.Argument(help="Rows with prompt, perhaps response (a trace), perhaps harmful or label."),
    heads: Path = typer.Option(..., help="The folder of `safekey train --save-heads`."),
    out: Path = typer.Option(..., help="The folder to write: scores.jsonl, manifest.json."),
    tokens: int = typer.Option(160, min=1, help="New tokens, in which the model writes its understanding."),
    batch: int = typer.Option(16, min=1, help="Prompts at a time."),
    force: bool = typer.Option(False, "--force", help="Replace an existing output."),
) -> None:
    """Score prompts with the heads: how surely the model's understanding of each shows that it is harmful."""
    given = sorted(k for k, v in locals().items() if v not in (None, False))
    from ..reasoning.probe import probe

    with counting_bar() as report:
        found = probe(model, heads, prompts, out, tokens=tokens, batch=batch, force=force, given=given, progress=report)
    scored = [s for s in found.scores if s.u is not None and s.xu is not None]
    for s in scored:
        stdout.print(f"{s.id}  U {s.u:.3f}  query and U {s.xu:.3f}", highlight=False, markup=False)
    for s in found.scores:
        if s.u is None:
            stdout.print(f"{s.id}  no score: {s.reason}", highlight=False, markup=False)
    for name, right in found.right.items():
        what = "over U" if name == "u" else "over query and U"
        stdout.print(
            f"Head {what}: right on {right.hits} of {right.n} ({right.low:.0%}–{right.high:.0%}).", highlight=False
        )
    warn(found.warnings)
    stdout.print(f"Wrote {out}.", highlight=False, soft_wrap=True)
