"""The same plan on a Ray cluster whose nodes share a filesystem (the extra `ray`).

The process that is asked prepares, surveys, lays out the shards and alone keeps the journal. Tasks open the inputs by
their paths, fill the shards, and return what they wrote. A task that is lost with its worker or node runs again: it
puts the same bytes into the same places.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError, ConfigError, MismatchError, OutputError, SafegraftError
from ..manifest import versions
from ..tensors.calibration import Calibration
from ..tensors.files import ShardLayout
from ..tensors.finetune import FineTune
from ..tensors.mask import Mask
from ..tensors.scopes import Scope
from ..tensors.shards import Shards
from ..tensors.source import Workspace
from ..tensors.vector import SafetyVector
from ..tensors.writer import OutputFolder
from . import methods as _methods
from .execute import Done, Run, figures_of, is_done, write_unit
from .method import METHODS, GlobalStats
from .plan import Plan, Unit, balanced
from .record import fingerprints
from .survey import Progress, Survey
from .workers import single_threaded

_ = _methods  # a task starts here and looks its method up

LOCAL = "local"
BATCHES = 8
"""Tasks a processor: enough to even out what the costs got wrong, and to lose little with one."""
RETRIES = 3
"""How often a task is run again whose worker was lost."""
STORE = 100_000_000
"""Bytes of a local cluster's object store, which holds no weights."""
REACHED_IN = 5.0
"""Seconds within which a cluster's address must answer."""


@dataclass(frozen=True)
class Job:
    """All that a task needs besides its units; absolute paths, which every node must see."""

    models: list[str]
    weights: list[float]
    base: str
    vector: str | None
    scope: Scope | None
    directions: bool
    calibration: str | None
    mask: str | None
    method: str
    params: dict[str, Any]
    survey: Survey
    stats: GlobalStats
    seed: int
    inputs: dict[str, Any]
    versions: dict[str, str]
    partial: Path
    layouts: Sequence[ShardLayout]
    out: Path


class Written(NamedTuple):
    """A task's answer: what it wrote, the node it ran on, and that node's vector instructions."""

    done: list[Done]
    node: str
    processor: str


class Cluster:
    """A connection to the Ray cluster at ``address``, for the length of a block.

    Args:
        address: ``local`` starts one on this machine with ``workers`` processors, without dashboard and usage
            statistics; ``auto`` is the one this machine belongs to; else HOST:PORT of its head.

    Attributes:
        about: for the manifest, once ``execute`` has returned.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str, workers: int) -> None:
        self.address, self.workers = address, workers
        self.ray = require_ray()
        self.about: dict[str, Any] = {}
        self._mine = False

    def __enter__(self) -> Cluster:
        ray = self.ray
        if ray.is_initialized():
            return self
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        here = {"num_cpus": self.workers, "include_dashboard": False, "object_store_memory": STORE}
        try:
            if self.address == LOCAL:
                ray.init(address=LOCAL, **here, **quiet)
            else:
                _require_answer(self.address)
                ray.init(address=self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"ray {self.address!r}: {str(error).splitlines()[0]}",
                "Start a cluster with `ray start --head`, or give --ray local.",
            ) from error
        self._mine = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            self.ray.shutdown()

    def execute(
        self, plan: Plan, run: Run, folder: OutputFolder, progress: Progress | None = None
    ) -> dict[str, dict[str, float]]:
        """As safegraft.merging.execute.execute, on the cluster; raises CheckpointError, MismatchError too."""
        ray = self.ray
        todo = [u for u in plan.units if not is_done(u, folder)]
        if progress:
            for unit in set(plan.units) - set(todo):
                progress(unit.name, unit.spec.nbytes)
        slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        job = ray.put(_job(run, folder))
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(write_batch)
        running = {task.remote(job, batch): batch for batch in balanced(todo, BATCHES * slots)}
        nodes, processors, tasks = set(), set(), len(running)
        while running:
            (first,), _ = ray.wait(list(running))
            batch = running.pop(first)
            written = self._result(first, batch)
            for done in written.done:
                folder.done(*done)
            nodes.add(written.node)
            processors.add(written.processor)
            if progress:
                for unit in batch:
                    progress(unit.name, unit.spec.nbytes)
        self.about = {
            "address": self.address, "tasks": tasks, "nodes": len(nodes), "processors": sorted(processors),
        }  # fmt: skip
        return figures_of(plan, folder)

    def _result(self, reference: Any, batch: Sequence[Unit]) -> Written:
        errors = self.ray.exceptions
        try:
            answer: Written = self.ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SafegraftError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise OutputError(
                f"the workers that were to write {batch[0].name} and {len(batch) - 1} more were lost: {reason}",
                "Look at the nodes' memory and logs; the same command with --resume goes on.",
            ) from error
        return answer


def require_ray() -> Any:
    """The module; ConfigError where it is not installed."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("--ray needs ray", "Install it: pip install 'safegraft[ray]'") from error
    return ray


def write_batch(job: Job, units: Sequence[Unit]) -> Written:
    """The body of a task: write ``units`` and wait until the disk has them."""
    import ray

    context, workspace = ray.get_runtime_context(), Workspace()
    node = str(context.get_node_id())
    run = _opened(job, node)
    with single_threaded(), Shards(job.partial, job.layouts, job.out) as shards:
        done = [each for unit in units for each in write_unit(unit, run, shards, workspace)]
    return Written(done, node, torch.backends.cpu.get_cpu_capability())


def _job(run: Run, folder: OutputFolder) -> Job:
    fine, vector, calibration, mask, params = run.fine, run.vector, run.calibration, run.mask, run.params
    return Job(
        [str((one.adapter or one.layout).path.absolute()) for one in (fine, *fine.others)], list(fine.weights),
        str(fine.base.path.absolute()), None if vector is None else str(vector.path.absolute()),
        None if vector is None else vector.scope, vector is not None and vector.directions,
        None if calibration is None else str(calibration.path.absolute()),
        None if mask is None else str(mask.path.absolute()),
        run.method.name, params.model_dump(), run.survey, run.stats, run.seed,
        fingerprints(fine, vector, calibration, mask), versions(), folder.partial, folder.layouts, folder.out,
    )  # fmt: skip


def _opened(job: Job, node: str) -> Run:
    """The run as ``job`` describes it, on this node.

    Raises:
        ConfigError: other versions here. CheckpointError, MismatchError: the inputs are not here, or are others.
    """
    if versions() != job.versions:
        differing = {k: (v, versions().get(k)) for k, v in job.versions.items() if versions().get(k) != v}
        raise ConfigError(f"node {node} has other versions: {differing}", "Install the same on every node.")
    shared = "Every node of the cluster must see the same files under the same paths."
    if not job.partial.is_dir():
        raise OutputError(f"node {node} does not see {job.partial}", shared)
    try:
        vector = None if job.vector is None else SafetyVector(job.vector, job.scope, directions=job.directions)
        calibration = None if job.calibration is None else Calibration(job.calibration)
        mask = None if job.mask is None else Mask(job.mask)
        fine = FineTune.open(job.models, job.base, vector, job.weights)
    except CheckpointError as error:
        raise CheckpointError(f"on node {node}: {error.args[0]}", shared) from error
    if fingerprints(fine, vector, calibration, mask) != job.inputs:
        raise MismatchError(f"node {node} sees other inputs under the same paths", shared)
    method = METHODS.get(job.method)
    params = method.parameters(job.params)
    return Run(fine, vector, method, params, job.survey, job.stats, seed=job.seed, calibration=calibration, mask=mask)


def _require_answer(address: str) -> None:
    """Raise ConnectionError where nothing listens, which Ray itself finds out after minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConnectionError("this is neither local nor auto nor HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED_IN).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers there ({error.strerror or error})") from error
