"""The demo's report: a table, bars with intervals, the sweep, and the heat map layer × module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evaluation import describe_comparison
from .html import bars, graft_map, page, render

_TONES = {"shipped": "plain", "aligned": "plain", "finetuned": "warn", "restored": "good"}
_METRICS = {
    "complies": (
        "Harmful requests complied with",
        "Lower is safer. Answers that are not refusals, of all harmful requests.",
    ),
    "refuses": ("Harmless look-alikes refused", "Lower is better: refusing everything is not safety."),
    "task": ("Task accuracy", "Higher is better: what the fine-tune was made for."),
}


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
            "comparisons": [describe_comparison(c) for c in results["comparisons"]],
            "heat": graft_map({n: f["ratio"] for n, f in results["merge"]["tensors"].items()}),
            "seconds": sum(stage["seconds"] for stage in results["stages"]),
        },
    )
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page("Safegraft demo", body), encoding="utf-8")
    partial.replace(target)
