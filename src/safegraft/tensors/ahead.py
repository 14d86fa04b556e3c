"""SHA-256 of stored tensors, worked out by a thread while the process is busy importing torch.

A merge hashes every byte it reads. Importing torch takes a second on one core, so on a small model most of that hashing
is done before the merge begins. What is not known yet is hashed when it is read; nothing depends on this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path

PIECE = 4 << 20
_Key = tuple[int, int, int, int, int]
_known: dict[_Key, str] = {}
_stop = threading.Event()
_threads: list[threading.Thread] = []


def start(folders: Iterable[str | Path]) -> None:
    """Begin with the safetensors files of those ``folders`` that are folders here; returns at once."""
    files = [file for folder in folders if Path(folder).is_dir() for file in sorted(Path(folder).glob("*.safetensors"))]
    _stop.clear()
    thread = threading.Thread(target=_hash_files, args=(files,), daemon=True)
    _threads.append(thread)
    thread.start()


def stop() -> None:
    """End with the piece in hand; what is known stays known."""
    _stop.set()
    while _threads:
        _threads.pop().join()


def known(fd: int, offset: int, nbytes: int) -> str | None:
    """The digest of ``nbytes`` at ``offset`` of an open file, if it was worked out and the file has not changed."""
    return _known.get(_key(fd, offset, nbytes)) if _known else None


def _key(fd: int, offset: int, nbytes: int) -> _Key:
    about = os.fstat(fd)
    return about.st_dev, about.st_ino, about.st_mtime_ns, offset, nbytes


def _hash_files(files: list[Path]) -> None:
    buffer = memoryview(bytearray(PIECE))
    for file in files:
        try:
            with file.open("rb") as opened:
                _hash_file(opened.fileno(), buffer)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            continue  # a damaged file is told of, with its reason, by whoever opens it for the merge
        if _stop.is_set():
            return


def _hash_file(fd: int, buffer: memoryview) -> None:
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if length > os.fstat(fd).st_size:
        return
    header = json.loads(os.pread(fd, length, 8))
    for name, item in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        first, last = item["data_offsets"]
        key, running = _key(fd, 8 + length + first, last - first), hashlib.sha256()
        for position in range(first, last, PIECE):
            wanted = min(PIECE, last - position)
            if _stop.is_set() or os.preadv(fd, [buffer[:wanted]], 8 + length + position) != wanted:
                return
            running.update(buffer[:wanted])
        if _key(fd, key[3], key[4]) == key:
            _known[key] = running.hexdigest()
