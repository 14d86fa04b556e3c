"""The whole job of ``safegraft somf train``.

Checkpoints of the logits and the optimiser, and the reference's log-probabilities, are kept in ``OUT.training`` until
the run succeeds, so that ``resume`` can go on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import SomfConfig
from ..errors import ConfigError, OutputError
from ..evaluate.models.hf import load_chat
from ..hardware import in_bfloat16
from ..manifest import digest_of, new_manifest
from ..merging import methods as _methods
from ..merging.fusion import Fusion, usual_fusion, usual_scale
from ..merging.lineage import doubts
from ..merging.masked import FACTORS
from ..merging.record import fine_tunes
from ..merging.survey import Survey, survey
from ..tensors.finetune import FineTune
from ..tensors.mask import KIND, Mask, write_mask
from ..tensors.masking import Grain, deployed
from ..tensors.private import remove, signals_raise
from ..tensors.scopes import KNOWN, parse_layers
from ..tensors.writer import check_free, write_whole
from ..train.distill import last_checkpoint, processes
from ..train.masked import MaskedModel, Weights, pair_log_probs
from ..train.preferences import ChosenPairs, Preferences, choose_pairs, read_preferences
from ..train.somf import SomfRecipe, learn
from ..train.sources import STARTER, describe_bad
from .changes import masked_weights, placed_changes
from .check import Check, check, findings
from .memory import Memory, expected, require_room
from .onpolicy import ON_POLICY, on_policy_preferences

_ = _methods
SAMPLES = 5000
"""Pairs of a data set where the user does not say: the paper's."""
ANSWERS = 32
"""Requests answered at a time, for on-policy pairs."""
IDENTITY, REFERENCE = "identity.json", "reference.json"
Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""
Say = Callable[[str], None]
"""Called with a sentence for the user, when it is known."""


@dataclass(frozen=True)
class Learnt:
    """What came out. ``check``: as in the manifest. ``warnings``: why the mask may be of no use, in words."""

    mask: Mask
    memory: Memory
    check: Check
    warnings: list[str]

    @property
    def useless(self) -> bool:
        """Whether the masked models prefer the chosen answers no more than the plain fusion does."""
        return bool(findings(self.check))

    @property
    def kept(self) -> float:
        """Share of the logits above 0: what the binary mask keeps."""
        numbers = {name: self.mask.spec(name).numel for name in self.mask.names()}
        held = {n: sum(v for k, v in numbers.items() if k.partition("#")[0] == n) for n in self.mask.weights}
        kept = sum(self.mask.manifest["tensors"][n]["binary"] * size for n, size in held.items())
        return float(kept / sum(held.values()))


def learn_mask(
    config: SomfConfig, *, given: list[str] | None = None, progress: Report | None = None, say: Say | None = None
) -> Learnt:
    """Learn a mask as ``config`` says and write it.

    Args:
        given: the settings the user gave, for the manifest. progress, say: see Report, Say. What memory is expected is
            said before anything is loaded.

    Raises:
        UserError: anything the user can mend, before anything is trained where it can be known by then.
    """
    started = time.time()
    report: Report = progress or (lambda what, done, total: None)
    tell: Say = say or (lambda sentence: None)
    out = Path(config.out).absolute()
    work = out.with_name(f"{out.name}.training")
    _check(config, out, work)
    fine = FineTune.open(config.models, config.aligned, None, config.weights)
    source = None if config.preferences == ON_POLICY else read_preferences(config.preferences, seed=config.seed)
    found = _surveyed(fine, report)
    warnings = doubts(found)
    layers = parse_layers(config.layers) if config.layers else None
    chosen, others = masked_weights(
        fine, found, config.scope, layers=layers, names=KNOWN.extended(config.names), factors=config.mask_factors
    )
    how, grain = _fusion(config, fine), Grain(config.granularity, config.block)
    device = _device()
    dtype = torch.bfloat16 if in_bfloat16(config.precision, device) else torch.float32
    memory = expected(
        fine, chosen, others, how, grain, factors=config.mask_factors, width=dtype.itemsize,
        logit_width=getattr(torch, config.logits_dtype).itemsize, adamw=config.optimizer == "adamw",
    )  # fmt: skip
    tell(memory.describe(len(chosen)))
    for sentence in [*require_room(memory, device), *([FACTORS] if config.mask_factors else []), *fine.pairing.notes]:
        tell(sentence)
    model, tokenizer = load_chat(fine.base.path)
    pairs = _pairs(config, source, tokenizer, tell) if source else None
    changes, fixed = placed_changes(
        fine, model.to(dtype), chosen, others, how, factors=config.mask_factors,
        progress=lambda done, total: report("fusing", done, total),
    )  # fmt: skip
    masked = MaskedModel(
        model, changes, fixed, grain, temperature=config.temperature, seed=config.seed,
        dtype=getattr(torch, config.logits_dtype),
    )  # fmt: skip
    if source is None or pairs is None:
        source = on_policy_preferences(
            masked, tokenizer, tokens=config.answer_tokens, batch=ANSWERS, seed=config.seed,
            progress=lambda done, total: report("answering", done, total),
        )  # fmt: skip
        pairs = _pairs(config, source, tokenizer, tell)
    identity = _identity(config, fine, found, pairs)
    recipe = SomfRecipe(
        config.temperature, config.beta, config.lr, config.batch, config.micro_batch, config.steps, config.optimizer,
        config.save_steps, config.seed,
    )  # fmt: skip
    with _working_folder(work, identity, resume=config.resume):
        reference = _reference(config, masked, tokenizer, pairs, recipe, work, report)
        losses = learn(
            masked, tokenizer, pairs.train, reference[: len(pairs.train)], recipe, work, resume=config.resume,
            progress=lambda step, steps, _: report("learning", step, steps),
        )  # fmt: skip
        looked = check(
            masked, tokenizer, pairs.held_out, reference[len(pairs.train) :], config.beta, recipe.at_a_time,
            lambda done, total: report("checking", done, total),
        )  # fmt: skip
        warnings += findings(looked)
        manifest = new_manifest(
            KIND, config=config.model_dump(exclude={"out", "resume", "force", "save_steps"}), given=given,
            seed=config.seed, started=started,
            inputs={"aligned": {"name": fine.base.label, "sha256": found.digests()["base"]}, **fine_tunes(fine, found)},
        )  # fmt: skip
        manifest |= {
            "paper": "arXiv:2405.09055",
            "fusion": asdict(how),
            "reference": f"{config.reference}, frozen" + (": the plain fusion" if config.reference == "fused" else ""),
            "preferences": {
                "name": source.label, "pairs": len(pairs.train), "held_out": len(pairs.held_out),
                "sha256": identity["pairs"], "bad_rows": len(pairs.bad), "notes": list(source.notes),
            },
            "learning": {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]},
            "check": looked.to_json(),
            "memory": asdict(memory) | {"total": memory.total},
            "warnings": warnings,
            "caveats": [FACTORS] if config.mask_factors else [],
            "tensors": _table(masked, fine, chosen),
        }  # fmt: skip
        remove(out.with_name(f"{out.name}.partial"))
        mask = write_mask(out, masked.named_logits(), manifest, force=config.force)
    return Learnt(mask, memory, looked, warnings)


def _check(config: SomfConfig, out: Path, work: Path) -> None:
    """Everything that can be refused before an input is opened."""
    if processes() > 1:
        raise ConfigError(f"masks are learnt in one process, not in {processes()}", "Start it without a launcher.")
    if config.layers:
        parse_layers(config.layers)
    KNOWN.extended(config.names)
    check_free(out, force=config.force)
    if work.exists() and not config.resume and not config.force:
        raise OutputError(
            f"{work} is there from a run that did not finish",
            "Go on with --resume, or start again and remove it with --force.",
        )
    if config.resume and not work.exists():
        raise OutputError(f"{work} is not there: there is nothing to go on from", "Start again without --resume.")


def _pairs(config: SomfConfig, source: Preferences, tokenizer: Any, tell: Say) -> ChosenPairs:
    every = config.preferences in (STARTER, ON_POLICY)
    pairs = choose_pairs(
        source, tokenizer, samples=config.samples or (None if every else SAMPLES), allow_fewer=config.allow_fewer,
        held_out=config.check_pairs, max_length=config.max_length, seed=config.seed,
    )  # fmt: skip
    tell(f"{len(pairs.train)} pairs of {source.label} to learn from, {len(pairs.held_out)} held out")
    for sentence in [*source.notes, *([f"unusable rows:\n{describe_bad(pairs.bad)}"] if pairs.bad else [])]:
        tell(sentence)
    return pairs


def _surveyed(fine: FineTune, report: Report) -> Survey:
    total = sum(fine.layout.spec(n).nbytes for n in fine.layout.names())
    done = 0

    def count(_: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report("reading, MB", min(done, total) // 10**6, total // 10**6)

    return survey(fine, None, torch.get_num_threads(), count)


def _fusion(config: SomfConfig, fine: FineTune) -> Fusion:
    kind = config.fusion or usual_fusion(len(config.models))
    lora = all(one.adapter is not None for one in (fine, *fine.others))
    scale = usual_scale(kind, lora=lora) if config.scale is None else config.scale
    return Fusion(kind, scale, config.density, config.drop)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _reference(
    config: SomfConfig,
    masked: MaskedModel,
    tokenizer: Any,
    pairs: ChosenPairs,
    recipe: SomfRecipe,
    work: Path,
    report: Report,
) -> list[tuple[float, float]]:
    """The frozen reference's log-probabilities of every pair, from an earlier attempt where it took them."""
    kept = work / REFERENCE
    if kept.exists():
        return [(chosen, rejected) for chosen, rejected in json.loads(kept.read_text(encoding="utf-8"))]
    weights: Weights = {} if config.reference == "aligned" else masked.plain()
    found = pair_log_probs(
        masked, tokenizer, weights, [*pairs.train, *pairs.held_out], at_a_time=recipe.at_a_time,
        progress=lambda done, total: report("reference", done, total),
    )  # fmt: skip
    write_whole(kept, json.dumps(found).encode())
    return found


_NO_MATTER = {"out", "resume", "force", "save_steps", "allow_fewer"}


def _identity(config: SomfConfig, fine: FineTune, found: Survey, pairs: ChosenPairs) -> dict[str, Any]:
    """What decides the result."""
    settings = {k: v for k, v in config.model_dump().items() if k not in _NO_MATTER}
    rows = digest_of([[[dict(t) for t in p.turns], p.chosen, p.rejected] for p in pairs.preferences])
    return {"settings": settings, "pairs": rows, "inputs": [found.digests(), found.other_sha256]}


@contextmanager
def _working_folder(work: Path, identity: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """``work`` while the block runs; afterwards it is there only if that failed and there is a checkpoint to resume."""
    mark = work / IDENTITY
    if resume and (not mark.exists() or mark.read_text(encoding="utf-8") != digest_of(identity)):
        raise OutputError(
            f"{work} belongs to a run with other settings, models or pairs",
            "Repeat that run's settings to resume it, or start again with --force.",
        )
    if not resume:
        remove(work)
    with signals_raise():
        try:
            work.mkdir(parents=True, exist_ok=True)
            write_whole(mark, digest_of(identity).encode())
            yield
        except BaseException:
            if last_checkpoint(work) is None:
                remove(work)
            raise
        remove(work)


def _table(masked: MaskedModel, fine: FineTune, chosen: list[str]) -> dict[str, dict[str, Any]]:
    """Per masked weight: its shape, and the mean of σ(s) and of σ(s) > ½ over its logits."""
    held = masked.named_logits()
    table = {}
    for name in (fine.pairing.counterparts[n] for n in chosen):
        own = [held[name + suffix] for suffix in masked.changes[name].masked]
        entries = sum(s.numel() for s in own)
        table[name] = {
            "shape": list(fine.base.spec(name).shape),
            "continuous": sum(float(deployed(s, "continuous").sum()) for s in own) / entries,
            "binary": sum(float(deployed(s, "binary").sum()) for s in own) / entries,
        }
    return table
