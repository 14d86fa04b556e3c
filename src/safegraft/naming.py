"""What tensor names say: the decoder layer and the kind of module."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.(.+)$")


def layer_and_module(name: str) -> tuple[int | None, str]:
    """``(layer number, module)``; None and the name itself outside the decoder layers.

    ``model.layers.3.self_attn.q_proj.weight`` gives ``(3, "self_attn.q_proj")``; experts fall together under ``*``.
    """
    found = _LAYER.search(name)
    if not found:
        return None, name.removesuffix(".weight")
    module = re.sub(r"\.\d+\.", ".*.", found.group(2))
    return int(found.group(1)), module.removesuffix(".weight")


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
