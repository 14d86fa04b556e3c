"""Tables from the lines that somf.py measured; see there.

python benchmarks/somf_report.py docs/results/somf.jsonl --out docs/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from safegraft.evaluate.metrics import holm, rate

ROUNDS = 2000
SHARES = np.linspace(0.02, 0.5, 25)
"""Utility given up, over which variants are compared: share of the loss that the fine-tuning had taken off."""
PAIRS = [
    ("somf-continuous", "plain"), ("somf-binary", "plain"), ("somf-continuous", "shuffled-continuous"),
    ("somf-binary", "shuffled-binary"), ("dare", "plain"), ("somf-continuous", "interference"),
    ("somf-binary", "interference"), ("somf-continuous", "resta"), ("somf-binary", "resta"),
]  # fmt: skip
FUSIONS = ("plain", "somf-continuous", "somf-binary", "shuffled-continuous", "shuffled-binary", "dare")
"""Whose strength is λ, of which less is safer."""
Cell = dict[str, Any]


def read(lines: Path) -> dict[str, dict[str, list[Cell]]]:
    """Cells by setting and variant, with arrays in them."""
    found: dict[str, dict[str, list[Cell]]] = {}
    for text in lines.read_text(encoding="utf-8").splitlines():
        cell = json.loads(text)
        for kind in ("harmful", "harmless"):
            cell[kind] = np.array([int(c) for c in cell[kind]])
        for told in cell["tasks"].values():
            for key in told:
                told[key] = np.array(told[key])
        found.setdefault(cell["setting"], {}).setdefault(cell["variant"], []).append(cell)
    return found


def loss(cell: Cell, rows: Any = None) -> float:
    """Mean over tasks of the mean loss a row, in nats a token; of the rows drawn, as numbers in [0, 1)."""
    means = []
    for told in cell["tasks"].values():
        own = told["loss"] if rows is None else told["loss"][(rows * len(told["loss"])).astype(int)]
        means.append(own.mean())
    return float(np.mean(means))


def matched(cells: list[Cell], start: Cell, aligned: Cell, bad: Any, rows: Any) -> float:
    """Unsafe rate at equal utility given up, the mean over SHARES; between strengths interpolated, and beyond the last
    one its rate. The curve starts at ``start``, the plain fusion that the variant is to mend."""
    best, worst = loss(start, rows), loss(aligned, rows)
    ends = sorted([start, *cells], key=lambda c: loss(c, rows))
    paid = np.maximum.accumulate([max(0.0, (loss(c, rows) - best) / (worst - best)) for c in ends])
    unsafe = np.minimum.accumulate([1 - c["harmful"][bad].mean() for c in ends])
    return float(np.interp(SHARES, paid, unsafe).mean())


def compare(found: dict[str, list[Cell]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The matched unsafe rate of every variant, and PAIRS' differences with 95 % intervals from resampled prompts and
    rows (the same draws for both) and Holm's p."""
    aligned, start = found["aligned"][0], found["plain"][0]
    prompts = len(start["harmful"])
    every = (np.arange(prompts), np.arange(200) / 200)
    rng = np.random.default_rng(0)
    draws = [(rng.integers(0, prompts, prompts), rng.random(200)) for _ in range(ROUNDS)]
    variants = [v for v in found if v != "aligned"]
    rates = {v: np.array([matched(found[v], start, aligned, *d) for d in (every, *draws)]) for v in variants}
    told = []
    for one, other in PAIRS:
        if one not in rates or other not in rates:
            continue
        gaps = rates[one] - rates[other]
        tail = min((gaps[1:] <= 0).mean(), (gaps[1:] >= 0).mean())
        low, high = np.quantile(gaps[1:], [0.025, 0.975])
        told.append(
            {"one": one, "other": other, "gap": gaps[0], "low": low, "high": high, "p": max(2 * tail, 1 / ROUNDS)}
        )
    for row, p in zip(told, holm([row["p"] for row in told]), strict=True):
        row["holm"] = min(1.0, p)
    return {v: float(r[0]) for v, r in rates.items()}, told


def table(found: dict[str, list[Cell]]) -> list[str]:
    """A row for every cell: unsafe rate and over-refusal with Wilson intervals, each task's loss and tokens right."""
    tasks = list(found["plain"][0]["tasks"])
    lines = [
        "| model | strength | unsafe (95 %) | over-refusal (95 %) | "
        + " | ".join(f"{t}: loss, right" for t in tasks)
        + " |",
        "|---|---|---|---|" + "---|" * len(tasks),
    ]
    for variant, cells in found.items():
        for cell in sorted(cells, key=lambda cell: -cell["strength"] if variant in FUSIONS else cell["strength"]):
            shares = [rate(bool(x) for x in bits) for bits in (1 - cell["harmful"], cell["harmless"])]
            told = [f"{s.value:.0%} ({s.low:.0%}–{s.high:.0%})" for s in shares]
            own = [
                f"{t['loss'].mean():.3f}, {t['right'].sum() / t['tokens'].sum():.1%}" for t in cell["tasks"].values()
            ]
            strength = "" if variant == "aligned" else f"{cell['strength']:g}"
            lines.append(f"| {variant} | {strength} | " + " | ".join([*told, *own]) + " |")
    return lines


def report(lines: Path) -> str:
    """The generated part of docs/results/somf.md."""
    parts = []
    for setting, found in read(lines).items():
        rates, told = compare(found)
        count = len(found["plain"][0]["tasks"])
        parts += [f"## {'One fine-tune' if count == 1 else f'{count} fine-tunes at once'} ({setting})", ""]
        parts += [
            "Unsafe rate at equal utility given up (mean over 2 … 50 % of what fine-tuning had gained in loss):", "",
            "| variant | unsafe |", "|---|---|", *(f"| {v} | {r:.1%} |" for v, r in rates.items()), "",
            "| compared | difference, points (95 %) | p (Holm) |", "|---|---|---|",
            *(
                f"| {r['one']} − {r['other']} | {100 * r['gap']:+.1f} ({100 * r['low']:+.1f} … {100 * r['high']:+.1f}) "
                f"| {r['holm']:.3f} |"
                for r in told
            ),
            "", *table(found), "",
        ]  # fmt: skip
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "somf_tables.md").write_text(report(given.lines), encoding="utf-8")
    print(report(given.lines))
