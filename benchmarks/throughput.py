"""Tokens per second of an evaluation's generation, against ``model.generate`` alone, side by side in one run.

    python benchmarks/throughput.py MODEL [--batch 32] [--tokens 64] [--prompts 96] [--rounds 3]

Both answer the same chat prompts of the starter suite, greedily, in batches of one size. ``model.generate`` gets them
in the order of the suite, padded on the left, as its own documentation has it; ours is ``HfChatModel``, with
rendering, sorting and decoding. Tokens are those up to the end of each answer. The two take turns; the ratio is of the
medians.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from safegraft.evaluate.benchmarks import load
from safegraft.evaluate.models.hf import HfChatModel, load_chat
from safegraft.evaluate.records import Sampling, ask


def plain(model: Any, tokenizer: Any, prompts: list[str], batch: int, tokens: int) -> int:
    """The answers' tokens, made by ``model.generate`` as it is."""
    ends = {model.generation_config.eos_token_id, tokenizer.eos_token_id}
    made = 0
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": p}] for p in prompts[start : start + batch]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        given = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**given.to(model.device), max_new_tokens=tokens, do_sample=False)
        for row in out[:, given["input_ids"].shape[1] :].tolist():
            made += next((i for i, token in enumerate(row) if token in ends), len(row))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a chat model's folder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load_chat(args.model)
    suite = [case.prompt for case in load("starter").cases]
    prompts = suite[: args.prompts]
    chat = HfChatModel(model, tokenizer, batch=args.batch)
    rates: list[list[float]] = [[], []]
    for turn in range(args.rounds + 1):
        for kind in range(2):
            start = time.perf_counter()
            if kind:
                said = chat.replies([ask(p) for p in prompts], Sampling(args.tokens))
                made = sum(reply.tokens for reply in said)
            else:
                made = plain(model, tokenizer, prompts, args.batch, args.tokens)
            took = time.perf_counter() - start
            if turn:  # the first round is not counted
                rates[kind].append(made / took)
    theirs, ours = (statistics.median(found) for found in rates)
    print(f"model.generate {theirs:.0f} tokens/s, an evaluation {ours:.0f} tokens/s: {ours / theirs:.2f}×", flush=True)


if __name__ == "__main__":
    main()
