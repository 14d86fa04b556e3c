"""The shard files of an output that are laid out already: tensors are put into their places, in any order."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import OutputError
from .files import ShardLayout

COPY_PIECE = 8 << 20
SYNC_EVERY = 64 << 20
"""Bytes after which the disk is set to work, so that it writes while the next tensors are worked out."""


def sha256(data: memoryview | bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Shards:
    """Files of their full size in ``folder``, to be filled by ``write`` and ``copy``.

    Threads, processes and machines with a shared filesystem may fill the same files at once: tensors are disjoint byte
    ranges, and writing one again changes nothing. What was written is on the disk when the block is left; network
    filesystems write no byte but those of the tensor (``O_DSYNC`` keeps NFS from rounding a write to whole pages).

    Args:
        out: the output's name in errors.

    Raises:
        OutputError: a file is not there or not writable.
    """

    def __init__(self, folder: Path, layouts: Sequence[ShardLayout], out: Path) -> None:
        self.partial, self.layouts, self.out = folder, layouts, out
        self._where = {name: (lay.filename, e) for lay in layouts for name, e in lay.entries.items()}
        self._files: dict[str, int] = {}
        self._syncer: ThreadPoolExecutor | None = None
        self._syncing: Future[None] | None = None
        self._unsynced = 0
        self._sync_lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            for layout in self.layouts:
                flags = os.O_RDWR | getattr(os, "O_DSYNC", 0)
                self._files[layout.filename] = os.open(self.partial / layout.filename, flags)
        except OSError as error:
            self.close()
            raise write_failed(self.out, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self.close()

    def flush(self) -> None:
        """Wait until the disk has everything. Raises OutputError."""
        try:
            if self._syncing is not None:
                self._syncing.result()
            self._fsync()
        except OSError as error:
            raise write_failed(self.out, error) from error

    def close(self) -> None:
        if self._syncer is not None:
            self._syncer.shutdown()
            self._syncer = None
        for fd in self._files.values():
            os.close(fd)
        self._files = {}

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Put ``data`` at byte ``offset`` of tensor ``name``. Raises OutputError when the disk refuses."""
        filename, entry = self._where[name]
        position = entry.offset + offset
        try:
            while data:
                put = os.pwrite(self._files[filename], data[: 1 << 30], position)
                data, position = data[put:], position + put
                self._sync(put)
        except OSError as error:
            raise write_failed(self.out, error) from error

    def copy(self, name: str, source_fd: int, source_offset: int) -> None:
        """Copy the tensor's bytes from another file, inside the kernel where it can, never decoded."""
        filename, entry = self._where[name]
        left, here = entry.spec.nbytes, entry.offset
        target = self._files[filename]
        inside = hasattr(os, "copy_file_range")
        while left:
            piece = min(left, COPY_PIECE)
            try:
                if inside:
                    put = os.copy_file_range(source_fd, target, piece, source_offset, here)
                else:
                    put = os.pwrite(target, os.pread(source_fd, piece, source_offset), here)
                self._sync(put)
            except OSError as error:
                if inside and error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    inside = False
                    continue
                raise write_failed(self.out, error) from error
            if put == 0:
                raise OutputError(f"{name}: its source ended while being copied", "Fetch the input again.")
            left, here, source_offset = left - put, here + put, source_offset + put

    def _sync(self, nbytes: int) -> None:
        """Now and then have another thread wait for the disk. Raises OSError where the disk refused what it had."""
        with self._sync_lock:
            self._unsynced += nbytes
            if self._unsynced < SYNC_EVERY or not (self._syncing is None or self._syncing.done()):
                return
            if self._syncing is not None:
                self._syncing.result()
            self._syncer = self._syncer or ThreadPoolExecutor(1)
            self._syncing, self._unsynced = self._syncer.submit(self._fsync), 0

    def _fsync(self) -> None:
        for fd in self._files.values():
            os.fsync(fd)


def write_failed(out: Path, error: OSError) -> OutputError:
    """What to tell the user of an operating system's refusal."""
    if error.errno == errno.ENOSPC:
        return OutputError(f"the disk of {out} is full", "Free some space and run the same command with --resume.")
    return OutputError(f"cannot write {out}: {error.strerror}", "Mend that and run the same command with --resume.")
