"""SHA-256 of stored tensors, worked out by a second process while this one is busy importing torch.

A merge hashes every byte it reads. Importing torch takes a second on one core and holds Python's lock, which keeps a
thread from using the other core; on a small model most of that hashing is done before the merge begins. What is not
known by then is hashed when it is read; nothing depends on this module. It needs nothing but the standard library: the
other process runs this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

PIECE = 1 << 20
_Key = tuple[int, int, int, int, int]
_known: dict[_Key, str] = {}
_running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []


@contextmanager
def hashing(folders: Iterable[str | Path]) -> Iterator[None]:
    """Hash the safetensors files of those ``folders`` that are folders here, until ``stop`` or the end of the block."""
    files = [file for folder in folders if Path(folder).is_dir() for file in sorted(Path(folder).glob("*.safetensors"))]
    if files and sys.executable:
        with suppress(OSError):  # no room for a file or a process: all is hashed when it is read
            _start(files)
    try:
        yield
    finally:
        stop()


def _start(files: list[Path]) -> None:
    command, quiet = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *map(str, files)], subprocess.DEVNULL
    with ExitStack() as opened:
        output = opened.enter_context(tempfile.TemporaryFile())
        _running.append((subprocess.Popen(command, stdin=quiet, stdout=output, stderr=quiet), output))
        opened.pop_all()


def stop() -> None:
    """End it; what it has found stays known."""
    while _running:
        process, output = _running.pop()
        process.terminate()
        process.wait()
        with output:
            output.seek(0)
            for line in output.read().splitlines():
                with suppress(ValueError):  # torn by a full disk
                    key, digest = json.loads(line)
                    _known[tuple(key)] = digest


def known(fd: int, offset: int, nbytes: int) -> str | None:
    """The digest of ``nbytes`` at ``offset`` of an open file, if it was worked out and the file has not changed."""
    return _known.get(_key(fd, offset, nbytes)) if _known else None


def _key(fd: int, offset: int, nbytes: int) -> _Key:
    about = os.fstat(fd)
    return about.st_dev, about.st_ino, about.st_mtime_ns, offset, nbytes


def _digests(file: Path, parent: int) -> Iterator[tuple[_Key, str]]:
    """Of one file's tensors, as they lie in it; ends where the file is damaged or ``parent`` is gone."""
    buffer = memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as opened:
        fd = opened.fileno()
        (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
        if length > os.fstat(fd).st_size:
            return
        header = json.loads(os.pread(fd, length, 8))
        names = [name for name in header if name != "__metadata__"]
        names.sort(key=lambda name: "#" in name)  # a vector's singular directions, which most methods do not read
        for first, last in (header[name]["data_offsets"] for name in names):
            key, running = _key(fd, 8 + length + first, last - first), hashlib.sha256()
            for position in range(first, last, PIECE):
                wanted = min(PIECE, last - position)
                if os.getppid() != parent or os.preadv(fd, [buffer[:wanted]], 8 + length + position) != wanted:
                    return
                running.update(buffer[:wanted])
            if _key(fd, key[3], key[4]) == key:
                yield key, running.hexdigest()


def _main(parent: int, files: list[str]) -> None:
    for file in files:
        try:
            for found in _digests(Path(file), parent):
                os.write(1, json.dumps(found).encode() + b"\n")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
            continue  # a damaged file is told of, with its reason, by whoever opens it for the merge


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
