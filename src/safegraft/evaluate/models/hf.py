"""A transformers model in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...errors import ConfigError
from ..records import Conversation, Reply, Sampling


class HfChatModel:
    """Answers conversations in batches, the same as one at a time up to float rounding.

    Prompts are sorted by length so that little is padded, padded on the left and masked; answers come back in the
    order asked.

    Args:
        model: a causal LM; it is put into eval mode. tokenizer: with a chat template.
        batch: conversations at a time, ≥ 1. progress: called with (answered, in all).
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch: int = 32, progress: Callable[[int, int], None] | None = None
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch {batch} is below 1")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch = batch
        self.progress = progress

    def replies(self, batch: Sequence[Conversation], sampling: Sampling) -> list[Reply]:
        """One reply for each conversation.

        Raises:
            ConfigError: ``max_new_tokens`` below 1, or a temperature below 0.
        """
        if sampling.max_new_tokens < 1 or sampling.temperature < 0:
            raise ConfigError(f"cannot decode with {sampling}")
        prompts = [self._ids(conversation) for conversation in batch]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        found: dict[int, Reply] = {}
        for start in range(0, len(order), self.batch):
            group = order[start : start + self.batch]
            found.update(zip(group, self._generate([prompts[i] for i in group], sampling), strict=True))
            if self.progress:
                self.progress(len(found), len(prompts))
        return [found[i] for i in range(len(prompts))]

    def _ids(self, conversation: Conversation) -> list[int]:
        turns = [asdict(message) for message in conversation]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Reply]:
        stops = self._stops()
        pad = self.tokenizer.pad_token_id
        pad = stops[0] if pad is None else pad
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature}
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=stops,
            **chosen,
        )
        return [self._reply(row, stops) for row in made[:, longest:].tolist()]

    def _stops(self) -> list[int]:
        known = getattr(self.model.generation_config, "eos_token_id", None)
        listed = known if isinstance(known, list) else [known]
        stops = [t for t in [*listed, self.tokenizer.eos_token_id] if t is not None]
        if not stops:
            raise ConfigError("neither the model nor its tokenizer names a token that ends an answer")
        return sorted(set(stops))

    def _reply(self, ids: list[int], stops: list[int]) -> Reply:
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        kept = ids if end is None else ids[:end]
        return Reply(self.tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), end is not None)
