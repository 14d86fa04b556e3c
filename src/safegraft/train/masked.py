"""A frozen causal LM under masked changes, and what DPO reads off it (SOMF, arXiv:2405.09055).

At every forward pass each masked weight is ``W_b + change(m/mean(m))`` with a fresh draw of m, put into the model's
place by torch.func.functional_call; nothing of the model itself moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..tensors.masking import Grain, Kind, Logits, deployed, relaxed
from ..tensors.randomness import generator
from .data import PadRight
from .finetune import pad_id, skips_logits
from .preferences import EncodedPair

Weights = dict[str, Tensor]


class Change(Protocol):
    """The fused change of one weight under masks, on the model's device.

    ``masked``: the shapes that get logits, under the suffix of their name ("" for the weight itself).
    """

    @property
    def masked(self) -> Mapping[str, tuple[int, ...]]: ...

    def __call__(self, gates: Sequence[Tensor] | None) -> Tensor:
        """The change, shaped as the weight, under one m/mean(m) for each of ``masked``, differentiable in them; the
        plain one where they are None."""
        ...


class MaskedModel(nn.Module):
    """A frozen causal LM whose weights are its own plus masked changes; its parameters are the masks' logits alone.

    Args:
        model: the aligned model; it is not changed. changes: by parameter name. fixed: parameters that are replaced
            whole (what is fused without a mask). temperature: T of the draws. seed: of the draws. dtype: of the logits,
            which start at 0.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        changes: Mapping[str, Change],
        fixed: Weights,
        grain: Grain,
        *,
        temperature: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._frozen = (model.eval().requires_grad_(False),)  # in a tuple, it is no submodule: never saved, never moved
        self._own = dict(model.named_parameters())
        self.changes, self.fixed, self.grain = changes, fixed, grain
        self.temperature, self.seed = temperature, seed
        self.keys = [(name, suffix) for name, change in changes.items() for suffix in change.masked]
        device = next(iter(self._own.values())).device
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros(grain.shape(tuple(changes[n].masked[s])), dtype=dtype, device=device))
            for n, s in self.keys
        )

    @property
    def frozen(self) -> nn.Module:
        return self._frozen[0]

    def named_logits(self) -> Weights:
        """The logits by weight and suffix."""
        return {name + suffix: p.detach() for (name, suffix), p in zip(self.keys, self.logits, strict=True)}

    def drawn(self, draw: str) -> Weights:
        """Every weight under a fresh mask; ``draw`` names the draw, and with the seed decides it.

        What the backward pass needs of a mask is worked out again then, by the same draw, and not kept till then.
        """

        def mask(key: str, logits: Tensor) -> Tensor:
            return relaxed(logits, self.temperature, generator(self.seed, f"{draw}/{key}", logits.device))

        return {
            name: checkpoint(self._weight, name, mask, *own, use_reentrant=False, preserve_rng_state=False)
            for name, own in self._by_weight()
        } | self.fixed

    @torch.no_grad()
    def deployed(self, kind: Kind) -> Weights:
        """Every weight as it is deployed: under σ(s), or σ(s) > ½."""
        own = self._by_weight()
        return {n: self._weight(n, lambda _, s: deployed(s, kind), *s) for n, s in own} | self.fixed

    @torch.no_grad()
    def plain(self) -> Weights:
        """Every weight under no mask: the plain fusion."""
        return {n: self._sum(n, change(None)) for n, change in self.changes.items()} | self.fixed

    @contextmanager
    def installed(self, weights: Weights) -> Iterator[nn.Module]:
        """The frozen model with ``weights`` in the place of its own, to generate with; {}: the aligned one."""
        own = {name: self._own[name].data for name in weights}
        try:
            for name, weight in weights.items():
                self._own[name].data = weight
            yield self.frozen
        finally:
            for name, weight in own.items():
                self._own[name].data = weight

    def log_probs(self, weights: Weights, batch: Mapping[str, Any]) -> Tensor:
        """Log-probability of each row's answer [rows], in nats, of the model with ``weights``; {}: the aligned one."""
        labels = batch["labels"][:, 1:]
        given = {k: v for k, v in batch.items() if k != "labels"}
        logits = functional_call(self.frozen, weights, kwargs={**given, "use_cache": False}).logits[:, :-1].float()
        return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)

    def forward(self, batch: Mapping[str, Any], draw: str) -> Tensor:
        return self.log_probs(self.drawn(draw), batch)

    def _by_weight(self) -> list[tuple[str, list[Tensor]]]:
        held = dict(zip(self.keys, self.logits, strict=True))
        return [(name, [held[name, suffix] for suffix in change.masked]) for name, change in self.changes.items()]

    def _weight(self, name: str, mask: Callable[[str, Tensor], Tensor], *logits: Tensor) -> Tensor:
        change, gates = self.changes[name], []
        for (suffix, shape), own in zip(change.masked.items(), logits, strict=True):
            gates.append(Logits(own, tuple(shape), self.grain).gate(mask(name + suffix, own)))
        return self._sum(name, change(gates))

    def _sum(self, name: str, change: Tensor) -> Tensor:
        base = self._own[name]
        return (base.float() + change.float()).to(base.dtype)


def dpo_loss(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """``−log σ(β·[(log π_c − log π_r) − (ref_c − ref_r)])``, the mean over n pairs (DPO, arXiv:2305.18290, eq. 7).

    Args:
        log_probs: [2n], the chosen answers' first, in nats. reference: [2, n], the reference's.
    """
    chosen, rejected = log_probs.chunk(2)
    return -F.logsigmoid(beta * ((chosen - rejected) - (reference[0] - reference[1]))).mean()


class PairCollator:
    """Pairs -> one batch of 2n rows, the chosen first, and the reference's log-probabilities [2, n]."""

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        self.pad = PadRight(pad_id(tokenizer), from_first_label=skips_logits(model))

    def __call__(self, items: Sequence[tuple[EncodedPair, Sequence[float]]]) -> dict[str, Any]:
        rows = [*(pair.chosen for pair, _ in items), *(pair.rejected for pair, _ in items)]
        batch = self.pad([{"input_ids": row.ids, "labels": row.labels} for row in rows])
        return {"batch": batch, "reference": torch.tensor([known for _, known in items]).T}


@torch.no_grad()
def pair_log_probs(
    masked: MaskedModel,
    tokenizer: Any,
    weights: Weights,
    pairs: Sequence[EncodedPair],
    *,
    at_a_time: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float]]:
    """``(log p of the chosen answer, of the rejected one)`` for each pair, of the model with ``weights``."""
    collate, device = PairCollator(tokenizer, masked.frozen), next(masked.frozen.parameters()).device
    found: dict[int, tuple[float, float]] = {}
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].chosen.ids) + len(pairs[i].rejected.ids))
    for start in range(0, len(order), at_a_time):
        group = order[start : start + at_a_time]
        batch = collate([(pairs[i], (0.0, 0.0)) for i in group])["batch"]
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        chosen, rejected = masked.log_probs(weights, batch).chunk(2)
        found.update(zip(group, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        if progress:
            progress(len(found), len(order))
    return [found[i] for i in range(len(pairs))]
