"""Masks with logits of one's choice, which say that they were learnt on given models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import models
from safegraft.merging.record import fine_tunes
from safegraft.merging.survey import survey
from safegraft.tensors.finetune import FineTune
from safegraft.tensors.mask import KIND, Mask, write_mask


def by_hand(
    out: Path,
    base: Path,
    tuned: Sequence[Path],
    logits: dict[str, Tensor],
    *,
    fusion: str = "sum",
    scale: float = 1.0,
    granularity: str = "element",
    block: int = 64,
    factors: bool = False,
) -> Mask:
    """A mask of these logits over ``tuned``, fine-tunes of ``base``."""
    fine = FineTune.open([str(m) for m in tuned], base, None)
    found = survey(fine, None, 1)
    names = dict.fromkeys(name.partition("#")[0] for name in logits)
    manifest = {
        "kind": KIND,
        "config": {"granularity": granularity, "block": block, "mask_factors": factors, "temperature": 0.5},
        "fusion": {"kind": fusion, "scale": scale, "density": 0.2, "drop": 0.2},
        "inputs": {"aligned": {"name": str(base), "sha256": found.digests()["base"]}, **fine_tunes(fine, found)},
        "tensors": {n: {"shape": list(fine.base.spec(n).shape)} for n in names},
    }
    return write_mask(out, logits, manifest, force=False)


def everywhere(base: Path, value: float) -> dict[str, Tensor]:
    """Logits of one value for every element of every weight."""
    return {name: torch.full(tuple(t.shape), value) for name, t in models.weights(base).items()}


def adapter(base: Path, out: Path, *, seed: int = 0, rank: int = 2, modules: Sequence[str] = ("q_proj", "up_proj")):
    """A LoRA adapter of ``base`` whose both factors are random."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    models.silence()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*modules]),
        )
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.copy_(models.noise(name, parameter.shape, seed) * 0.1)
        tuned.save_pretrained(out)
    return out
