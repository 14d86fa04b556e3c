"""safegraft utility list, safegraft utility evalplus"""

from __future__ import annotations

from pathlib import Path

import typer

from .console import note, stdout

app = typer.Typer(help="Utility tasks for `safegraft evaluate`.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_command() -> None:
    """List the suites and tasks: where each is known from, and its local files."""
    from ..evaluate.utility.tasks import KNOWN, METRICS, PLUS, SUITES

    for suite, names in SUITES.items():
        stdout.print(f"{suite}: {', '.join(names)}", style="bold", highlight=False, markup=False, soft_wrap=True)
        for name in names:
            if name in PLUS:
                said = f"pass@1 by EvalPlus (arXiv:2305.01210); {' or '.join(PLUS[name][1])}"
            else:
                known = KNOWN[name]
                files = " and ".join(" or ".join(each) for each in known.files.values())
                metric = METRICS.get(known.metric, known.metric)
                said = f"{metric} by lm-evaluation-harness's {known.task} ({known.paper}); {files}"
            stdout.print(f"  {name}: {said}", highlight=False, markup=False, soft_wrap=True)
    stdout.print("lm_eval:TASK is any other task of lm-evaluation-harness.", highlight=False, markup=False)


@app.command("evalplus")
def evalplus_command(
    setup: Path = typer.Option(..., help="Make EvalPlus's environment in this folder."),
) -> None:
    """Install EvalPlus, for humaneval+ and mbpp+, in an environment of its own, and fetch its problems."""
    from ..evaluate.utility import evalplus

    note([f"Installing EvalPlus {evalplus.VERSION} and what it needs, 0.8 GB; this takes a minute or two."])
    stdout.print(evalplus.setup(setup), highlight=False, soft_wrap=True, markup=False)
