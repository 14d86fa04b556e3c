"""The command line: parse, check, one library call, print."""

from __future__ import annotations

import atexit
import os
import sys

import typer

from .. import __version__
from ..errors import UserError
from . import (
    attack,
    calibrate,
    demo,
    evaluate,
    gate,
    guard,
    inspect,
    judges,
    merge,
    mergekit,
    methods,
    push,
    report,
    safekey,
    somf,
    tune,
    utility,
    vector,
    verify,
)
from .console import stderr

app = typer.Typer(
    name="safegraft",
    help="Give a fine-tuned language model its safety back, without retraining it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("merge")(merge.command)
app.command("calibrate")(calibrate.command)
app.command("mergekit")(mergekit.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("tune")(tune.command)
app.command("evaluate")(evaluate.command)
app.command("judge")(evaluate.judge_command)
app.command("gate")(gate.command)
app.command("guard")(guard.command)
app.command("report")(report.command)
app.command("push")(push.command)
app.command("methods")(methods.command)
app.add_typer(vector.app, name="vector")
app.add_typer(safekey.app, name="safekey")
app.add_typer(somf.app, name="somf")
app.add_typer(attack.app, name="attack")
app.add_typer(judges.app, name="judges")
app.add_typer(utility.app, name="utility")
app.command("demo")(demo.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safegraft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _leave() -> None:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Run the command line; errors the user can mend end with status 2 and no traceback, an interrupt with 130.

    The process ends without taking torch apart, which costs 0.3 s and changes nothing.
    """
    try:
        app()
    except SystemExit as done:
        if done.code in (None, 0):
            _leave()
        raise
    except UserError as error:
        stderr.print(f"Error: {error.args[0]}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            stderr.print(error.hint, markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        stderr.print("Stopped. Nothing that looks whole was left; --resume goes on where there is one.")
        sys.exit(130)
