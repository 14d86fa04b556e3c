"""safegraft demo"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

# Freshly allocated memory is slow under glibc's defaults: training drifts to a tenth of its speed unless freed memory
# stays in the process. The settings are read at start-up only.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "100000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def command(
    out: Path = typer.Option(Path("demo-out"), help="The folder for checkpoints, table and report; resumed if there."),
    model: str = typer.Option(
        None, help="Another small chat model, by folder or Hub id. [default: SmolLM2-135M-Instruct]"
    ),
    seed: int = typer.Option(0, help="Seed of everything random."),
    force: bool = typer.Option(False, "--force", help="Start again instead of resuming."),
) -> None:
    """Wear a real model's refusals away, put them back, and measure it; exit status 1 if it did not work."""
    if sys.platform == "linux" and not _ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, "-m", "safegraft", *sys.argv[1:]], {**_ALLOCATOR, **os.environ})
    from ..demo import run_demo

    results = run_demo(out, model=model, seed=seed, force=force)
    if not all(results["checks"].values()):
        raise typer.Exit(1)
