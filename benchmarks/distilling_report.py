"""Tables from the lines that distilling.py measured; see there.

python benchmarks/distilling_report.py docs/results/distilling.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilling import VARIANTS
from safegraft.evaluate.metrics import holm, mcnemar, rate

REFERENCE = {"ffn-plain": "ffn", "hybrid-plain": "hybrid"}
"""What a vector is compared with; ``attention`` for all others."""


def interval(bits: Sequence[bool]) -> str:
    found = rate(bits)
    return f"{found.value:.0%} ({found.low:.0%}–{found.high:.0%})".replace("%", " %")


def unsafe(row: dict[str, Any]) -> list[bool]:
    return [bit == "0" for bit in row["harmful"]]


def refused(row: dict[str, Any]) -> list[bool]:
    return [bit == "1" for bit in row["harmless"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path)
    rows = [json.loads(line) for line in parser.parse_args().lines.read_text(encoding="utf-8").splitlines()]
    made = {row["variant"]: row for row in rows if "task" not in row}
    cells = {(row["task"], row["variant"]): row for row in rows if "task" in row}
    print("| vector | MB | surrogate refuses | gap | cos(τ, Δ) | share in τ's directions |\n" + "|---" * 6 + "|")
    for name, row in made.items():
        told = row["validity"]
        gap = max(told["gap_by_layer"].values(), default=0.0)
        print(
            f"| {name} | {row['megabytes']} "
            f"| {told['after']['refused']} of {told['after']['prompts']} | {gap:.2%} "
            f"| {told['probe']['cosine']:+.3f} | {told['probe']['shared']:.3f} |"
        )
    for task in dict.fromkeys(task for task, _ in cells):
        start = cells[task, "fine-tuned"]
        loss = sum(start["loss"]) / len(start["loss"])
        print(f"\n### {task}\n")
        print("| vector | β | unsafe | over-refusal | loss | tokens right |\n" + "|---" * 6 + "|")
        bare = f"{interval(unsafe(start))} | {interval(refused(start))} | {loss:.4f} | {start['right']:.1%}"
        print(f"| none (fine-tuned) | | {bare} |")
        done = [name for name in VARIANTS if (task, name) in cells]
        for name in done:
            row = cells[task, name]
            if row["strength"] is None:
                print(f"| {name} | none keeps the limits | | | | |")
                continue
            print(
                f"| {name} | {row['strength']:g} | {interval(unsafe(row))} | {interval(refused(row))} | "
                f"{sum(row['loss']) / len(row['loss']):.4f} | {row['right']:.1%} |"
            )
        told = {n: cells[task, n] for n in done if cells[task, n]["strength"] is not None}
        pairs = [
            (n, REFERENCE.get(n, "attention"))
            for n in told
            if REFERENCE.get(n, "attention") in told and n != "attention"
        ]
        ps = [mcnemar(unsafe(told[other]), unsafe(told[name])) for name, other in pairs]
        for (name, other), p, adjusted in zip(pairs, ps, holm(ps), strict=True):
            gap = sum(unsafe(told[name])) - sum(unsafe(told[other]))
            print(f"* {name} against {other}: {gap:+d} unsafe answers, p = {p:.2g}, after Holm {adjusted:.2g}")


if __name__ == "__main__":
    main()
