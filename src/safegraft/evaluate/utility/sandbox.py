"""Running what a model wrote: in a process without network, files, or much of anything else.

Every program gets Linux namespaces of its own (``jail``): it sees no network, no other process, of the machine's files
only the interpreter and system libraries, read-only, and may write to an empty folder in memory, which goes with it.
CPU time, address space, processes, file sizes and descriptors are limited; nothing of our environment is passed on;
after the wall-clock limit it is killed with everything it started. Where the kernel grants no such namespaces nothing
is run.

What this does not limit: all processes together (the limit of memory is each process's), and a hole in the kernel.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .jail import WORK

MEGABYTE = 1 << 20
LIMITS = {
    "CPU": 5, "AS": 1024 * MEGABYTE, "NPROC": 8, "FSIZE": 16 * MEGABYTE, "NOFILE": 64, "CORE": 0,
}  # fmt: skip
"""Of one program, as setrlimit names them: seconds, bytes, processes and threads, bytes, descriptors, bytes."""
SECONDS = 20.0
"""Wall clock of one program; the CPU limit usually comes first."""
SCRATCH = 64 * MEGABYTE
KEPT = 20_000
"""Characters of output that are kept of each stream."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # fmt: skip
WAY_OUT = (
    "Linux 5.12 or newer with user namespaces is needed: allow them (sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container --security-opt seccomp=unconfined), or leave the "
    "code tasks out."
)
RUNNER = """\
import sys
name, word = sys.argv.pop(), sys.argv.pop()
with open(name, encoding="utf-8", errors="surrogatepass") as file:
    program = compile(file.read(), name, "exec")
exec(program, {})
print("\\n" + word, file=sys.__stdout__, flush=True)
"""


@dataclass(frozen=True)
class Finished:
    """``status``: the exit status, 128 and more for a signal, None where time ran out. Streams: their beginnings."""

    status: int | None
    stdout: str
    stderr: str


def run(
    command: Sequence[str],
    *,
    files: Mapping[str, str] | None = None,
    readable: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    limits: Mapping[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
    scratch: int = SCRATCH,
    seconds: float = SECONDS,
) -> Finished:
    """Run one program shut in.

    Args:
        command: its first word is an absolute path. files: name → text, in the folder where it starts.
        readable, writable: folders of the machine it sees at their own paths, beside the system's and this Python's.
        limits: beside LIMITS, by setrlimit's names. scratch: bytes of /tmp. seconds: wall clock.

    Raises:
        ConfigError: this machine grants no namespaces; nothing was run.
    """
    if sys.platform != "linux":
        raise ConfigError(f"generated code cannot be shut in on {sys.platform}", WAY_OUT)
    with tempfile.TemporaryDirectory(prefix="safegraft-") as root, tempfile.TemporaryFile() as out:
        Path(root).chmod(0o755)
        read, write = os.pipe()
        described = {
            "root": root, "command": list(command), "files": dict(files or {}), "report": write, "scratch": scratch,
            "readable": [str(p) for p in (*_python(), *readable)], "writable": [str(p) for p in writable],
            "limits": {**LIMITS, **(limits or {})}, "environment": {**ENVIRONMENT, **(environment or {})},
            "salt": secrets.randbelow(1 << 30),
        }  # fmt: skip
        with tempfile.TemporaryFile() as err, os.fdopen(read, "rb") as reading:
            jail = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("jail.py"))], stdin=subprocess.PIPE,
                stdout=out, stderr=err, env={}, cwd="/", pass_fds=(write,), start_new_session=True,
            )  # fmt: skip
            os.close(write)
            try:
                jail.communicate(json.dumps(described).encode("utf-8", "surrogatepass"), timeout=seconds)
                status: int | None = jail.returncode
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(jail.pid, signal.SIGKILL)
                jail.wait()
            refused = reading.read().decode()
            if refused:
                raise ConfigError(f"generated code cannot be shut in here: {refused}", WAY_OUT)
            return Finished(status, _beginning(out), _beginning(err))


def _beginning(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read(4 * KEPT).decode("utf-8", "replace")[:KEPT])


@functools.cache
def _python() -> tuple[Path, ...]:
    """Folders that this interpreter needs, links and what they lead to."""
    places = [sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)]
    return tuple(Path(p) for p in dict.fromkeys(places) if p != "/")


def passes(program: str) -> bool:
    """Whether ``program`` runs to its end without an error (tests are part of it). Raises as ``run``.

    Its end is told by a random word that is printed after it, so that leaving early with status 0 is no success.
    """
    word = secrets.token_hex(16)
    command = [sys.executable, "-I", "-B", "runner.py", word, "program.py"]
    done = run(command, files={"runner.py": RUNNER, "program.py": program})
    return done.status == 0 and done.stdout.rstrip("\n").endswith(word)


@functools.cache
def require() -> None:
    """Make sure that programs can be shut in here. Raises ConfigError with the reason and the way out."""
    if not passes("assert 1 + 1 == 2"):
        raise ConfigError("generated code cannot be shut in here: this Python does not start in the sandbox", WAY_OUT)


class CodeEval:
    """Stands in for the metric ``code_eval`` that lm-evaluation-harness's code tasks load from the Hub: the same call
    and the same pass@k (arXiv:2107.03374, section 2.1), but each program runs in the sandbox."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], list[list[bool]]]:
        """pass@k over problems, and which candidates passed. ``references``: the tests of each problem."""
        found = [
            [passes(f"{candidate}\n{test}\n") for candidate in candidates]
            for test, candidates in zip(references, predictions, strict=True)
        ]
        rates = {
            f"pass@{size}": sum(_pass_at(size, len(one), sum(one)) for one in found) / len(found)
            for size in k
            if all(len(one) >= size for one in found)
        }
        return rates, found


def _pass_at(k: int, n: int, right: int) -> float:
    return 1.0 - comb(n - right, k) / comb(n, k)
