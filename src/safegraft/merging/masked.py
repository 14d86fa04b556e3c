"""A merge that goes by a learnt mask instead of a safety vector: what it needs, decides on, and tells."""

from __future__ import annotations

from ..config import MergeConfig, Settings
from ..errors import ConfigError, MismatchError
from ..tensors.finetune import FineTune
from ..tensors.mask import Mask
from .fusion import usual_scale
from .method import Method
from .methods.masked import Somf
from .plan import Plan
from .record import fine_tunes
from .survey import Survey

FACTORS = (
    "the mask is one over LoRA factors, the published way: it multiplies each factor, which is not masking the weights"
)


def require_mask_alone(config: MergeConfig, method: Method) -> None:
    """Raise ConfigError unless ``config`` gives a mask, and nothing that goes with a vector."""
    if config.mask is None:
        raise ConfigError(
            f"{method.name} needs a mask learnt on the aligned model, the base",
            "Learn one: safegraft somf train --aligned BASE --model FINETUNE --out MASK. Then give --mask MASK.",
        )
    if config.vector is not None:
        raise ConfigError(
            f"{method.name} uses no safety vector: it takes the base for the aligned model",
            "Leave out --vector, or choose another --method.",
        )
    if config.strength is not None or config.match_norm:
        raise ConfigError(
            f"{method.name} has no strength: how much of the changes is kept is the fusion's own λ",
            "Leave out --strength and --match-norm; λ is the parameter scale.",
        )
    if config.as_adapter:
        raise ConfigError(f"{method.name} changes whole weights, which no adapter holds", "Leave out --as-adapter.")


def masked(fine: FineTune, mask: Mask) -> list[str]:
    """The weights that ``mask`` decides on, by the fine-tune's names.

    Raises:
        MismatchError: the mask is about a model of other weights than the base, or about factors that a fine-tune
        lacks.
    """
    mask.check_base(fine.base)
    there = fine.pairing.counterparts
    names = [n for n in fine.layout.names() if there.get(n) in mask and n not in fine.layout.tied]
    short = [n for n in names if fine.rows(n) is not None]
    if short:
        raise MismatchError(
            f"{short[0]} has fewer rows in a fine-tune than in the mask {mask.label}",
            "Give the fine-tunes that the mask was learnt on.",
        )
    if mask.factors:
        _require_factors(fine, mask, names)
    return names


def _require_factors(fine: FineTune, mask: Mask, names: list[str]) -> None:
    for name in names:
        ranks = {mask.spec(f"{fine.pairing.counterparts[name]}{side}").shape[1] for side in ("#left", "#right")}
        for one in (fine, *fine.others):
            rank = one.rank(name)
            if {rank} != ranks:
                found = "no LoRA update there" if rank is None else f"rank {rank}"
                raise MismatchError(
                    f"the mask {mask.label} is one over LoRA factors of rank {max(ranks)}, and for {name} {one.label} "
                    f"has {found}",
                    "Give the adapters that the mask was learnt on, or learn a mask without --mask-factors.",
                )


def settled(params: Settings, fine: FineTune, mask: Mask) -> Somf:
    """``params`` with everything filled in: what the mask was learnt with, where the user does not say.

    Raises:
        ConfigError: ties or dare of LoRA factors.
    """
    assert isinstance(params, Somf)
    learnt = mask.manifest["fusion"]
    fusion = params.fusion or learnt["kind"]
    if mask.factors and fusion in ("ties", "dare"):
        raise ConfigError(
            f"{fusion} takes whole changes, and {mask.label} masks LoRA factors",
            "Choose sum, task-arithmetic or mean, or learn a mask without --mask-factors.",
        )
    lora = all(one.adapter is not None for one in (fine, *fine.others))
    usual = learnt["scale"] if fusion == learnt["kind"] else usual_scale(fusion, lora=lora)
    filled = {
        "fusion": fusion,
        "scale": usual if params.scale is None else params.scale,
        "density": learnt["density"] if params.density is None else params.density,
        "drop": learnt["drop"] if params.drop is None else params.drop,
        "temperature": mask.temperature if params.temperature is None else params.temperature,
    }
    return params.model_copy(update=filled)


def mask_doubts(fine: FineTune, found: Survey, mask: Mask | None, params: Settings) -> list[str]:
    """Sentences for the user where the mask was learnt on other models, or under another fusion."""
    if mask is None:
        return []
    assert isinstance(params, Somf)
    learnt, here, said = mask.manifest["inputs"], found.digests(), []
    if learnt["aligned"]["sha256"] != here["base"]:
        said.append(
            f"{fine.base.label} is not the aligned model that the mask {mask.label} was learnt on "
            f"({learnt['aligned']['name']}): it is about other weights"
        )
    known, given = ([i for k, i in t.items() if k.startswith("model")] for t in (learnt, fine_tunes(fine, found)))
    if sorted(i["sha256"] for i in known) != sorted(i["sha256"] for i in given):
        said.append(
            f"the mask {mask.label} was learnt on other fine-tunes ({', '.join(i['name'] for i in known)}): what is "
            "safe to keep of these is not known"
        )
    elif sorted((i["sha256"], i["weight"]) for i in known) != sorted((i["sha256"], i["weight"]) for i in given):
        weights = ", ".join(f"{i['name']} {i['weight']:g}" for i in known)
        said.append(f"the mask {mask.label} was learnt with other weights: {weights}")
    if params.fusion != mask.manifest["fusion"]["kind"]:
        said.append(
            f"the mask {mask.label} was learnt under the fusion {mask.manifest['fusion']['kind']}, not this one"
        )
    return said


def mask_notes(plan: Plan, mask: Mask | None) -> list[str]:
    """What is said of weights that the mask knows nothing of, and of masks over factors."""
    if mask is None:
        return []
    said = [FACTORS] if mask.factors else []
    kept = [u.name for u in plan.units if not u.masked and len(u.spec.shape) >= 2 and u.action != "copy"]
    if kept:
        said.append(
            f"{len(kept)} matrices have no mask and are fused as they are: "
            + ", ".join(kept[:3]) + (" …" if len(kept) > 3 else "")
        )  # fmt: skip
    return said
