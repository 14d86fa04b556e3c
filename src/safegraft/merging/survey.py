"""One streaming pass over the inputs: norms, digests, and whether every number is finite."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..errors import NumericError
from ..manifest import digest_of
from ..tensors import ahead
from ..tensors.checkpoint import Checkpoint
from ..tensors.finetune import FineTune
from ..tensors.lowrank import Delta, sum_of_squares
from ..tensors.shards import sha256
from ..tensors.source import Workspace, all_finite, as_bytes
from ..tensors.vector import SafetyVector
from .workers import parallel

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class TensorStats:
    """Of one tensor, over common rows: ‖W_b‖², ‖τ‖², ‖Δ‖², ⟨τ, Δ⟩, and the SHA-256 of the inputs' bytes.

    Of several fine-tunes τ is the weighted sum of their deltas. ``model_sha256`` is that of the layout's tensor (the
    fine-tune's, or an adapter's base's), ``other_sha256`` those of further checkpoints'.
    """

    base_sq: float
    task_sq: float
    safety_sq: float
    dot: float
    model_sha256: str
    base_sha256: str
    other_sha256: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Survey:
    """Statistics of every tensor that counts (a tied head is its embedding and does not count again)."""

    tensors: dict[str, TensorStats]
    adapter_sha256: str | None = None
    other_sha256: list[str] = field(default_factory=list)
    """Of the further fine-tunes: adapters first, then checkpoints."""

    @property
    def task_norm(self) -> float:
        return math.sqrt(sum(t.task_sq for t in self.tensors.values()))

    @property
    def safety_norm(self) -> float:
        return math.sqrt(sum(t.safety_sq for t in self.tensors.values()))

    def digests(self) -> dict[str, str]:
        """One SHA-256 for each input, over (name, digest) of all its tensors; independent of the shards' layout."""
        out = {
            "model": digest_of({n: t.model_sha256 for n, t in self.tensors.items()}),
            "base": digest_of({n: t.base_sha256 for n, t in self.tensors.items()}),
        }
        if self.adapter_sha256:
            out["model"] = self.adapter_sha256
        return out

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Survey:
        return cls(**data | {"tensors": {n: TensorStats(**t) for n, t in data["tensors"].items()}})


def survey(fine: FineTune, vector: SafetyVector | None, workers: int, progress: Progress | None = None) -> Survey:
    """Read everything once, tensor by tensor, a few MB at a time where a tensor is not in the vector.

    Raises:
        NumericError: an input holds NaN or Inf; the message names the tensor and the input. CheckpointError: the
        vector's bytes are not those its manifest was written for.
    """
    ahead.stop()
    layout = fine.layout
    names = [n for n in layout.names() if n not in layout.tied]
    names.sort(key=lambda n: -layout.spec(n).nbytes)

    def one(name: str, workspace: Workspace) -> tuple[str, TensorStats]:
        stats = of_tensor(fine, vector, name, workspace)
        if progress:
            progress(name, layout.spec(name).nbytes)
        return name, stats

    return collected(fine, dict(parallel(one, names, workers)))


def of_tensor(fine: FineTune, vector: SafetyVector | None, name: str, workspace: Workspace) -> TensorStats:
    """``survey`` of one tensor."""
    whole = name in fine.pairing.deltas or fine.adapter is not None or fine.fuses
    stats = None
    if whole and fine.layout.is_mergeable(name):
        in_pieces = name not in fine.pairing.deltas and fine.in_pieces(name)
        stats = _fused(fine, name, workspace) if in_pieces else _whole(fine, vector, name, workspace)
    return stats or _streamed(fine, name, workspace)


def collected(fine: FineTune, found: Mapping[str, TensorStats]) -> Survey:
    """The survey of all tensors, from those of each."""
    adapter = sha256(fine.adapter.raw_bytes()) if fine.adapter else None
    others = [sha256(o.adapter.raw_bytes()) for o in fine.others if o.adapter]
    told = {name: stats.other_sha256 for name, stats in found.items() if stats.other_sha256}
    columns = zip(*told.values(), strict=True)
    others += [digest_of(dict(zip(told, column, strict=True))) for column in columns]  # as Survey.digests
    return Survey({n: found[n] for n in fine.layout.names() if n in found}, adapter, others)


def _streamed(fine: FineTune, name: str, workspace: Workspace) -> TensorStats:
    """A tensor outside the vector: element by element, in pieces."""
    other = fine.pairing.counterparts[name]
    rows, shape = fine.rows(name), fine.base.spec(other).shape
    shared = math.prod((rows, *shape[1:])) if rows is not None else math.prod(shape)
    same = fine.base is fine.layout and other == name
    digests = [_ahead(fine.layout, name), _ahead(fine.base, other)]
    hashes = hashlib.sha256(), hashlib.sha256()
    sums = [0.0, 0.0]
    seen = 0
    ours = fine.layout.chunks(name, workspace, "survey.task")
    theirs = fine.base.chunks(other, workspace, "survey.base") if not same else None
    floating = fine.layout.spec(name).dtype.is_floating_point
    for task, base in _aligned(ours, theirs):
        if task is not None and digests[0] is None:
            hashes[0].update(as_bytes(task))
        if base is not None and digests[1] is None:
            hashes[1].update(as_bytes(base))
        if not floating:
            continue
        if base is None:
            base = task if same else None
        a = None if task is None else task.float()
        b = None if base is None else base.float()
        longest = max(len(x) for x in (a, b) if x is not None)
        common = min(shared - seen, *(len(x) for x in (a, b) if x is not None))
        if common > 0 and a is not None and b is not None:
            sums[0] += sum_of_squares(b[:common])
            if not same:
                sums[1] += sum_of_squares(a[:common].sub_(b[:common]))
        if common < longest or not math.isfinite(sums[0] + sums[1]):
            _require_finite(name, b, fine.base.label)  # first, for a may hold the difference by now
            _require_finite(name, a, fine.layout.label)
        seen += longest
    digest, base_digest = (known or running.hexdigest() for known, running in zip(digests, hashes, strict=True))
    return TensorStats(sums[0], sums[1], 0.0, 0.0, digest, digest if same else base_digest)


class Tally:
    """The statistics of a tensor of several fine-tunes, none of them an adapter, outside any vector, gathered while
    somebody goes through its pieces: ``seen`` is for FineTune.pieces, ``add`` for every piece, ``ended`` for the end.
    """

    def __init__(self, fine: FineTune, name: str) -> None:
        self.fine, self.name, self.stored = fine, name, fine.stored(name)
        self.known = [_ahead(*each) for each in self.stored]
        self.hashes = [hashlib.sha256() for _ in self.stored]
        self.base_sq = self.task_sq = 0.0

    def seen(self, number: int, part: Tensor) -> None:
        if self.known[number] is None:
            self.hashes[number].update(as_bytes(part))

    def add(self, base: Tensor, tasks: Sequence[Delta]) -> None:
        """Raises NumericError for NaN or Inf."""
        sums = sum_of_squares(base), sum_of_squares(weighted(tasks, self.fine.weights).dense())
        if not all(math.isfinite(s) for s in sums):
            _require_finite(self.name, base, self.stored[0][0].label)
            for task, (checkpoint, _) in zip(tasks, self.stored[1:], strict=True):
                _require_finite(self.name, task.dense(), checkpoint.label)
            raise _not_finite(self.name, self.fine.label)
        self.base_sq, self.task_sq = self.base_sq + sums[0], self.task_sq + sums[1]

    def ended(self, workspace: Workspace) -> TensorStats:
        """Also hashes the rows that only some have."""
        rows, shape = self.fine.rows(self.name), self.fine.layout.spec(self.name).shape
        common = math.prod(shape) if rows is None else rows * math.prod(shape[1:])
        for i, (checkpoint, own) in enumerate(self.stored):
            for part in checkpoint.chunks(own, workspace, "survey.rest", common):
                self.seen(i, part)
        base, model, *others = (
            known or running.hexdigest() for known, running in zip(self.known, self.hashes, strict=True)
        )
        return TensorStats(self.base_sq, self.task_sq, 0.0, 0.0, model, base, others)


def _fused(fine: FineTune, name: str, workspace: Workspace) -> TensorStats:
    """A tensor of several fine-tunes, none of them an adapter, outside the vector: in pieces."""
    tally = Tally(fine, name)
    for base, tasks, _ in fine.pieces(name, None, workspace, tally.seen):
        tally.add(base, tasks)
    return tally.ended(workspace)


def _ahead(checkpoint: Checkpoint, name: str) -> str | None:
    shard, entry = checkpoint.entry(name)
    return ahead.known(shard.fd, entry.offset, entry.spec.nbytes)


def _digest(checkpoint: Checkpoint, name: str, workspace: Workspace) -> str:
    """The SHA-256 of a stored tensor's bytes."""
    found = _ahead(checkpoint, name)
    if found is None:
        spec = checkpoint.spec(name)
        raw = workspace.take("survey.raw", spec.shape, spec.dtype)
        found = sha256(as_bytes(checkpoint.read_into(raw, name)))
    return found


def _whole(fine: FineTune, vector: SafetyVector | None, name: str, workspace: Workspace) -> TensorStats | None:
    """A tensor in the vector, any of an adapter's base, or any of several fine-tunes."""
    in_vector = vector is not None and name in fine.pairing.deltas
    if not in_vector and not fine.changes(name) and not fine.fuses:
        return None
    base, tasks = fine.read(name, workspace)
    model_digest = base_digest = _digest(fine.layout, name, workspace)
    if fine.base is not fine.layout:
        base_digest = _digest(fine.base, fine.pairing.counterparts[name], workspace)
    others = [_digest(checkpoint, own, workspace) for checkpoint, own in fine.stored(name)[2:]]
    base_sq = sum_of_squares(base)
    for one, tuned in zip(tasks, (fine, *fine.others), strict=True):
        if not math.isfinite(one.norm()):
            _require_finite(name, base, fine.base.label)
            raise _not_finite(name, tuned.label)
    task = tasks[0] if not fine.fuses else weighted(tasks, fine.weights)
    task_sq = task.norm() ** 2
    for value, label in ((base_sq, fine.base.label), (task_sq, fine.label)):
        if not math.isfinite(value):
            raise _not_finite(name, label)
    safety_sq = dot = 0.0
    if in_vector:
        assert vector is not None
        delta = fine.safety(name, vector, workspace, check=True)
        safety_sq = delta.norm() ** 2
        if not math.isfinite(safety_sq) or (delta.known is not None and not all_finite(delta.known.s)):
            raise _not_finite(name, vector.label)
        dot = inner(task, delta)
    return TensorStats(base_sq, task_sq, safety_sq, dot, model_digest, base_digest, others)


def weighted(tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """``Σ wᵢτᵢ``."""
    total = tasks[0].dense() * weights[0]
    for task, weight in zip(tasks[1:], weights[1:], strict=True):
        total.add_(task.dense(), alpha=weight)
    return Delta(tuple(total.shape), full=total)


def inner(a: Delta, b: Delta) -> float:
    """⟨a, b⟩ over all entries, without forming a low-rank factor's product."""
    if a.is_zero or b.is_zero:
        return 0.0
    if a.low is not None and b.low is not None:
        value = ((a.low.left.T @ b.low.left) * (a.low.right.T @ b.low.right)).sum()
    elif a.low is not None:
        value = (a.low.left * (b.full @ a.low.right)).sum()  # type: ignore[operator]
    elif b.low is not None:
        value = (b.low.left * (a.full @ b.low.right)).sum()  # type: ignore[operator]
    else:
        x, y = a.full.reshape(-1), b.full.reshape(-1)  # type: ignore[union-attr]
        return a.scale * b.scale * sum(float(p.dot(q)) for p, q in zip(x.split(1 << 16), y.split(1 << 16), strict=True))
    return a.scale * b.scale * float(value)


def _aligned(ours: Iterator[Tensor], theirs: Iterator[Tensor] | None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    while True:
        a = next(ours, None)
        b = None if theirs is None else next(theirs, None)
        if a is None and b is None:
            return
        yield a, b


def _require_finite(name: str, value: Tensor | None, label: str) -> None:
    if value is not None and not all_finite(value):
        raise _not_finite(name, label)


def _not_finite(name: str, label: str) -> NumericError:
    return NumericError(
        f"{name} of {label} holds NaN or Inf", "That model is damaged; train or fetch it again before merging."
    )
