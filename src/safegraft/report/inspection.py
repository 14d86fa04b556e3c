"""The page of `safegraft inspect --html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .html import heatmap, page, render

Grid = tuple[Sequence[str], Sequence[str], Sequence[Sequence[float | None]]]

MAPS = (
    ("ratio", "How much safety is added, against what fine-tuning changed", "‖w·s‖ / ‖τ‖"),
    ("weight", "The weight the method gives each tensor", "w"),
    ("opposition", "How far the vector pushes against fine-tuning within its own directions", "scale-free I"),
    ("overlap", "The share of the vector that lies in the fine-tune's own directions", "‖U₁ᵀ s V₁‖ / ‖s‖"),
    ("cosine", "Whether fine-tuning moved along the vector (+) or against it (−)", "cos(τ, Δ)"),
    ("safety_norm", "The vector itself", "‖Δ‖"),
)
"""Figure, title and unit of each heat map, in the order shown."""


def inspection_page(
    title: str, facts: Sequence[tuple[str, str]], warnings: Sequence[str], grids: Mapping[str, Grid]
) -> str:
    """A self-contained page: the global figures, the doubts, and a heat map of every figure in ``MAPS``.

    Args:
        facts: (name, value) pairs. grids: per figure of MAPS its (rows, columns, values).
    """
    body = render("inspection.html.j2", {"title": title, "facts": facts, "warnings": warnings})
    for figure, heading, unit in MAPS:
        rows, columns, values = grids[figure]
        body += heatmap(rows, columns, values, title=heading, unit=unit)
    return page(title, body)
