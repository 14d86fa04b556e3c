"""The model card written beside a merged model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tensors.finetune import FineTune
from .method import Method

if TYPE_CHECKING:
    from .run import MergeSummary


def model_card(fine: FineTune, method: Method, summary: MergeSummary) -> str:
    """Markdown with the Hub's front matter: what was merged, how strongly, and what was not checked."""
    tuned = [fine.label, *(other.label for other in fine.others)]
    weight = "" if summary.mean_kept is None else f"; {summary.mean_kept:.1%} of its norm kept"
    parents = "\n".join(f"- {name}" for name in dict.fromkeys(_plain(n) for n in (*tuned, fine.base.label)))
    warnings = "".join(f"\n> {text}\n" for text in summary.warnings)
    strength = f"{summary.strength:g} {'of ‖τ‖' if summary.match_norm else 'raw'} (scale α {summary.alpha:.4g}{weight})"
    if method.needs == "calibration":
        made, strength = "with its safety put back", f"{summary.strength:g} (its budget)"
        how = "its changes were cut to a budget of damage to the aligned model's answers on safety prompts"
    elif method.needs == "mask":
        made, strength = "with its safety kept", "the fusion's own (see manifest.json)"
        how = "of the fine-tunes' changes, what a mask learnt on safety preferences calls safe was kept"
    elif summary.safety_norm:
        made, how = "with its safety put back", "weights were merged with a safety vector"
    else:
        made, how = "fused", "several fine-tunes were merged, without a safety vector"
    trained = "" if method.needs == "mask" else ", without training"
    return f"""---
base_model:
{parents}
base_model_relation: merge
library_name: transformers
tags:
- safegraft
- merge
- safety
---
# {_plain(fine.label)}, {made}

Made with Safegraft: {how}{trained}.

| | |
|---|---|
| fine-tune | {", ".join(f"`{_plain(n)}`" for n in tuned)} |
| fine-tuned from | `{_plain(fine.base.label)}` |
| method | {method.name} ({method.paper}) |
| strength | {strength} |
| tensors merged / kept as they were | {summary.merged} / {summary.copied} |
{warnings}
`manifest.json` holds every setting, the digests of all inputs and of this model, and the figures of every tensor.
Whether this model refuses what it should, and still does its task, is for a measurement to say: measure it before use.
"""


def _plain(label: str) -> str:
    """A Hub id as it is; of a local folder only its last name, so that no path of this machine is published."""
    return (
        label if label.count("/") == 1 and not label.startswith((".", "/", "~")) else label.rstrip("/").split("/")[-1]
    )
