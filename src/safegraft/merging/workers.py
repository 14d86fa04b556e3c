"""Many pieces of work on several threads, on processors and on GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..tensors.source import CPU, Workspace

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Share(Generic[A]):
    """What is to be done on one device, in this order, by so many ``workers`` ≥ 1."""

    items: Sequence[A]
    workers: int
    device: torch.device = CPU


def parallel(work: Callable[[A, Workspace], B], items: Iterable[A], workers: int) -> list[B]:
    """``[work(item, workspace) …]`` on ``workers`` threads, each with its own workspace; the first error ends it.

    Torch runs single-threaded inside each worker: results do not depend on the number of workers, and cores are not
    oversubscribed.
    """
    return on_devices(work, [Share(list(items), workers)])


def on_devices(work: Callable[[A, Workspace], B], shares: Sequence[Share[A]]) -> list[B]:
    """As ``parallel``, every share by threads of its own, whose workspaces belong to its device. Answers in the shares'
    order."""
    local = threading.local()
    stopped = threading.Event()

    def run(item: A, device: torch.device) -> B | None:
        if stopped.is_set():
            return None
        try:
            if not hasattr(local, "workspace"):
                torch.set_num_threads(1)
                local.workspace = Workspace(device)
            with local.workspace.at_work():
                return work(item, local.workspace)
        except BaseException:
            stopped.set()
            raise

    for share in shares:
        _load_linear_algebra(share.device)
    with single_threaded(), ExitStack() as pools:
        futures = []
        for share in shares:
            pool = pools.enter_context(ThreadPoolExecutor(share.workers))
            futures += [pool.submit(run, item, share.device) for item in share.items]
        try:
            return [f.result() for f in futures]  # type: ignore[misc]
        except BaseException:
            stopped.set()
            raise


def _load_linear_algebra(device: torch.device) -> None:
    """Several threads must not be the first to ask a GPU for it (pytorch/pytorch#90613)."""
    if device.type != "cpu":
        with Workspace(device).at_work():
            torch.linalg.eigh(torch.eye(2, device=device))


@contextmanager
def single_threaded() -> Iterator[None]:
    """Torch on one thread: results do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
