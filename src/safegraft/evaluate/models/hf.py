"""A transformers model in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ...errors import CheckpointError, ConfigError
from ..records import Conversation, Reply, Sampling
from ..thinking import OPEN

SHARED = 8
"""Tokens that all prompts must have in common before it pays to run them once."""
STAGE = 32
"""Tokens after which a batch is looked through for answers that have ended."""


def load_chat(folder: str | Path) -> tuple[Any, Any]:
    """Model (float32, on a GPU where there is one) and tokenizer of a chat model: a folder, or a Hub id.

    Raises:
        CheckpointError: transformers cannot load it, or it has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(f"{folder} has no chat template", "Give a chat model, or set tokenizer.chat_template.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


@dataclass(frozen=True)
class _Opening:
    """The first ``size`` tokens of every prompt and their keys and values, one row."""

    size: int
    cache: DynamicCache

    def repeated(self, rows: int) -> DynamicCache:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def _attends_to_all(config: Any) -> bool:
    """Whether every layer sees every earlier token, so that padding after a shared opening changes no distance."""
    kinds = getattr(config, "layer_types", None)
    return all(kind == "full_attention" for kind in kinds) if kinds else not getattr(config, "sliding_window", None)


def _reopened(reply: Reply, prompt: str) -> Reply:
    """``reply`` with the opening tag of the reasoning before it, where ``prompt`` ended with that."""
    return replace(reply, text=f"{OPEN}\n{reply.text}") if prompt.rstrip().endswith(OPEN) else reply


class HfChatModel:
    """Answers conversations in batches, the same as one at a time up to float rounding.

    Prompts are sorted by length so that little is padded, padded on the left and masked; what they all begin with (a
    system prompt, usually) is run once, and answers that have ended leave the batch. They come back in the order asked.

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
        """One reply for each conversation. Where that ends with the assistant's turn, the reply is what comes after it,
        with the spaces it begins with.

        Where the chat template opens the reasoning, as those of many reasoning models do, the reply begins with the tag
        that the prompt ended with, so that what is reasoning shows in the reply alone.

        Raises:
            ConfigError: ``max_new_tokens`` below 1, a temperature below 0, or a begun answer that the model's chat
                template drops.
        """
        if sampling.max_new_tokens < 1 or sampling.temperature < 0:
            raise ConfigError(f"cannot decode with {sampling}")
        prompts = [self._ids(conversation) for conversation in batch]
        begun = [bool(conversation) and conversation[-1].role == "assistant" for conversation in batch]
        opening = self._opening(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        found: dict[int, Reply] = {}
        for start in range(0, len(order), self.batch):
            group = order[start : start + self.batch]
            found.update(zip(group, self._generate([prompts[i] for i in group], sampling, opening), strict=True))
            if self.progress:
                self.progress(len(found), len(prompts))
        told = [replace(r, text=r.text.rstrip() if begun[i] else r.text.strip()) for i, r in sorted(found.items())]
        return [_reopened(reply, self._text(asked)) for reply, asked in zip(told, batch, strict=True)]

    def _ids(self, conversation: Conversation) -> list[int]:
        return list(self.tokenizer(self._text(conversation), add_special_tokens=False)["input_ids"])

    def _text(self, conversation: Conversation) -> str:
        turns = [asdict(message) for message in conversation]
        begun = bool(turns) and turns[-1]["role"] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
                )
            )
        except ValueError as error:
            if not begun:
                raise
            raise ConfigError(
                "the model's chat template lets no answer be begun for it", "Leave out attacks by prefilling."
            ) from error

    @torch.inference_mode()
    def _opening(self, prompts: Sequence[list[int]]) -> _Opening | None:
        """What all prompts begin with, run through the model once; None where that saves little or cannot be reused."""
        if len(prompts) < 2 or not _attends_to_all(self.model.config):
            return None
        first, last = min(prompts), max(prompts)
        size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first) - 1)
        size = min(size, *(len(p) - 1 for p in prompts))
        if size < SHARED:
            return None
        ids = torch.tensor([first[:size]], device=self.model.device)
        cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        return _Opening(size, cache) if isinstance(cache, DynamicCache) else None

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, opening: _Opening | None) -> list[Reply]:
        stops = self._stops()
        pad = self.tokenizer.pad_token_id
        pad = stops[0] if pad is None else pad
        longest, shared = max(map(len, prompts)), opening.size if opening else 0
        gaps = [longest - len(p) for p in prompts]
        rows = [p[:shared] + [pad] * gap + p[shared:] for p, gap in zip(prompts, gaps, strict=True)]
        masks = [[1] * shared + [0] * gap + [1] * (longest - shared - gap) for gap in gaps]
        made = self._complete(
            torch.tensor(rows, device=self.model.device),
            torch.tensor(masks, device=self.model.device),
            opening.repeated(len(prompts)) if opening else None,
            sampling.max_new_tokens,
            sampling.temperature,
            pad,
        )
        return [self._reply(row, stops) for row in made]

    def _complete(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, tokens: int, temperature: float, pad: int
    ) -> list[list[int]]:
        """What the model writes after each row of ``ids`` [rows, length], at most ``tokens``, with the end token where
        there is one. Rows that have ended leave the batch every ``STAGE`` tokens, where the model lets them.

        Args:
            mask: 0 where a row is padded, [rows, length]. cache: of all but the last columns of ``ids``, or None.
        """
        stops = self._stops()
        chosen: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            chosen = {"do_sample": True, "temperature": temperature}
        stage = STAGE if self._may_stop_and_go_on() else tokens
        found: list[list[int]] = [[] for _ in ids]
        going = list(range(len(ids)))
        while True:
            width = ids.shape[1]
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(stage, tokens),
                pad_token_id=pad,
                eos_token_id=stops,
                past_key_values=cache,
                return_dict_in_generate=True,
                **chosen,
            )
            tokens -= stage
            for row, new in zip(going, made.sequences[:, width:].tolist(), strict=True):
                found[row] += new
            kept = [i for i, row in enumerate(going) if not set(stops) & set(found[row])]
            if tokens <= 0 or not kept:
                return found
            rows, cache = torch.tensor(kept, device=ids.device), made.past_key_values
            if not isinstance(cache, DynamicCache):
                cache = None
            elif len(kept) < len(going):
                cache.batch_select_indices(rows)
            going = [going[i] for i in kept]
            ids = made.sequences[rows]
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - width)], dim=1)[rows]

    def _may_stop_and_go_on(self) -> bool:
        """Whether generating in stages gives what generating at once does: every layer sees all of its row, and no
        setting counts from where the generation began."""
        settings = self.model.generation_config
        counting = ("min_new_tokens", "begin_suppress_tokens", "forced_eos_token_id", "cache_implementation")
        return _attends_to_all(self.model.config) and not any(getattr(settings, name, None) for name in counting)

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
        return Reply(self.tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)
