"""Pieces of the HTML reports: one file each, no network, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..naming import layer_grid

_TEMPLATES = Environment(
    loader=PackageLoader("safegraft.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, values: Mapping[str, Any]) -> Markup:
    """A template of this package, filled in; every text is escaped unless it is Markup."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


def page(title: str, body: Markup) -> str:
    """A whole HTML document around ``body``: the style sheet inline, nothing loaded from anywhere."""
    return str(render("page.html.j2", {"title": title, "body": body}))


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    unit: str = "",
    note: str = "",
    low: float | None = None,
    high: float | None = None,
    digits: int = 3,
    corner: str = "layer",
) -> Markup:
    """A table whose cells are tinted by value, with the numbers in them and a legend.

    Args:
        rows, columns: labels. values: [rows][columns]; None is an empty cell, infinity is shown as ∞ and tinted fully.
        unit: said in the legend, e.g. "‖w·s‖ / ‖τ‖". note: a sentence below the title.
        low, high: the values at no tint and full tint; the finite values' minimum and maximum if not given.
        digits: significant digits of the numbers shown. corner: what the rows are.

    Raises:
        ValueError: ``values`` is not of that shape, or holds NaN.
    """
    if len(values) != len(rows) or any(len(line) != len(columns) for line in values):
        raise ValueError(f"values are not {len(rows)} rows of {len(columns)}")
    known = [v for line in values for v in line if v is not None]
    if any(math.isnan(v) for v in known):
        raise ValueError("a heat map cannot show NaN")
    finite = [v for v in known if math.isfinite(v)] or [0.0]
    bottom, top = (min(finite) if low is None else low), (max(finite) if high is None else high)

    def cell(value: float | None) -> dict[str, Any]:
        if value is None:
            return {"text": "", "tint": None}
        share = (value - bottom) / (top - bottom) if math.isfinite(value) and top > bottom else float(value > bottom)
        return {"text": _number(value, digits), "tint": round(min(1.0, max(0.0, share)), 3)}

    lines = [(name, [cell(v) for v in line]) for name, line in zip(rows, values, strict=True)]
    legend = {"low": _number(bottom, digits), "high": _number(top, digits), "unit": unit}
    return render(
        "heatmap.html.j2",
        {"title": title, "note": note, "columns": columns, "lines": lines, "legend": legend, "corner": corner},
    )


def graft_map(ratios: Mapping[str, float | None], *, title: str = "Where the graft went") -> Markup:
    """The size of what the merge added beside what fine-tuning had changed, layer × module.

    Args:
        ratios: per tensor name ‖w·s‖/‖τ‖; None counts as infinite.
    """
    rows, columns, values = layer_grid({n: float("inf") if r is None else r for n, r in ratios.items()})
    return heatmap(
        rows,
        columns,
        values,
        title=title,
        unit="‖w·s‖ / ‖τ‖",
        note="What the merge added to each weight, as a multiple of what fine-tuning had changed in it.",
        low=0.0,
    )


def _number(value: float, digits: int) -> str:
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:.{digits}g}".replace("-", "−")


def bars(title: str, note: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Horizontal bars of rates with whiskers for their intervals.

    Args:
        rows: each with ``label``, ``value``, ``low``, ``high`` (all within [0, 1]), ``hits``, ``n``, and ``tone``, one
            of plain | warn | good.
    """
    return render("bars.html.j2", {"title": title, "note": note, "rows": rows})


WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 52
APART = 18
"""Labels of a scatter chart are at least so far from each other, in units of its view box."""


def scatter(title: str, note: str, points: Sequence[Mapping[str, Any]], *, x: str, y: str, x_better: str) -> Markup:
    """Points with whiskers both ways, and the frontier: those that no other beats on both axes.

    Args:
        points: each with ``label``, ``tone`` (see ``bars``) and two rates ``x`` and ``y``, mappings with hits, n, low
            and high. Less is better on y. x, y: what the axes are. x_better: "high" or "low".
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(share: float) -> float:
        return round(LEFT + share * (right - LEFT), 1)

    def down(share: float) -> float:
        return round(bottom - share * (bottom - TOP), 1)

    placed = []
    for p in points:
        px, py = p["x"]["hits"] / p["x"]["n"], p["y"]["hits"] / p["y"]["n"]
        ends = [f"{v:.0%}" for v in (px, p["x"]["low"], p["x"]["high"], py, p["y"]["low"], p["y"]["high"])]
        told = f"{p['label']}: {x} {ends[0]} ({ends[1]} – {ends[2]}), {y} {ends[3]} ({ends[4]} – {ends[5]})"
        end = px > 0.7
        placed.append({
            "label": p["label"], "tone": p["tone"], "told": told, "at": (px if x_better == "low" else -px, py),
            "x": across(px), "y": down(py), "left": across(p["x"]["low"]), "right": across(p["x"]["high"]),
            "top": down(p["y"]["high"]), "bottom": down(p["y"]["low"]),
            "text_x": across(px) + (-12 if end else 12), "anchor": "end" if end else "start", "text_y": down(py) - 10,
        })  # fmt: skip
    edge = TOP + APART
    for one in sorted(placed, key=lambda p: p["text_y"]):
        one["text_y"] = max(one["text_y"], edge)
        edge = one["text_y"] + APART
    edge = bottom - 4
    for one in sorted(placed, key=lambda p: p["text_y"], reverse=True):
        one["text_y"] = min(one["text_y"], edge)
        edge = one["text_y"] - APART
    best = sorted(
        (p for p in placed if not any(_beats(q["at"], p["at"]) for q in placed)), key=lambda p: (p["x"], p["y"])
    )
    ticks = [{"x": across(t / 4), "y": down(t / 4), "percent": 25 * t} for t in range(5)]
    return render("scatter.html.j2", {
        "title": title, "note": note, "points": placed, "ticks": ticks, "x": x, "y": y,
        "width": WIDTH, "height": HEIGHT,
        "box": {"left": LEFT, "right": right, "top": TOP, "bottom": bottom},
        "frontier": " ".join(f"{p['x']},{p['y']}" for p in best) if len(best) > 1 else "",
    })  # fmt: skip


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether ``one`` is no worse on both counts (less is better) and better on one."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
