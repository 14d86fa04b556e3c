"""Tables of what ``safekey_evidence.py`` measured, as Markdown.

    python benchmarks/safekey_report.py docs/results/safekey.jsonl

Rates over all seeds with 95 % Wilson intervals; differences from plain fine-tuning on the same prompts, averaged over
seeds prompt by prompt and then resampled by prompts (95 % percentile intervals).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safegraft.evaluate.metrics import paired_bootstrap, rate

FIRST = "sft"
METRICS = {
    "unsafe/none": "unsafe, asked directly",
    "unsafe/prefilling": "unsafe, prefilling",
    "unsafe/role_play": "unsafe, role play",
    "overrefusal/none": "over-refusal",
    "cut/none": "of all asked directly: cut off while thinking",
}
INSIDE = {
    "attention_u": "attention from K to U",
    "attention_query": "attention from K to the query",
    "nll": "benign answers, nats a token",
    "token_accuracy": "benign answers, tokens right",
}


def by_prompt(lines: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    """The mean over seeds of each prompt's outcome."""
    found: dict[str, list[bool]] = {}
    for line in lines:
        for prompt, outcome in line["outcomes"].get(metric, {}).items():
            found.setdefault(prompt, []).append(outcome)
    return {prompt: statistics.mean(map(float, seen)) for prompt, seen in found.items()}


def rates(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    table = ["| model | " + " | ".join(METRICS.values()) + " |", "|---|" + "---|" * len(METRICS)]
    for arm, lines in arms.items():
        cells = []
        for metric in METRICS:
            seen = [outcome for line in lines for outcome in line["outcomes"].get(metric, {}).values()]
            if not seen:
                cells.append("—")
                continue
            found = rate(seen)
            text = f"{found.value:.0%} ({found.low:.0%}–{found.high:.0%})"
            if arm != FIRST and FIRST in arms:
                own, first = by_prompt(lines, metric), by_prompt(arms[FIRST], metric)
                shared = sorted(set(own) & set(first))
                gap = paired_bootstrap([first[p] for p in shared], [own[p] for p in shared])
                text += f"; {100 * gap.value:+.0f} ({100 * gap.low:+.0f} … {100 * gap.high:+.0f})"
            cells.append(text)
        table.append(f"| {arm} | " + " | ".join(cells) + " |")
    return table


def inside(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    heads = ["head over U right", "head over query and U right"]
    table = ["| model | " + " | ".join([*INSIDE.values(), *heads]) + " |", "|---|" + "---|" * (len(INSIDE) + 2)]
    for arm, lines in arms.items():
        cells = []
        for name in INSIDE:
            values = [value for line in lines for value in line["inside"][name]]
            spread = paired_bootstrap([0.0] * len(values), values)
            cells.append(f"{spread.value:.3f} ({spread.low:.3f}–{spread.high:.3f})")
        for name in ("u", "xu"):
            right = [
                (score > 0.5) == harmful
                for line in lines
                for score, harmful in zip(line["inside"].get(name, []), line["inside"]["harmful"], strict=False)
            ]
            found = rate(right) if right else None
            cells.append(f"{found.hits} of {found.n} ({found.low:.0%}–{found.high:.0%})" if found else "—")
        table.append(f"| {arm} | " + " | ".join(cells) + " |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    lines = [json.loads(line) for line in parser.parse_args().file.read_text(encoding="utf-8").splitlines()]
    if len({json.dumps(line["settings"], sort_keys=True) for line in lines}) > 1:
        raise SystemExit("the file holds runs with several settings; give one of each")
    arms: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        arms.setdefault(line["arm"], []).append(line)
    seeds = sorted({line["seed"] for line in lines})
    print(f"Seeds {', '.join(map(str, seeds))}; {lines[0]['device']}; settings {json.dumps(lines[0]['settings'])}\n")
    print("\n".join(rates(arms)) + "\n")
    print("\n".join(inside(arms)))


if __name__ == "__main__":
    main()
