"""Makes ``starter/task.jsonl``: small word problems with an answer that can be checked.

Run as ``python -m safegraft.data.make_task``; the rows depend on the seed alone. No two rows share a request, the
splits are disjoint, and every family of ``task_families`` has the same share of every split. CC0 like the other sets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from . import TaskRow
from .task_families import FAMILIES

SEED = 20260
KEY = "answer is {answer}"
SPLITS = (("train", 240), ("select", 40), ("report", 120))


def rows(seed: int = SEED) -> Iterator[TaskRow]:
    """The rows of every split, in order; families take turns, then each split is shuffled."""
    rng = random.Random(seed)
    seen: set[str] = set()
    for split, count in SPLITS:
        made: list[tuple[str, str, str]] = []
        while len(made) < count:
            family = FAMILIES[len(made) % len(FAMILIES)]
            prompts, answer, values = family(rng)
            prompt = rng.choice(prompts).format(**values)
            if prompt in seen:
                continue
            seen.add(prompt)
            made.append((prompt, answer.format(**values), KEY.format(**values)))
        rng.shuffle(made)
        for number, (prompt, text, key) in enumerate(made, 1):
            yield TaskRow(f"task-{split}-{number:03}", split, prompt, text, key)


def main() -> None:
    target = Path(__file__).parent / "starter" / "task.jsonl"
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")
    print(f"Wrote {target}.")


if __name__ == "__main__":
    main()
