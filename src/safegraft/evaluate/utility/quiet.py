"""What is changed in lm-evaluation-harness while it works for us, and put back afterwards."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from . import sandbox


@contextlib.contextmanager
def shut_in() -> Iterator[None]:
    """While tasks are loaded, the metric ``code_eval`` is the sandbox's; modules that hold another are loaded anew."""
    import evaluate

    before = evaluate.load

    def load(path: str, *arguments: Any, **settings: Any) -> Any:
        return sandbox.CodeEval() if path == "code_eval" else before(path, *arguments, **settings)

    for module in [m for m in sys.modules if m.startswith("lm_eval.tasks.") and m.endswith(".utils")]:
        del sys.modules[module]
    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness's log and bars are not ours; its warnings about what is done on purpose here are not shown."""
    import datasets
    from lm_eval.api import task
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.are_progress_bars_disabled(), task.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
