"""Does the base look like the fine-tune's parent? Asked before merging, answered in plain language."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict

from ..naming import layer_and_module
from .survey import Survey

FAR = 0.1
"""‖τ‖/‖W‖ of the median layer above which this is hardly fine-tuning. The demo's, at a high learning rate, is 0.005;
unrelated models are above 1."""
OPPOSED = -0.2
"""cos(τ, Δ) below which the task delta looks like the vector taken away. The demo's fine-tune, which lost its refusals,
has −0.02; a base taken for its aligned child, with a vector aligned − base, has nearly −1."""


def layer_ratios(survey: Survey) -> dict[int, float]:
    """‖τ‖/‖W_b‖ per decoder layer."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, stats in survey.tensors.items():
        layer, _ = layer_and_module(name)
        if layer is not None:
            sums[layer][0] += stats.task_sq
            sums[layer][1] += stats.base_sq
    return {layer: math.sqrt(t / b) if b else 0.0 for layer, (t, b) in sorted(sums.items())}


def cosine(survey: Survey) -> float | None:
    """cos(τ, Δ) over the tensors the vector covers; None where either is zero."""
    rows = [s for s in survey.tensors.values() if s.safety_sq > 0]
    task, safety = sum(s.task_sq for s in rows), sum(s.safety_sq for s in rows)
    return sum(s.dot for s in rows) / math.sqrt(task * safety) if task and safety else None


def doubts(survey: Survey) -> list[str]:
    """Sentences for the user; empty when nothing looks wrong."""
    found = []
    if survey.task_norm == 0:
        found.append("The fine-tune equals its base: there is no task delta, so a norm-matched strength adds nothing.")
        return found
    ratios = layer_ratios(survey)
    typical = statistics.median(ratios.values()) if ratios else 0.0
    if typical > FAR:
        worst = max(ratios, key=lambda layer: ratios[layer])
        found.append(
            f"The fine-tune is far from this base: half of its layers differ by more than {typical:.0%} of their norm "
            f"(layer {worst}: {ratios[worst]:.0%}), where fine-tuning moves them by a few per cent. Most likely it was "
            "made from another model (a Base given for an Instruct, or another version). A strength that is a share of "
            "this distance will be far too large."
        )
    cos = cosine(survey)
    if cos is not None and cos < OPPOSED:
        found.append(
            f"The task delta points against the safety vector (cosine {cos:.2f}): it looks as if the fine-tune had "
            "been made from the model without the safety training, and this base is the aligned one. Give the model "
            "it really started from; the strength would otherwise be measured against the alignment itself."
        )
    return found
