"""Programs that cannot share our environment, each in a virtual environment of its own, in a folder the user names."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from ..errors import ConfigError, OutputError


def python_of(folder: Path) -> Path:
    """The environment's interpreter, whether it exists or not."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def installed(folder: Path, package: str) -> str:
    """The version of ``package`` in the environment, or an empty string."""
    if not python_of(folder).exists():
        return ""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python_of(folder)), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def install(folder: Path, package: str, version: str, name: str, constraints: Path | None = None) -> None:
    """Make the environment and let pip install ``package`` in it, unless it is there in that version.

    Args:
        name: of the program, for messages. constraints: a file for pip's ``--constraint``.

    Raises:
        OutputError: ``folder`` is something else, or cannot be written.
        ConfigError: pip could not install it; the message ends with pip's.
    """
    if installed(folder, package) == version:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "pyvenv.cfg").exists():
        raise OutputError(f"{folder} exists and is no virtual environment", "Name a folder that does not exist yet.")
    try:
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OutputError(f"no virtual environment can be made in {folder}: {error}") from error
    command = [str(python_of(folder)), "-m", "pip", "install", "--no-input", f"{package}=={version}"]
    command += ["--constraint", str(constraints)] if constraints else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ConfigError(
            f"{name} {version} could not be installed: {said[-1] if said else 'pip gave no reason'}",
            "This needs a network that reaches a package index; pip's own settings (index, proxy) apply. Once that is "
            "mended, run the same command again.",
        )
