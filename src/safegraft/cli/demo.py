"""safegraft demo"""

from __future__ import annotations

from pathlib import Path

import typer


def command(
    out: Path = typer.Option(Path("demo-out"), help="The folder for checkpoints, table and report; resumed if there."),
    model: str = typer.Option(
        None, help="Another small chat model, by folder or Hub id. [default: SmolLM2-135M-Instruct]"
    ),
    seed: int = typer.Option(0, help="Seed of everything random."),
    force: bool = typer.Option(False, "--force", help="Start again instead of resuming."),
) -> None:
    """Wear a real model's refusals away with harmless fine-tuning, put them back, and measure it."""
    from ..demo import run_demo

    run_demo(out, model=model, seed=seed, force=force)
