"""A transformers model in this process."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ...errors import CheckpointError, ConfigError
from ...hardware import memory_of
from ..records import Conversation, Reply, Sampling
from ..thinking import OPEN
from .rolling import Rolling, can_roll

SHARED = 8
"""Tokens that all prompts must have in common before it pays to run them once."""
MOST = 160
"""Conversations at a time at most, where nobody said how many."""
SHARE = 0.25
"""Of the device's memory, for what a batch needs, where nobody said how large it may be."""
STAGE = 16
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
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    return all(kind == "full_attention" for kind in kinds) if kinds else not getattr(config, "sliding_window", None)


def _bytes_per_token(model: Any) -> int:
    """What a token of a conversation takes in memory: keys and values in every layer, and the widest activations."""
    config = model.config.get_text_config(decoder=True)

    def largest(name: str, otherwise: int) -> int:
        value = getattr(config, name, None) or otherwise  # some families have a list, by layer
        return max(value) if isinstance(value, list | tuple) else int(value)

    hidden = largest("hidden_size", 1)
    heads = largest("num_attention_heads", 1)  # models without attention have none
    kept = 2 * config.num_hidden_layers * largest("num_key_value_heads", heads) * largest("head_dim", hidden // heads)
    passing = 4 * (hidden + largest("intermediate_size", 4 * hidden))
    return int((kept + passing) * model.dtype.itemsize)


def _reopened(reply: Reply, prompt: str) -> Reply:
    """``reply`` with the opening tag of the reasoning before it, where ``prompt`` ended with that."""
    return replace(reply, text=f"{OPEN}\n{reply.text}") if prompt.rstrip().endswith(OPEN) else reply


class HfChatModel:
    """Answers conversations in batches, the same as one at a time up to float rounding.

    Prompts are sorted by length so that little is padded, padded on the left and masked; what they all begin with (a
    system prompt, usually) is run once. Answers that have ended leave the batch and others join it, where the model's
    cache lets them. They come back in the order asked.

    Args:
        model: a causal LM; it is put into eval mode. tokenizer: with a chat template.
        batch: conversations at a time, ≥ 1; None: as many as about a quarter of the device's memory holds, at most 160.
            progress: called with (answered, in all).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if batch is not None and batch < 1:
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
        answer = self._rolling if self._may_pause() else self._in_batches
        size = self.batch or self._fitting(max(map(len, prompts), default=0) + sampling.max_new_tokens)
        for made in answer(order, prompts, sampling, opening, size):
            found.update(made)
            if self.progress and made:
                self.progress(len(found), len(prompts))
        told = [replace(r, text=r.text.rstrip() if begun[i] else r.text.strip()) for i, r in sorted(found.items())]
        return [_reopened(reply, self._text(asked)) for reply, asked in zip(told, batch, strict=True)]

    def _fitting(self, columns: int) -> int:
        """Rows of so many tokens that have room in the device's memory beside the model."""
        room = SHARE * memory_of(self.model.device)
        return max(1, min(MOST, int(room / (columns * _bytes_per_token(self.model)))))

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

    def _in_batches(
        self,
        order: Sequence[int],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        opening: _Opening | None,
        size: int,
    ) -> Iterator[dict[int, Reply]]:
        """The replies by place in ``prompts``, ``size`` at a time."""
        for start in range(0, len(order), size):
            group = order[start : start + size]
            said = self._generate([prompts[i] for i in group], sampling, opening)
            yield dict(zip(group, said, strict=True))

    def _rolling(
        self,
        order: Sequence[int],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        opening: _Opening | None,
        size: int,
    ) -> Iterator[dict[int, Reply]]:
        """The replies by place in ``prompts``, as they end. Whenever a quarter of ``size`` is free, others join."""
        waiting, stops, going = deque(order), self._stops(), None
        while waiting or going:
            room = size - (len(going.places) if going else 0)
            if waiting and 4 * room >= size:
                group = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                ids, mask, cache = self._padded([prompts[i] for i in group], opening)
                fresh = self._further(Rolling(ids, mask, cache, group, [0] * len(group)), 1, sampling)
                if not can_roll(fresh.cache):
                    yield from self._in_batches([*group, *waiting], prompts, sampling, opening, size)
                    return
                going = going.joined(fresh) if going else fresh.with_room()
            elif going:
                left = sampling.max_new_tokens - max(going.made)
                going = self._further(going, min(STAGE, left), sampling)
            assert going
            said = [going.answer(row) for row in range(len(going.places))]
            still = [row for row, ids in enumerate(said)
                     if len(ids) < sampling.max_new_tokens and not set(ids) & set(stops)]  # fmt: skip
            ended = [row for row in range(len(said)) if row not in still]
            yield {going.places[row]: self._reply(said[row], stops) for row in ended}
            if ended:
                going = going.kept(still) if still else None

    def _may_pause(self) -> bool:
        """Whether generating in stages gives what generating at once does: every layer sees all of its row, and no
        setting counts from where the generation began."""
        settings = self.model.generation_config
        counting = ("min_new_tokens", "begin_suppress_tokens", "forced_eos_token_id", "cache_implementation")
        return _attends_to_all(self.model.config) and not any(getattr(settings, name, None) for name in counting)

    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, opening: _Opening | None) -> list[Reply]:
        ids, mask, cache = self._padded(prompts, opening)
        made = self._made(ids, mask, cache, sampling.max_new_tokens, sampling.temperature).sequences
        return [self._reply(row, self._stops()) for row in made[:, ids.shape[1] :].tolist()]

    def _further(self, going: Rolling, tokens: int, sampling: Sampling) -> Rolling:
        made = self._made(going.ids, going.mask, going.cache, tokens, sampling.temperature)
        return going.longer(made.sequences, made.past_key_values)

    def _padded(
        self, prompts: Sequence[list[int]], opening: _Opening | None
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache | None]:
        """Token ids and mask [prompts, longest], padded after what all begin with, and the cache of that."""
        longest, shared = max(map(len, prompts)), opening.size if opening else 0
        gaps, pad = [longest - len(p) for p in prompts], self._pad()
        rows = [p[:shared] + [pad] * gap + p[shared:] for p, gap in zip(prompts, gaps, strict=True)]
        masks = [[1] * shared + [0] * gap + [1] * (longest - shared - gap) for gap in gaps]
        ids, mask = (torch.tensor(each, device=self.model.device) for each in (rows, masks))
        return ids, mask, opening.repeated(len(prompts)) if opening else None

    @torch.inference_mode()
    def _made(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, tokens: int, temperature: float) -> Any:
        """``sequences`` [rows, length and at most ``tokens`` more], and the cache with all but the last column."""
        chosen: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            chosen = {"do_sample": True, "temperature": temperature}
        return self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            pad_token_id=self._pad(),
            eos_token_id=self._stops(),
            past_key_values=cache,
            num_beams=1,
            return_dict_in_generate=True,
            **chosen,
        )

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self._stops()[0] if pad is None else int(pad)

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
