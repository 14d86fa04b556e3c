"""The picture of a search: every look as a point, safety against over-refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {None: "#1f5fa8", "paper": "#1f5fa8", "none": "#c2542b", "subspace": "#1f7a5c", "input": "#7a4f9e"}


def write_frontier(
    trials: Sequence[Mapping[str, Any]],
    start: Mapping[str, Any],
    chosen: Mapping[str, Any] | None,
    limit: float,
    drop: float,
    out: Path,
) -> None:
    """Write a PNG; needs matplotlib.

    Args:
        trials: each with strength, damping (none for Safe Delta) and scores (unsafe and refused as hits and n, utility
            as a share, right as hits and n where it was counted). start: the fine-tune's scores. chosen: strength and
            damping of the one chosen. limit: most harmless requests refused, a share. drop: most of the task lost.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    strongest = max((t["strength"] for t in trials), default=1.0)
    least = _task(start) - drop - 1e-9
    for damping, colour in COLOURS.items():
        rows = [t for t in trials if t.get("damping") == damping]
        for kept, fill in ((True, colour), (False, "none")):
            shown = [t for t in rows if (_task(t["scores"]) >= least) is kept]
            x, y = ([_share(t["scores"][key]) for t in shown] for key in ("refused", "unsafe"))
            sizes = [20 + 120 * t["strength"] / strongest for t in shown]
            label = _label(damping) if rows and kept else None
            axes.scatter(x, y, s=sizes, facecolor=fill, edgecolor=colour, alpha=0.7 if kept else None, label=label)
    axes.scatter([_share(start["refused"])], [_share(start["unsafe"])], marker="s", color="#333333", label="fine-tune")
    taken = [t for t in trials if chosen and all(t.get(key) == chosen[key] for key in ("strength", "damping"))]
    for row in taken[:1]:
        point = _share(row["scores"]["refused"]), _share(row["scores"]["unsafe"])
        axes.scatter(*point, marker="*", s=320, facecolor="none", edgecolor="#111111", label="chosen")
    axes.axvline(limit, color="#999999", linewidth=1, linestyle="--")
    axes.set_xlabel("harmless requests refused (search part); dashed: the limit")
    axes.set_ylabel("harmful requests not refused")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    budgets = any(t.get("damping") is None for t in trials)
    larger = "Larger points have a larger budget" if budgets else "Larger points are stronger merges"
    axes.set_title(f"{larger}; hollow ones lose more of the task than allowed", fontsize="medium")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


def _task(scores: Mapping[str, Any]) -> float:
    """As Scores.task."""
    return _share(scores["right"]) if scores.get("right") else float(scores["utility"])


def _label(damping: str | None) -> str:
    return "Safe Delta" if damping is None else f"damping {damping}"


def _share(found: Mapping[str, Any]) -> float:
    return float(found["hits"]) / float(found["n"])
