"""Time of a training step in SafeKey's auxiliary epochs, against the same step of plain fine-tuning.

    python benchmarks/safekey.py [--model FOLDER --data ANNOTATED] [--rows 4] [--steps 8] [--packed]

Without a folder, layers of SmolLM2-135M's shapes with random weights, and rows with the lengths that STAR-1's have with
its tokenizer (LENGTHS). A step is the forward passes, the backward pass and AdamW on all weights, over the same rows;
steps of each kind are taken in turn, beginning with another each time, and the ratio is of their medians. On a CPU it
is the process's own time that counts, so that others on the machine do not. The target is 1.6.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from safegraft.evaluate.models.hf import load_chat
from safegraft.reasoning.traces import read_annotated
from safegraft.train.data import IGNORED
from safegraft.train.safekey.batches import Collator, Traces
from safegraft.train.safekey.losses import DualPathHead, SafeKeyModel, Weights
from safegraft.train.safekey.spans import RowError, Spanned, frame_of, spanned
from safegraft.train.safekey.trainer import ADAM_BETAS

TARGET = 1.6
LENGTHS = {"before": 24, "query": 18, "after": 10, "understanding": 24, "key": 16, "rest": 290}
"""Tokens of a STAR-1 row, medians: what the template puts before the query, the query, and so on."""
VARIANTS = {
    "SafeKey": Weights(),
    "no heads": Weights(heads="off"),
    "no QMM": Weights(query="off"),
    "QMM unmasked": Weights(query="seen"),
}


def synthetic(count: int) -> list[Spanned]:
    """Rows of random tokens of LENGTHS, the answers' between half and one and a half times as long."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        sizes = {name: round(n * rng.uniform(0.5, 1.5)) if name != "before" else n for name, n in LENGTHS.items()}
        ends, at = {}, 0
        for name, size in sizes.items():
            at += size
            ends[name] = at
        ids = [rng.randrange(3, 8000) for _ in range(at)]
        labels = [IGNORED] * ends["after"] + ids[ends["after"] :]
        spans = [(ends[before], ends[name]) for before, name in
                 (("before", "query"), ("after", "understanding"), ("understanding", "key"))]  # fmt: skip
        found.append(Spanned(ids, labels, *spans, number % 2 == 0))
    return found


def build(layers: int) -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def real(folder: str, data: Path, count: int) -> tuple[Any, list[Spanned]]:
    model, tokenizer = load_chat(folder)
    frame = frame_of(tokenizer)
    traces = read_annotated(data).traces
    found: list[Spanned] = []
    for trace in random.Random(0).sample(traces, len(traces)):
        if len(found) < count:
            try:
                found.append(spanned(tokenizer, frame, trace, max_length=8192))
            except RowError:
                continue
    return model.train(), found


def measure(model: Any, items: Sequence[Spanned], rows: int, packed: bool) -> dict[str, list[float]]:
    """Seconds of every step, by variant; ``plain`` is the language-modelling loss alone."""
    collator = Collator(0, packed=packed, from_first_label=True)
    data = Traces(items)
    batches = [collator([data[i] for i in range(at, at + rows)]) for at in range(0, len(items) - rows + 1, rows)]
    whole = SafeKeyModel(model, DualPathHead(model.config.hidden_size).to(model.device), Weights())
    optimiser = torch.optim.AdamW(whole.parameters(), lr=1e-6, betas=ADAM_BETAS)
    found: dict[str, list[float]] = {"plain": [], **{name: [] for name in VARIANTS}}
    order = list(found)
    for number, batch in enumerate(batches):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            whole.weights = VARIANTS.get(name, Weights())
            start = clock(model)
            terms = whole(batch, auxiliary=name != "plain")
            torch.stack([term / rows for term in terms.values()]).sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            if number:  # the first step allocates
                found[name].append(clock(model) - start)
    return found


def clock(model: Any) -> float:
    if model.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a reasoning model's folder, with --data")
    parser.add_argument("--data", type=Path, help="a folder of `safegraft safekey annotate`")
    parser.add_argument("--layers", type=int, default=6, help="of the random model")
    parser.add_argument("--rows", type=int, default=4, help="in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--packed", action="store_true")
    asked = parser.parse_args()
    if bool(asked.model) != bool(asked.data):
        parser.error("--model and --data go together")
    count = asked.rows * (asked.steps + 1)
    model, items = real(asked.model, asked.data, count) if asked.model else (build(asked.layers), synthetic(count))
    shares = [(i.key[1] - (i.query[1] - i.query[0])) / len(i.ids) for i in items]
    print(f"{len(items)} rows, {statistics.mean(len(i.ids) for i in items):.0f} tokens on average, of which the second "
          f"pass runs {statistics.mean(shares):.0%}", flush=True)  # fmt: skip
    found = measure(model, items, asked.rows, asked.packed)
    plain = statistics.median(found["plain"])
    print(f"plain fine-tuning: {plain:.3f} s a step")
    for name in VARIANTS:
        ratio = statistics.median(found[name]) / plain
        told = f" (target {TARGET})" if name == "SafeKey" else ""
        print(f"{name}: {statistics.median(found[name]):.3f} s a step, {ratio:.2f}×{told}")


if __name__ == "__main__":
    main()
