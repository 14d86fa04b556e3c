"""Utility: what a model can do beside refusing, on published tasks.

lm-evaluation-harness asks and scores most of them (``harness``), EvalPlus's program scores HumanEval+ and MBPP+
(``evalplus``), and what a model wrote is run in a sandbox (``sandbox``) or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from .base import Utility
from .tasks import ANY, KNOWN, PLUS, SUITES


def divide(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of suites and benchmarks of prompts; names of utility tasks, suites of them expanded, each once."""
    tasks: list[str] = []
    for name in names:
        tasks += [each for each in SUITES.get(name, (name,)) if is_task(each) and each not in tasks]
    return [name for name in names if name not in SUITES and not is_task(name)], tasks


def is_task(name: str) -> bool:
    return name in KNOWN or name in PLUS or name.startswith(ANY)


def load(
    names: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    allow_code: bool = False,
    evalplus: Path | None = None,
) -> list[Utility]:
    """Utility tasks with their rows, ready to measure models on.

    Args:
        names: see ``divide``. evalplus: the folder of EvalPlus's environment. Others: see ``harness.load``.

    Raises:
        ConfigError: as ``harness.load`` and ``evalplus.load``; for a limit or tokens below 1.
    """
    for what, value in (("limit", limit), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{what} {value} is below 1")
    from . import evalplus as plus
    from . import harness

    for name in names:
        if name in PLUS or (name in KNOWN and KNOWN[name].code):
            harness.require_code(name, allow_code)
    out: list[Utility] = []
    for name in names:
        if name in PLUS:
            out.append(plus.load(name, evalplus, data=data, limit=limit, tokens=tokens, allow_code=allow_code))
        else:
            out.append(harness.load(name, data=data, limit=limit, tokens=tokens, seed=seed, allow_code=allow_code))
    return out
