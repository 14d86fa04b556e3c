"""Folders that a long run fills step by step, and may go on in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import OutputError


def claim(out: Path, marker: str, kind: str, *, resume: bool, force: bool) -> bool:
    """Make ``out`` the folder of a run, or find the one that a run is to go on in.

    Args:
        marker: a name that runs of this kind leave in their folder from the start. kind: what they are, for errors.
        resume: go on with an earlier run. force: start again in place of it.

    Returns:
        Whether an earlier run is there to go on with; otherwise ``out`` is an empty folder now.

    Raises:
        OutputError: ``out`` is something else; or such a run and neither ``resume`` nor ``force`` is given; or not
        writable.
    """
    try:
        taken = os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()))
        if taken and not (out / marker).exists():
            raise OutputError(f"{out} is something else than {kind}", "Choose another --out.")
        if taken and not (resume or force):
            raise OutputError(f"{out} exists already", "Go on with --resume, or start again with --force.")
        if taken and not force:
            return True
        if taken:
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}", "Choose another --out.") from error
    return False
