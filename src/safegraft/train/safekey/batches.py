"""Spanned traces as batches: the rows themselves, and for query-mask modelling their beginnings without the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import IGNORED
from .spans import Spanned

NOWHERE = -1
"""In ``understanding_rows`` and ``query_rows``: a token of no row's span."""


class Traces(Dataset[dict[str, Any]]):
    """Spanned traces for transformers' Trainer."""

    def __init__(self, items: Sequence[Spanned]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return {"input_ids": item.ids, "item": item}


@dataclass(frozen=True)
class Collator:
    """Padded on the right, or packed: the rows of a batch one after another in one, without padding.

    Packed rows must not see one another. Flash attention is told by their lengths; the other kernels by a mask [1, 1,
    tokens, tokens], of which the memory grows with the square of the batch's tokens.

    Args:
        pad_id: what fills the ids. packed: pack. flash: bring lengths in place of that mask.
        from_first_label: padded batches carry ``logits_to_keep``, and labels cut to match (see ``data.PadRight``).
    """

    pad_id: int
    packed: bool = False
    flash: bool = False
    from_first_label: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Inputs of the two forward passes, and what the losses need. All int64 but ``harmful`` and a packed mask.

        * ``main``, ``masked``: ``input_ids``, ``position_ids``, and what keeps rows and padding apart. ``masked`` is
          each row up to the end of K without the tokens of its query, the others at their positions in ``main``. To
          leave tokens out is to mask them in every layer, at less cost and with every attention kernel.
        * ``labels``, ``key_labels``: of ``main``; all that is to be learnt, and K alone. ``masked_labels``: K alone, of
          ``masked``. IGNORED where there is no loss.
        * ``understanding_rows``, ``query_rows``: like ``main.input_ids``; each token's row in the batch, or NOWHERE.
        * ``harmful``: float32 [rows], 1 or 0.
        """
        items: list[Spanned] = [row["item"] for row in rows]
        ids = [item.ids for item in items]
        places = [list(range(len(i))) for i in ids]
        batch: dict[str, Any] = {"main": self._inputs(ids, places)}
        kept = [_without_query(item) for item in items]
        short = [[item.ids[i] for i in keep] for item, keep in zip(items, kept, strict=True)]
        batch["masked"] = self._inputs(short, kept)
        batch["labels"] = self._joined([item.labels for item in items], IGNORED)
        batch["key_labels"] = self._joined([_key_labels(item, range(len(item.ids))) for item in items], IGNORED)
        keys = [_key_labels(item, keep) for item, keep in zip(items, kept, strict=True)]
        batch["masked_labels"] = self._joined(keys, IGNORED)
        for name in ("understanding", "query"):
            marks = [_marks(len(item.ids), getattr(item, name), row) for row, item in enumerate(items)]
            batch[f"{name}_rows"] = self._joined(marks, NOWHERE)
        batch["harmful"] = torch.tensor([float(item.harmful) for item in items])
        if self.from_first_label and not self.packed:
            for labels, inputs in (("labels", "main"), ("masked_labels", "masked")):
                keep = _keep(batch[labels])
                batch[inputs]["logits_to_keep"] = keep
                batch[labels] = batch[labels][:, -keep:]
            batch["key_labels"] = batch["key_labels"][:, -batch["main"]["logits_to_keep"] :]
        return batch

    def _inputs(self, ids: list[list[int]], places: list[list[int]]) -> dict[str, Any]:
        made = {"input_ids": self._joined(ids, self.pad_id), "position_ids": self._joined(places, 0)}
        if not self.packed:
            made["attention_mask"] = self._joined([[1] * len(row) for row in ids], 0)
        elif self.flash:
            made |= _lengths([len(row) for row in ids])
        else:
            made["attention_mask"] = _apart([len(row) for row in ids])
        return made

    def _joined(self, rows: list[list[int]], filler: int) -> Tensor:
        """int64 [rows, longest], or packed [1, all]."""
        if self.packed:
            return torch.tensor([[token for row in rows for token in row]])
        longest = max(map(len, rows))
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def _without_query(item: Spanned) -> list[int]:
    """Places of the tokens up to the end of K, those of the query left out."""
    return [*range(item.query[0]), *range(item.query[1], item.key[1])]


def _key_labels(item: Spanned, places: Sequence[int]) -> list[int]:
    start, end = item.key
    return [item.ids[i] if start <= i < end else IGNORED for i in places]


def _marks(size: int, span: tuple[int, int], row: int) -> list[int]:
    return [row if span[0] <= i < span[1] else NOWHERE for i in range(size)]


def _keep(labels: Tensor) -> int:
    """Last positions whose logits are wanted: from the one before the first label on."""
    first = (labels != IGNORED).any(dim=0).nonzero()
    return int(labels.shape[1]) - max(0, int(first[0]) - 1)


def _lengths(sizes: Sequence[int]) -> dict[str, Any]:
    """Where packed rows begin, in the words of transformers' flash attention."""
    starts = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(sizes), "max_length_k": max(sizes)}


def _apart(sizes: Sequence[int]) -> Tensor:
    """bool [1, 1, tokens, tokens]: whether the query position (third axis) may see the key position (fourth)."""
    rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return ((rows[:, None] == rows[None]) & torch.ones(len(rows), len(rows), dtype=torch.bool).tril())[None, None]
