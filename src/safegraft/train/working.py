"""The folder in which a training run keeps what resuming needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..manifest import digest_of
from ..tensors.private import private_folder, signals_raise
from ..tensors.writer import write_whole
from .distill import is_main

IDENTITY = "identity.json"


@contextmanager
def working_folder(work: Path, identity: dict[str, Any], *, keeps: bool, resume: bool) -> Iterator[Path]:
    """``work``, for the block alone, readable by this user only; with ``keeps`` it stays where the block fails.

    In processes other than the first it is only named.

    Args:
        identity: what decides the result. resume: go on in what an earlier block left.

    Raises:
        OutputError: to be resumed, and what is there is of another ``identity``.
    """
    if not is_main():
        with signals_raise():
            yield work
        return
    mark = work / IDENTITY
    if resume and (not mark.exists() or mark.read_text(encoding="utf-8") != digest_of(identity)):
        raise OutputError(
            f"{work} belongs to a run with other settings, rows or number of processes",
            "Repeat that run's settings to resume it, or start again with --force.",
        )
    with private_folder(work, keep_on_failure=keeps, keep_content=resume) as folder:
        if keeps:
            write_whole(mark, digest_of(identity).encode())
        yield folder
