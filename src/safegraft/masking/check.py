"""What a learnt mask does on pairs that were held out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..train.masked import MaskedModel, Weights, dpo_loss, pair_log_probs
from ..train.preferences import EncodedPair


@dataclass(frozen=True)
class Look:
    """One model on the held-out pairs. ``margin``: mean of log p(chosen) − log p(rejected), in nats; ``preferred``:
    share of pairs where that is above 0; ``loss``: DPO's, against the reference."""

    margin: float
    preferred: float
    loss: float


@dataclass(frozen=True)
class Check:
    """The aligned model, the plain fusion and the two masked ones on the same ``pairs``."""

    pairs: int
    aligned: Look
    fused: Look
    continuous: Look
    binary: Look

    def to_json(self) -> dict[str, Any]:
        return {"pairs": self.pairs} | {name: vars(look) for name, look in self.looks().items()}

    def looks(self) -> dict[str, Look]:
        return {"aligned": self.aligned, "fused": self.fused, "continuous": self.continuous, "binary": self.binary}


def check(
    masked: MaskedModel,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    reference: Sequence[Sequence[float]],
    beta: float,
    at_a_time: int,
    progress: Callable[[int, int], None],
) -> Check:
    """Measure all four on ``pairs``, at least one."""
    made: list[Callable[[], Weights]] = [
        dict, masked.plain, lambda: masked.deployed("continuous"), lambda: masked.deployed("binary"),
    ]  # fmt: skip
    looks = []
    for i, weights in enumerate(made):
        found = pair_log_probs(
            masked, tokenizer, weights(), pairs, at_a_time=at_a_time,
            progress=lambda done, total, i=i: progress(i * total + done, len(made) * total),  # type: ignore[misc]
        )  # fmt: skip
        margins = [chosen - rejected for chosen, rejected in found]
        sides = torch.tensor(found).T.reshape(-1)
        loss = float(dpo_loss(sides, torch.tensor(reference).T, beta))
        looks.append(Look(statistics.fmean(margins), sum(m > 0 for m in margins) / len(margins), loss))
    return Check(len(pairs), *looks)


def findings(found: Check) -> list[str]:
    """Sentences for the user where the mask did not learn what it should."""
    best = max(found.continuous.margin, found.binary.margin)
    if best > found.fused.margin:
        return []
    return [
        f"neither masked model prefers the chosen answers more than the plain fusion does on {found.pairs} held-out "
        f"pairs (margin {best:+.2f} against {found.fused.margin:+.2f} nats): raise --steps or --lr, or look at them"
    ]
