"""safegraft push"""

from __future__ import annotations

from pathlib import Path

import typer

from .console import stdout


def command(
    out: Path = typer.Argument(help="A merged model, adapter or vector that Safegraft wrote."),
    repo: str = typer.Argument(help="owner/name on the Hugging Face Hub; made if it is not there."),
    public: bool = typer.Option(False, "--public", help="Make a new repository public. [default: private]"),
    force: bool = typer.Option(False, "--force", help="Add to a repository that has files."),
) -> None:
    """Upload a finished output to the Hub, checked against its manifest, with its model card."""
    from ..tensors.push import push

    stdout.print(f"Pushed to {push(out, repo, private=not public, force=force)}", highlight=False, soft_wrap=True)
