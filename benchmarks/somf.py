"""What a learnt mask keeps of safety and of the tasks, beside plain fusion, DARE, RESTA and interference.

    python benchmarks/somf.py WORK --demo DEMO --data DATA [--steps 100 --lr 0.05] [--out docs/results/somf.jsonl]
    python benchmarks/somf_report.py docs/results/somf.jsonl --out docs/results

DEMO is what `safegraft demo --out DEMO` left: aligned, finetuned (its task stands for maths) and vector. Two further
fine-tunes of the aligned model are made in WORK, news classification and instructions answered in Chinese (Django's
messages with its own translations, BSD-3-Clause: `pip install django`), and a mask for one fine-tune and one for all
three. Every variant is measured at several strengths, so that they can be compared at equal cost. What is in WORK or in
the lines of ``--out`` already is not made again; a mask that was interrupted goes on.

The control for density is the learnt mask with its logits shuffled inside every tensor: the same densities exactly, and
the same share of every value.
"""

from __future__ import annotations

import argparse
import gettext
import importlib.util
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from damping import BATCH, TASK_ROWS, prompts, utility
from safegraft import merge
from safegraft.config import SomfConfig
from safegraft.data import task as starter_task
from safegraft.demo.settings import Training
from safegraft.demo.work import train
from safegraft.evaluate.judges.phrases import Phrases
from safegraft.evaluate.models.hf import HfChatModel, load_chat
from safegraft.evaluate.records import Exchange, Sampling, ask
from safegraft.masking.run import learn_mask
from safegraft.tensors.mask import Mask, write_mask
from safegraft.tensors.randomness import generator
from safegraft.train.data import Pair

TASKS = ("maths", "news", "chinese")
SETTINGS: dict[str, tuple[str, ...]] = {"one": ("maths",), "three": TASKS}
LAMBDAS = {"one": (1.0, 0.85, 0.7, 0.5), "three": (0.6, 0.5, 0.4, 0.3)}
"""λ of the fusions, the first one the mask is learnt at. The paper's 0.04 for full fine-tunes leaves next to nothing of
these short ones."""
VECTOR: dict[str, tuple[str, tuple[float, ...]]] = {
    "resta": ("resta", (0.4, 0.8, 1.2, 1.7, 2.4)),
    "interference": ("interference", (1.6, 3.2, 4.8, 6.8, 9.6)),
}
"""Method and strengths, shares of ‖τ‖, of the methods with a vector: into the plain fusion at the first λ."""
MASKED = {"somf-continuous": ("mask", "continuous"), "somf-binary": ("mask", "binary"),
          "shuffled-continuous": ("shuffled", "continuous"), "shuffled-binary": ("shuffled", "binary")}  # fmt: skip
TRAIN_ROWS, DROP = 160, 0.2


def chinese() -> list[Pair]:
    """Requests to put a message of Django into Chinese, with Django's own translation.

    Raises:
        SystemExit: Django is not installed.
    """
    django = importlib.util.find_spec("django")
    if django is None or django.origin is None:
        raise SystemExit("the Chinese task is made of Django's messages: pip install django")
    found: dict[str, str] = {}
    for catalogue in sorted(Path(django.origin).parent.rglob("locale/zh_Hans/LC_MESSAGES/django.mo")):
        with catalogue.open("rb") as file:
            entries = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        # plural forms have tuples for keys, messages with a context a \x04
        found |= {k: v for k, v in entries.items() if isinstance(k, str) and "\x04" not in k and "<" not in k and v}
    return [Pair(f"Translate into Chinese: {k}", v) for k, v in sorted(found.items()) if 11 < len(k) < 200]


@cache
def rows_of(data: Path, task: str) -> tuple[list[Pair], list[Pair]]:
    """Rows of a task to train on and rows held out."""
    if task == "maths":
        held = [*starter_task("select"), *starter_task("report")]
        return [], [Pair(r.prompt, r.answer) for r in held][:TASK_ROWS]
    if task == "chinese":
        pairs = chinese()
    else:
        found = json.loads((data / "utility" / "agnews_train_1k.json").read_text(encoding="utf-8"))
        pairs = [Pair(f"{r['instruction']}\n\n{r['input']}".strip(), r["output"]) for r in found]
    drawn = random.Random(0).sample(pairs, min(len(pairs), TRAIN_ROWS + TASK_ROWS))
    return drawn[TASK_ROWS:], drawn[:TASK_ROWS]


class Work:
    """The models and masks of the benchmark in a folder; what is there already is used."""

    def __init__(self, folder: Path, demo: Path, data: Path, learning: dict[str, Any], every: int = 1) -> None:
        self.folder, self.data, self.learning, self.every = folder, data, learning, every
        self.aligned, self.vector = demo / "aligned", demo / "vector"
        self.tuned = {"maths": demo / "finetuned", **{t: folder / t for t in TASKS[1:]}}
        self.bad, self.good = prompts(data)

    def make(self, settings: Sequence[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for task in {t for s in settings for t in SETTINGS[s]} - {"maths"}:
            if not self.tuned[task].is_dir():
                rows, how = rows_of(self.data, task)[0], Training(1, 2e-4)
                train(self.aligned, rows, how, self.tuned[task], seed=0, label=task, progress=_say)
        for setting in settings:
            if not self.mask(setting).is_dir():
                self._learn(setting)
            if not self.mask(setting, "shuffled").is_dir():
                self._shuffle(setting)

    def models(self, setting: str) -> list[Path]:
        return [self.tuned[task] for task in SETTINGS[setting]]

    def mask(self, setting: str, which: str = "mask") -> Path:
        return self.folder / f"{which}-{setting}"

    def _learn(self, setting: str) -> None:
        out = self.mask(setting)
        config = SomfConfig(
            aligned=str(self.aligned), model=[str(m) for m in self.models(setting)], out=str(out),
            fusion="task-arithmetic", scale=LAMBDAS[setting][0], save_steps=25,
            resume=out.with_name(f"{out.name}.training").is_dir(), **self.learning,
        )  # fmt: skip
        started = time.monotonic()
        found = learn_mask(config, progress=_say, say=lambda sentence: print(sentence, flush=True))
        print(f"{setting}: mask learnt in {time.monotonic() - started:.0f} s, {found.check.to_json()}", flush=True)

    def _shuffle(self, setting: str) -> None:
        mask = Mask(self.mask(setting))
        logits = {}
        for name in mask.names():
            s = mask.read(name)
            logits[name] = s.reshape(-1)[torch.randperm(s.numel(), generator=generator(0, name))].reshape(s.shape)
        write_mask(self.mask(setting, "shuffled"), logits, dict(mask.manifest), force=False)

    @contextmanager
    def fused(self, setting: str, **settings: Any) -> Iterator[Path]:
        """A fusion of the setting's models, in a folder that goes with the block."""
        out = self.folder / "fused"
        shutil.rmtree(out, ignore_errors=True)
        merge(self.models(setting), None, out, base=self.aligned, force=True, **settings)
        yield out
        shutil.rmtree(out)

    def plain(self, setting: str, scale: float) -> Path:
        """The plain fusion that vectors are put into, kept."""
        out = self.folder / f"plain-{setting}"
        if not out.is_dir():
            weights = [scale] * len(self.models(setting))
            merge(self.models(setting), None, out, base=self.aligned, method="task_arithmetic", weights=weights)
        return out

    def cells(self, setting: str) -> Iterator[tuple[str, float, Callable[[], Any]]]:
        """(variant, strength, how to make its model) in the order in which they are measured."""
        scales, count = LAMBDAS[setting][:: self.every], len(self.models(setting))
        for scale in scales:
            many = {"method": "task_arithmetic", "weights": [scale] * count}
            yield "plain", scale, lambda many=many: self.fused(setting, **many)
            for variant, (which, kind) in MASKED.items():
                under = {
                    "method": "somf",
                    "mask": str(self.mask(setting, which)),
                    "params": {"kind": kind, "scale": scale},
                }
                yield variant, scale, lambda under=under: self.fused(setting, **under)
            drop = {"method": "dare", "weights": [scale] * count, "params": {"drop": DROP}}
            # one fine-tune at weight 1 without a vector is kept as it is, whatever the method
            if drop["weights"] != [1.0]:
                yield "dare", scale, lambda drop=drop: self.fused(setting, **drop)
        for variant, (method, strengths) in VECTOR.items():
            for strength in strengths:
                yield variant, strength, lambda m=method, s=strength: self._grafted(setting, m, s)

    @contextmanager
    def _grafted(self, setting: str, method: str, strength: float) -> Iterator[Path]:
        out = self.folder / "grafted"
        shutil.rmtree(out, ignore_errors=True)
        plain = self.plain(setting, LAMBDAS[setting][0])
        merge(plain, self.vector, out, base=self.aligned, method=method, strength=strength, match_norm=True)
        yield out
        shutil.rmtree(out)


def _say(label: str, done: int, total: int) -> None:
    print(f"\r{label} {done}/{total} ", end="" if done < total else "\n", flush=True)


def measure(work: Work, settings: Sequence[str], out: Path, each: int | None, tokens: int) -> None:
    """Append a line for every cell that ``out`` lacks. ``each``: at most so many prompts of a kind, and task rows."""
    bad, good = work.bad[:each], work.good[:each]
    held = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    seen = {(r["setting"], r["variant"], r["strength"]) for r in held}
    out.parent.mkdir(parents=True, exist_ok=True)
    for setting in settings:

        def cell(folder: Path, variant: str, strength: float, setting: str = setting) -> None:
            started = time.monotonic()
            model, tokenizer = load_chat(folder)
            asked = [*bad, *good]
            said = HfChatModel(model, tokenizer, batch=BATCH).replies([ask(p) for p in asked], Sampling(tokens))
            judged = Phrases().verdicts([Exchange(p, s.text) for p, s in zip(asked, said, strict=True)])
            bits = "".join("1" if v.label == "refused" else "0" for v in judged)
            line: dict[str, Any] = {
                "setting": setting, "variant": variant, "strength": strength, "learning": work.learning,
                "tokens": tokens,
                "harmful": bits[: len(bad)], "harmless": bits[len(bad) :], "tasks": {},
            }  # fmt: skip
            for task in SETTINGS[setting]:
                losses, right, counts = utility(model, tokenizer, rows_of(work.data, task)[1][:each])
                line["tasks"][task] = {"loss": losses, "right": right, "tokens": counts}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            loss = [sum(t["loss"]) / len(t["loss"]) for t in line["tasks"].values()]
            print(
                f"{setting} {variant:20} {strength:4} unsafe {line['harmful'].count('0') / len(bad):.2f} over-refusal "
                f"{line['harmless'].count('1') / len(good):.2f} loss {' '.join(f'{x:.3f}' for x in loss)} "
                f"({time.monotonic() - started:.0f} s)",
                flush=True,
            )

        if (setting, "aligned", 0.0) not in seen:
            cell(work.aligned, "aligned", 0.0)
        for variant, strength, made in work.cells(setting):
            if (setting, variant, strength) not in seen:
                with made() as folder:
                    cell(folder, variant, strength)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scope", default="all")
    parser.add_argument("--granularity", default="element")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument(
        "--each", type=int, help="at most so many prompts of a kind and rows of a task, for a quick try"
    )
    parser.add_argument("--every", type=int, default=1, help="only every so many-th λ, from the first")
    parser.add_argument("--preferences", default="on-policy", help="of `safegraft somf train`")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    parser.add_argument("--out", type=Path, default=Path("docs/results/somf.jsonl"))
    given = parser.parse_args()
    how = {k: getattr(given, k) for k in ("steps", "lr", "batch", "scope", "granularity", "max_length", "preferences")}
    todo = Work(given.work, given.demo, given.data, how, given.every)
    todo.make(given.settings)
    measure(todo, given.settings, given.out, given.each, given.tokens)
