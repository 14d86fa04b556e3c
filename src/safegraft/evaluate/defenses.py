"""Defences at inference time, to compare with: each wraps a ChatModel and is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError, MismatchError
from .models.hf import HfChatModel
from .records import ChatModel, Conversation, Message, Reply, Sampling

BEFORE = (
    "Please remember that you are a responsible assistant: you do not write anything that is harmful or misleading. "
    "Answer the following in that spirit.\n\n"
)
AFTER = "\n\nRemember: answer as a responsible assistant, and write nothing harmful or misleading."


class _Rewording(ABC):
    """A ChatModel that is asked something else than it was given."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model

    @abstractmethod
    def reworded(self, conversation: Conversation) -> Conversation:
        """What is asked instead."""

    def replies(self, batch: Sequence[Conversation], sampling: Sampling) -> list[Reply]:
        return self.model.replies([self.reworded(conversation) for conversation in batch], sampling)


class SelfReminder(_Rewording):
    """The last user turn stands between two reminders to be responsible; all else is as it was.

    Source: Xie et al. 2023, Nature Machine Intelligence 5, 1486 (Self-Reminder); the wording is ours.
    """

    def reworded(self, conversation: Conversation) -> Conversation:
        asked = [i for i, message in enumerate(conversation) if message.role == "user"]
        if not asked:
            return conversation
        at = asked[-1]
        return (
            *conversation[:at],
            Message("user", BEFORE + conversation[at].content + AFTER),
            *conversation[at + 1 :],
        )


class SystemPrompt(_Rewording):
    """``text`` as the system message, or in front of the one that is there."""

    def __init__(self, model: ChatModel, text: str) -> None:
        super().__init__(model)
        self.text = text

    def reworded(self, conversation: Conversation) -> Conversation:
        if conversation and conversation[0].role == "system":
            return (Message("system", f"{self.text}\n\n{conversation[0].content}"), *conversation[1:])
        return (Message("system", self.text), *conversation)


def self_reminder(model: ChatModel) -> ChatModel:
    """``model`` with reminders round the last user turn."""
    return SelfReminder(model)


def system_prompt(model: ChatModel, text: str) -> ChatModel:
    """``model`` with a system prompt. Raises ConfigError where ``text`` is empty."""
    if not text.strip():
        raise ConfigError("a defence by system prompt needs its text")
    return SystemPrompt(model, text)


def guarded(base: torch.Tensor, expert: torch.Tensor, c: int, alpha: float) -> torch.Tensor:
    """SafeDecoding's distribution over the next token.

    The tokens allowed are those among the k most likely of both models, with the smallest k for which there are at
    least ``c``. Each has ``base + alpha · (expert − base)``, at least 0, and all are scaled to sum to 1. Where none is
    above 0 (the paper does not say), the expert's probabilities are taken.

    Args:
        base, expert: probabilities [rows, vocabulary]. c: 1 … vocabulary.

    Source: Xu et al. 2024 (SafeDecoding), arXiv:2402.08983.
    """
    ranks = [p.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) for p in (base, expert)]
    worse = torch.maximum(*ranks)
    k = worse.sort(dim=-1).values[:, c - 1 : c]
    allowed = worse <= k
    mixed = torch.where(allowed, base + alpha * (expert - base), 0).clamp(min=0)
    total = mixed.sum(dim=-1, keepdim=True)
    alone = torch.where(allowed, expert, 0)
    return torch.where(total > 0, mixed / total.clamp(min=1e-30), alone / alone.sum(dim=-1, keepdim=True))


class SafeDecoding(HfChatModel):
    """The first ``m`` tokens are chosen with a safety expert's help, the rest by ``model`` alone.

    Args:
        model: the causal LM to defend. expert: one of the same vocabulary, fine-tuned to refuse. tokenizer: with a chat
            template. m, c, alpha: the paper's, with its defaults. seed: for temperatures above 0.

    Raises:
        ConfigError: ``m`` below 0, ``c`` outside 1 … vocabulary, or ``alpha`` below 0.
        MismatchError: the models' vocabularies differ in size.

    Source: Xu et al. 2024, arXiv:2402.08983.
    """

    def __init__(
        self,
        model: Any,
        expert: Any,
        tokenizer: Any,
        *,
        m: int = 2,
        c: int = 5,
        alpha: float = 3.0,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, batch=batch)
        sizes = [part.get_output_embeddings().weight.shape[0] for part in (model, expert)]
        if sizes[0] != sizes[1]:
            raise MismatchError(
                f"the expert has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}",
                "SafeDecoding needs an expert made from the same model.",
            )
        if m < 0 or not 1 <= c <= sizes[0] or alpha < 0:
            raise ConfigError(
                f"SafeDecoding cannot run with m = {m}, c = {c}, alpha = {alpha}", "The paper has 2, 5 and 3."
            )
        self.expert = expert.eval()
        self.m, self.c, self.alpha, self.seed = m, c, alpha, seed

    def replies(self, batch: Sequence[Conversation], sampling: Sampling) -> list[Reply]:
        """As HfChatModel's; the same for the same seed and batch size."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return super().replies(batch, sampling)

    def _opening(self, prompts: Sequence[list[int]]) -> None:
        """Nothing is shared between prompts."""
        return None

    def _may_pause(self) -> bool:
        """Two models' caches are kept, so a batch stays as it is."""
        return False

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, opening: Any = None) -> list[Reply]:
        stops = self._stops()
        longest = max(map(len, prompts))
        rows = [[stops[0]] * (longest - len(p)) + p for p in prompts]
        ids = torch.tensor(rows, device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        caches: list[Any] = [None, None]
        steps = min(self.m, sampling.max_new_tokens)
        for _ in range(steps):
            found = []
            for i, part in enumerate((self.model, self.expert)):
                probabilities, caches[i] = self._next(part, ids, mask, caches[i], sampling.temperature)
                found.append(probabilities.to(ids.device))
            both = guarded(found[0], found[1], self.c, self.alpha)
            chosen = torch.multinomial(both, 1) if sampling.temperature > 0 else both.argmax(dim=-1, keepdim=True)
            ids, mask = torch.cat([ids, chosen], dim=1), torch.cat([mask, torch.ones_like(chosen)], dim=1)
        if sampling.max_new_tokens > steps:
            left = sampling.max_new_tokens - steps
            ids = self._made(ids, mask, caches[0], left, sampling.temperature).sequences
        return [self._reply(row, stops) for row in ids[:, longest:].tolist()]

    @staticmethod
    def _next(
        part: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, temperature: float
    ) -> tuple[torch.Tensor, Any]:
        """Probabilities [rows, vocabulary] of the next token, and the cache with everything seen so far."""
        seen = cache.get_seq_length() if cache is not None else 0
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = part(
            input_ids=ids[:, seen:].to(part.device),
            attention_mask=mask.to(part.device),
            position_ids=places[:, seen:].to(part.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        return torch.softmax(logits / temperature if temperature > 0 else logits, dim=-1), out.past_key_values
