"""Rows of a batch that come and go: an answer that ends leaves it, and a waiting conversation joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Columns by which a layer that is full grows."""


def can_roll(cache: Any) -> bool:
    """Whether rows of a cache can be taken out and put together: every layer keeps all keys and values, by token."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


class Roomy(DynamicLayer):  # type: ignore[misc]
    """A layer that keeps room behind its keys and values [rows, heads, length, size], so that a token more is written
    where it belongs instead of copying all that is held.

    Args:
        filled: a layer that holds something.
    """

    def __init__(self, filled: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.hold(filled.keys, filled.values)

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """These, in place of what is held, which is let go."""
        self.keys, self.values = keys, values
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seen: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``DynamicLayer.update``. What this or an earlier call returned stays as it is until rows are replaced."""
        begin, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self._whole is None or self.keys is not self._seen or end > self._whole[0].shape[-2]:
            self._whole = (_with_room(self.keys, end), _with_room(self.values, end))
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[..., begin:end, :] = new
        self.keys, self.values = (whole[..., :end, :] for whole in self._whole)
        self._seen = self.keys
        return self.keys, self.values


def _with_room(part: torch.Tensor, length: int) -> torch.Tensor:
    """``part`` at the beginning of a tensor with more than ``length`` columns; the others hold anything."""
    whole = part.new_empty(*part.shape[:-2], length + ROOM, part.shape[-1])
    whole[..., : part.shape[-2], :] = part
    return whole


@dataclass
class Rolling:
    """Rows under way, padded on the left.

    Args:
        ids, mask: [rows, length]. cache: keys and values of all columns but the last, if anything
            is held; it is changed in place.
        places: which conversation each row is. made: how many of its last tokens are the answer's.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    cache: Any
    places: list[int]
    made: list[int]

    def answer(self, row: int) -> list[int]:
        """The tokens made so far."""
        return self.ids[row, -self.made[row] :].tolist()

    def with_room(self) -> Rolling:
        """The same rows, whose cache grows without being copied at every token. The cache can roll."""
        self.cache.layers = [Roomy(layer) for layer in self.cache.layers]
        return self

    def longer(self, ids: torch.Tensor, cache: Any) -> Rolling:
        """After ``ids`` [rows, length + n] were made of these rows."""
        new = ids.shape[1] - self.ids.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(ids), new)], dim=1)
        return Rolling(ids, mask, cache, self.places, [made + new for made in self.made])

    def kept(self, rows: Sequence[int]) -> Rolling:
        """These rows alone, in this order, without the columns that are padding in all of them."""
        chosen = torch.tensor(rows, device=self.ids.device)
        mask = self.mask[chosen]
        spare = int(mask.any(dim=0).int().argmax())
        for layer in self.cache.layers:
            layer.hold(*(part[chosen.to(part.device), :, spare:] for part in (layer.keys, layer.values)))
        places, made = [self.places[row] for row in rows], [self.made[row] for row in rows]
        return Rolling(self.ids[chosen, spare:], mask[:, spare:], self.cache, places, made)

    def joined(self, other: Rolling) -> Rolling:
        """The rows of both, the shorter ones padded on the left."""
        length = max(self.ids.shape[1], other.ids.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            pairs = ((mine.keys, theirs.keys), (mine.values, theirs.values))
            mine.hold(*(_stacked(own, other, -2, length - 1) for own, other in pairs))
        ids, mask = _stacked(self.ids, other.ids, -1, length), _stacked(self.mask, other.mask, -1, length)
        return Rolling(ids, mask, self.cache, self.places + other.places, self.made + other.made)


def _stacked(first: torch.Tensor, second: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Both along the first dimension, filled up with zeros at the beginning of ``dim`` (-1 or -2) to ``length``."""
    after = [0, 0] * (-1 - dim)
    return torch.cat([functional.pad(part, [*after, length - part.shape[dim], 0]) for part in (first, second)])
