"""The demo's report: a table, bars with intervals, the sweep, and the heat map layer × module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .html import bars, heatmap, page, render

_TONES = {"shipped": "plain", "aligned": "plain", "finetuned": "warn", "restored": "good"}
_METRICS = {
    "complies": (
        "Harmful requests complied with",
        "Lower is safer. Answers that are not refusals, of all harmful requests.",
    ),
    "refuses": ("Harmless look-alikes refused", "Lower is better: refusing everything is not safety."),
    "task": ("Task accuracy", "Higher is better: what the fine-tune was made for."),
}
_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.(.+)$")


def write_demo_report(results: Mapping[str, Any], target: Path) -> None:
    """Write ``report.html`` from what results.json holds: one file that loads nothing."""
    charts = [
        bars(
            title,
            note + " Whiskers: 95 % Wilson interval.",
            [{"label": row["name"], "tone": _TONES[row["key"]], **row["scores"][metric]} for row in results["models"]],
        )
        for metric, (title, note) in _METRICS.items()
    ]
    body = render(
        "demo.html.j2",
        {
            "results": results,
            "metrics": {name: title for name, (title, _) in _METRICS.items()},
            "charts": charts,
            "heat": graft_map(results["merge"]["tensors"]),
            "seconds": sum(stage["seconds"] for stage in results["stages"]),
        },
    )
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page("Safegraft demo", body), encoding="utf-8")
    partial.replace(target)


def graft_map(tensors: Mapping[str, Mapping[str, float | None]]) -> Markup:
    """The size of what the merge added beside what fine-tuning had changed, layer × module.

    Args:
        tensors: per tensor name its figures, of which ``ratio`` = ‖w·s‖/‖τ‖ is shown (None counts as infinite).
    """
    cells: dict[tuple[str, str], float] = {}
    for name, figures in tensors.items():
        found = _LAYER.search(name)
        layer, module = (found[1], found[2]) if found else ("–", name)
        ratio = figures["ratio"]
        cells[layer, module.removesuffix(".weight")] = float("inf") if ratio is None else ratio
    rows = list(dict.fromkeys(layer for layer, _ in cells))
    rows.sort(key=lambda layer: int(layer) if layer.isdigit() else -1)
    columns = list(dict.fromkeys(module for _, module in cells))
    return heatmap(
        rows,
        columns,
        [[cells.get((row, column)) for column in columns] for row in rows],
        title="Where the graft went",
        unit="‖w·s‖ / ‖τ‖",
        note="What the merge added to each weight, as a multiple of what fine-tuning had changed in it.",
        low=0.0,
    )
