"""The terms of the SafeKey loss, as sums over a batch, and the model that computes them in one forward call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from ..data import IGNORED

LM, QMM, HEAD_U, HEAD_XU = "lm_loss", "qmm_loss", "head_u_loss", "head_xu_loss"
TERMS = (LM, QMM, HEAD_U, HEAD_XU)


@dataclass(frozen=True)
class Weights:
    """L = lm + qmm·QMM + head·(theta·BCE_U + (1 − theta)·BCE_XU). Defaults: the paper's (arXiv:2505.16186).

    Attributes:
        qmm: λ_QMM ≥ 0. head: λ_head ≥ 0. theta: share of the head over U, 0 … 1.
        query: ``masked`` (the method), ``seen`` (the query is not masked), or ``off`` (no such term).
        heads: ``on``, ``detached`` (they learn, the model does not learn from them), or ``off``.
    """

    qmm: float = 0.2
    head: float = 0.2
    theta: float = 0.5
    query: Literal["masked", "seen", "off"] = "masked"
    heads: Literal["on", "detached", "off"] = "on"

    def of(self, *, auxiliary: bool) -> dict[str, float]:
        """The weight of each term that is computed; without ``auxiliary`` the language-modelling loss alone."""
        found = {LM: 1.0}
        if auxiliary and self.query != "off":
            found[QMM] = self.qmm
        if auxiliary and self.heads != "off":
            found |= {HEAD_U: self.head * self.theta, HEAD_XU: self.head * (1 - self.theta)}
        return found


class DualPathHead(nn.Module):
    """Two linear classifiers of mean-pooled last hidden states: over U, and over query and U. In float32.

    Source: the dual-path safety head of arXiv:2505.16186. Seeded, so that every process begins with the same.
    """

    def __init__(self, hidden: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.u, self.xu = nn.Linear(hidden, 1), nn.Linear(hidden, 1)

    def forward(self, hidden: Tensor, understanding: Tensor, query: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Logits [rows] of the two heads, above 0 for harmful.

        Args:
            hidden: [..., hidden]. understanding, query: [...], each token's row, or below 0 for none.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            flat = hidden.float().flatten(0, -2)
            u = understanding.flatten()
            both = torch.where(u >= 0, u, query.flatten())
            own = self.u.weight.dtype  # DeepSpeed trains in bfloat16 by making all weights so
            first, second = (head(pooled(flat, who, rows).to(own)) for head, who in ((self.u, u), (self.xu, both)))
        return first.squeeze(-1).float(), second.squeeze(-1).float()

    def idle(self, hidden: Tensor) -> Tensor:
        """Both heads on a vector of zeros: for a gradient of zero, through their own forward, before which DeepSpeed's
        ZeRO-3 brings their weights together."""
        with torch.autocast(hidden.device.type, enabled=False):
            nothing = hidden.new_zeros(1, hidden.shape[-1], dtype=self.u.weight.dtype)
            return torch.cat([self.u(nothing), self.xu(nothing)])


def pooled(states: Tensor, row_of: Tensor, rows: int) -> Tensor:
    """The mean of ``states`` [tokens, hidden] over the tokens of each row, [rows, hidden]."""
    held = row_of >= 0
    place = row_of[held]
    total = states.new_zeros(rows, states.shape[-1]).index_add(0, place, states[held])
    count = torch.bincount(place, minlength=rows).unsqueeze(-1)
    return total / count


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled tokens of −log p(token | what is before it), in float32.

    Args:
        logits: [rows, tokens, vocabulary]. labels: int64 [rows, tokens]; a label is predicted one position earlier.
    """
    wanted = labels[:, 1:] != IGNORED
    return functional.cross_entropy(logits[:, :-1][wanted].float(), labels[:, 1:][wanted], reduction="sum")


class SafeKeyModel(nn.Module):
    """A causal LM with a dual-path head whose forward gives the summed terms of one batch.

    Both passes are in one call, so that DDP and FSDP see one forward before the backward. Every parameter takes part in
    every call, with a gradient of zero where its term is not wanted, so none is looked for.

    Raises:
        ConfigError: the model takes no position ids, or hides its decoder.
    """

    accepts_loss_kwargs = True
    """To the Trainer: the loss is divided by the whole step's counts, not again by the accumulation steps."""

    def __init__(self, model: Any, head: DualPathHead, weights: Weights) -> None:
        super().__init__()
        if "position_ids" not in inspect.signature(model.forward).parameters or model.base_model is model:
            raise ConfigError(
                f"{type(model).__name__} cannot be trained by SafeKey: it takes no position_ids, or hides its decoder",
                "Use a decoder with rotary or learned positions, such as Llama, Qwen, Mistral or Phi.",
            )
        self.model = model
        self.head = head
        self.weights = weights

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def _no_split_modules(self) -> Any:
        """Which modules FSDP wraps."""
        return self.model._no_split_modules

    def forward(self, batch: Mapping[str, Any], *, auxiliary: bool) -> dict[str, Tensor]:
        """The wanted terms, each a sum: over tokens for ``lm_loss`` and ``qmm_loss``, over rows for the heads.

        Args:
            batch: of ``batches.Collator``. auxiliary: all terms, else the language-modelling loss alone.
        """
        wanted = self.weights.of(auxiliary=auxiliary)
        hidden, logits = self._run(batch["main"])
        found = {LM: token_loss(logits, batch["labels"])}
        if QMM in wanted and self.weights.query == "seen":
            found[QMM] = token_loss(logits, batch["key_labels"])
        elif QMM in wanted:
            found[QMM] = token_loss(self._run(batch["masked"])[1], batch["masked_labels"])
        if HEAD_U in wanted:
            states = hidden.detach() if self.weights.heads == "detached" else hidden
            harmful = batch["harmful"]
            scores = self.head(states, batch["understanding_rows"], batch["query_rows"], len(harmful))
            for name, score in zip((HEAD_U, HEAD_XU), scores, strict=True):
                found[name] = functional.binary_cross_entropy_with_logits(score, harmful, reduction="sum")
        else:
            found[LM] = found[LM] + 0.0 * self.head.idle(hidden).sum()
        return found

    def _run(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Last hidden states [rows, tokens, hidden] (after the final norm) and logits, of all tokens or the last."""
        given = dict(inputs)
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() == 4 and self.config._attn_implementation == "eager":
            given["attention_mask"] = torch.zeros(mask.shape, device=mask.device).masked_fill(
                ~mask, torch.finfo(torch.float32).min
            )
        seen: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(lambda module, given, found: seen.append(found[0]))
        try:
            logits = self.model(**given, use_cache=False).logits
        finally:
            hook.remove()
        return seen[0], logits
