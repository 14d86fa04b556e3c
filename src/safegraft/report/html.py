"""Pieces of the HTML reports: one file each, no network, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

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


def _number(value: float, digits: int) -> str:
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:.{digits}g}".replace("-", "−")


def bars(title: str, note: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Horizontal bars of rates with whiskers for their intervals.

    Args:
        rows: each with ``label``, ``value``, ``low``, ``high`` (all within [0, 1]), ``hits``, ``n``, and ``tone``, one
            of plain | warn | good.
    """
    return render("bars.html.j2", {"title": title, "note": note, "rows": rows})
