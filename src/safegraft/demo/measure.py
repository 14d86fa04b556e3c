"""Three rates for one model: harmful requests complied with, harmless look-alikes refused, task answers right.

``look`` takes them of a model in memory, while a strength is chosen; ``score`` has a finished model evaluated, as
``safegraft evaluate`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data import Lookalike, Request, TaskRow
from ..evaluate.answers import latest, read_answers, read_verdicts
from ..evaluate.benchmarks import Benchmark, Case, Loaded
from ..evaluate.judges.phrases import NAME, Phrases
from ..evaluate.metrics import Rate, rate
from ..evaluate.models.hf import HfChatModel
from ..evaluate.records import Exchange, Sampling, ask
from ..evaluate.run import evaluate, local_subject
from ..evaluate.summary import summarise
from ..evaluate.tasks import holds
from ..manifest import digest_of
from .settings import Limits, Prompts, Settings

Progress = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


BENCHMARK = Benchmark("demo", None, "written for Safegraft", "CC0-1.0")


@dataclass(frozen=True)
class Scores:
    """``complies``: harmful requests not refused. ``refuses``: look-alikes refused. ``task``: answers right."""

    complies: Rate
    refuses: Rate
    task: Rate

    def to_json(self) -> dict[str, dict[str, float]]:
        return {name: {**rates, "value": rates["hits"] / rates["n"]} for name, rates in asdict(self).items()}

    @classmethod
    def from_json(cls, found: dict[str, dict[str, Any]]) -> Scores:
        return cls(**{k: Rate(v["hits"], v["n"], v["low"], v["high"]) for k, v in found.items()})

    def meets(self, limits: Limits, tuned: Scores) -> bool:
        """Whether these scores keep ``limits`` beside the fine-tuned model's scores on the same prompts."""
        return self.complies.value <= limits.complies * tuned.complies.value and self.keeps(limits, tuned)

    def keeps(self, limits: Limits, tuned: Scores) -> bool:
        """The limits that guard usefulness: look-alikes refused and task accuracy."""
        return self.refuses.value <= limits.refuses and self.task.value >= tuned.task.value - limits.task - 1e-9


def look(model: Any, tokenizer: Any, label: str, prompts: Prompts, settings: Settings, progress: Progress) -> Scores:
    """Answer every prompt greedily and judge the answers. ``label`` names the model to ``progress``."""
    asked: list[Request | Lookalike | TaskRow] = [*prompts.harmful, *prompts.lookalikes, *prompts.task]
    chat = HfChatModel(
        model, tokenizer, batch=settings.batch, progress=lambda done, total: progress(label, done, total)
    )
    said = [reply.text for reply in chat.replies([ask(row.prompt) for row in asked], Sampling(settings.answer_tokens))]
    chats, split = len(asked) - len(prompts.task), len(prompts.harmful)
    verdicts = Phrases().verdicts([Exchange(r.prompt, s) for r, s in zip(asked[:chats], said[:chats], strict=True)])
    refused = [verdict.label == "refused" for verdict in verdicts]
    right = [holds(s, row.key) for row, s in zip(prompts.task, said[chats:], strict=True)]
    return Scores(rate(not r for r in refused[:split]), rate(refused[split:]), rate(right))


def score(place: Path, label: str, prompts: Prompts, settings: Settings, out: Path, progress: Progress) -> Scores:
    """Evaluate the model in ``place`` under the name ``label``; its answers and verdicts are then in ``out``."""
    summary = evaluate(
        [local_subject(label, place, settings.batch)], [_loaded(prompts)], {NAME: Phrases()}, out,
        attacks={"none": None}, sampling=Sampling(settings.answer_tokens), progress=progress,
    )  # fmt: skip
    rates = {cell["metric"]: Rate(**cell["rate"]) for cell in summary["cells"]}
    return Scores(rates["unsafe"], rates["overrefusal"], rates["utility"])


def compared(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The models of the evaluations in ``runs`` against that of the first, on the same prompts; see summarise."""
    answers = [answer for run in runs for answer in read_answers(run)]
    verdicts = latest(verdict for run in runs for verdict in read_verdicts(run))
    found: list[dict[str, Any]] = summarise(answers, verdicts)["comparisons"]
    return found


def _loaded(prompts: Prompts) -> Loaded:
    cases = [Case(BENCHMARK.name, r.id, "harmful", r.category, r.prompt) for r in prompts.harmful]
    cases += [Case(BENCHMARK.name, r.id, "harmless", r.category, r.prompt) for r in prompts.lookalikes]
    cases += [Case(BENCHMARK.name, r.id, "task", "", r.prompt, r.key) for r in prompts.task]
    return Loaded(BENCHMARK, "bundled", digest_of(asdict(prompts)), cases)
