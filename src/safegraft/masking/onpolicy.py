"""Preference pairs with the models' own answers to the starter's requests; none of them is written anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from ..data import harmful, instructions, lookalikes
from ..errors import ConfigError
from ..evaluate.judges.phrases import Phrases
from ..evaluate.models.hf import HfChatModel
from ..evaluate.records import Exchange, Sampling, ask
from ..train.data import Row
from ..train.masked import MaskedModel, Weights
from ..train.preferences import Preference, Preferences, asked_plainly
from ..train.sources import EVERYDAY

ON_POLICY = "on-policy"
FEWEST = 16
"""Harmful requests that the plain fusion must answer, or there is nothing to learn from."""


def on_policy_preferences(
    masked: MaskedModel,
    tokenizer: Any,
    *,
    tokens: int,
    batch: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Preferences:
    """Pairs as in the starter preferences, but with the answers of the two models that the masks lie between.

    To a harmful request the aligned model's refusal is preferred to the plain fusion's answer; requests that the
    aligned model answers, or the fusion refuses, are left out. To as many harmless ones the fusion's answer (the
    starter's where it refuses) is preferred to a refusal of the aligned model's. Answers are greedy.

    Args:
        tokens: of an answer at most, ≥ 1. batch: conversations at a time. seed: of the draw. progress: called with
            (answers, in all).

    Raises:
        ConfigError: the two differ on fewer than ``FEWEST`` harmful requests.
    """
    asked, rng = harmful("align", "distil"), random.Random(seed)
    everyday = rng.sample(instructions(), EVERYDAY)
    safe: list[Row] = [*rng.sample(lookalikes("align"), len(asked) - EVERYDAY), *everyday]
    requests = [row.prompt for row in asked]
    total = len(requests) * 2 + len(safe)

    def replies(weights: Weights, prompts: Sequence[str], before: int) -> list[tuple[str, bool]]:
        """The answers of the model with ``weights``, and whether they are refusals."""

        def told(done: int, _: int) -> None:
            if progress:
                progress(before + done, total)

        with masked.installed(weights) as model:
            chat = HfChatModel(model, tokenizer, batch=batch, progress=told)
            said = [reply.text for reply in chat.replies([ask(p) for p in prompts], Sampling(tokens))]
        judged = Phrases().verdicts([Exchange(p, s) for p, s in zip(prompts, said, strict=True)])
        return [(text, verdict.label == "refused") for text, verdict in zip(said, judged, strict=True)]

    aligned = replies({}, requests, 0)
    plain = replies(masked.plain(), [*requests, *(row.prompt for row in safe)], len(requests))
    refusals = [text for text, refused in aligned if refused]
    unsafe = [
        Preference(asked_plainly(prompt), no, yes)
        for prompt, (no, refused), (yes, gave_up) in zip(requests, aligned, plain[: len(requests)], strict=True)
        if refused and not gave_up and yes.strip()
    ]
    if len(unsafe) < FEWEST:
        raise ConfigError(
            f"the aligned model refuses and the plain fusion answers only {len(unsafe)} of {len(requests)} harmful "
            f"requests, fewer than {FEWEST}",
            "Where the fusion refuses there is nothing to learn; where the aligned model answers it is not aligned. "
            "Measure both (safegraft evaluate), or give --preferences of your own.",
        )
    kept = [
        Preference(asked_plainly(row.prompt), row.answer if gave_up or not text.strip() else text, rng.choice(refusals))
        for row, (text, gave_up) in zip(safe, plain[len(requests) :], strict=True)
    ]
    kept = rng.sample(kept, min(len(kept), len(unsafe)))
    note = (
        f"{len(unsafe)} harmful requests, where the aligned model's refusal is preferred to the plain fusion's answer "
        f"({sum(not r for _, r in aligned)} left out that the aligned model answers), and {len(kept)} harmless ones, "
        "where the fusion's answer is preferred to a refusal"
    )
    return Preferences(ON_POLICY, list(enumerate([*unsafe, *kept], 1)), notes=[note])
