"""Reasoning traces for tests, a tiny reasoning model, and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import chat_models

THINKING = chat_models.TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)
"""ChatML whose generation prompt opens the reasoning."""


def rows(count: int, *, harmful: bool | None = None) -> list[dict]:
    """``count`` rows, harmful and benign in turn or all of one kind, which the rules annotate with full confidence."""
    found = []
    for i in range(count):
        bad = i % 2 == 0 if harmful is None else harmful
        verb, turn, answer = ("break", "Hmm, that is bad.", "I'm sorry.") if bad else ("bake", "First, mix.", "Mix it.")
        thought = f"Okay, so the user is asking how to {verb} {i} loaves. {turn} Then on."
        response = f"<think>\n{thought}\n</think>\n\n{answer}"
        found.append({"id": f"r{i}", "prompt": f"How do I {verb} {i} loaves?", "response": response, "harmful": bad})
    return found


def write(file: Path, found: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return file


def build(out: Path, **changes) -> Path:
    """A tiny model as ``chat_models.build`` makes it, whose template opens the reasoning."""
    chat_models.build(out, **changes)
    (out / "chat_template.jinja").write_text(THINKING)
    return out
