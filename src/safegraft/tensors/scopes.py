"""Which tensors belong to a scope, by name patterns over all the architectures we know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

Scope = Literal["attention", "ffn", "hybrid", "all"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_ATTENTION = re.compile(
    r"(^|\.)(?:self_attn|attention|attn|self_attention|cross_attn)\."
    r"(?:self\.|inner_attention\.)?"
    r"(?:[qkvo]_proj|qkv_proj|out_proj|dense|query|key|value|query_key_value|c_attn|c_proj|Wqkv|wq|wk|wv|wo)\."
    r"(?:weight|bias)$"
)
_FFN = re.compile(r"(^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe|moe|feedforward|shared_mlp)\.")
_NORM = re.compile(r"(?:layer_?norm|norm)\.(?:weight|bias)$", re.IGNORECASE)
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.(.+)$")


def in_scope(name: str, scope: Scope) -> bool:
    """Whether tensor ``name`` belongs to ``scope``: attention = q, k, v and o projections (fused ones too), ffn = the
    whole MLP or expert block, hybrid = both, all = every tensor."""
    if scope == "all":
        return True
    attention = bool(_ATTENTION.search(name))
    ffn = bool(_FFN.search(name)) and not attention and not _NORM.search(name)
    return {"attention": attention, "ffn": ffn, "hybrid": attention or ffn}[scope]


def layer_and_module(name: str) -> tuple[int | None, str]:
    """``(layer number, module)``; None and the name itself outside the decoder layers.

    ``model.layers.3.self_attn.q_proj.weight`` gives ``(3, "self_attn.q_proj")``; experts fall together under ``*``.
    """
    found = LAYER.search(name)
    if not found:
        return None, name.removesuffix(".weight")
    module = re.sub(r"\.\d+\.", ".*.", found.group(2))
    return int(found.group(1)), module.removesuffix(".weight")


def modules(names: Iterable[str]) -> list[str]:
    """The distinct module kinds among ``names``, in the order met."""
    return list(dict.fromkeys(layer_and_module(name)[1] for name in names))


def layer_grid(values: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """``values`` by tensor name as a table, decoder layers down and module kinds across; names outside the layers go to
    the row "other". Tensors that share a cell (experts) are averaged; a cell without a tensor is None."""
    cells: dict[tuple[int | None, str], list[float]] = {}
    for name, value in values.items():
        cells.setdefault(layer_and_module(name), []).append(value)
    layers = sorted({layer for layer, _ in cells}, key=lambda n: (n is None, n or 0))
    columns = list(dict.fromkeys(module for _, module in cells))
    table = [
        [sum(found) / len(found) if (found := cells.get((layer, module))) else None for module in columns]
        for layer in layers
    ]
    return ["other" if layer is None else str(layer) for layer in layers], columns, table
