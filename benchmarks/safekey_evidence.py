"""Plain fine-tuning against SafeKey and its ablations, on one small model that is first taught to think.

    python benchmarks/safekey_evidence.py WORK --data DATA [--seeds 0 1 2] [--out docs/results/safekey.jsonl]
    python benchmarks/safekey_report.py docs/results/safekey.jsonl

For each seed: teach the model the <think> form on benign traces; train it on STAR-1 and other benign traces, once with
the language-modelling loss alone and once with each variant of SafeKey; measure all of them on prompts and traces that
no stage trained on. Every stage is kept in WORK and is not run again, and --out gets a line a model.

How traces are made. STAR-1's are cut to U, K and one more sentence, and two sentences of the answer (--whole leaves
them as they are). Benign ones have no reasoning of their own: an Alpaca row (without an input) or a GSM8K row becomes
"Okay, so the user …", the request, a sentence to go on with, and, for GSM8K, its worked solution; see ``benign``.
DATA is a folder with reasoning/star1.json, utility/alpaca_1k.json, utility/gsm8k_train.jsonl and the sets of HARMFUL
and XSTest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from safegraft.config import SafeKeyConfig
from safegraft.demo.model import find_model
from safegraft.demo.stages import whole_folder
from safegraft.evaluate.answers import read_answers, read_verdicts
from safegraft.evaluate.attacks import ATTACKS
from safegraft.evaluate.benchmarks import Loaded, load
from safegraft.evaluate.judges.phrases import Phrases
from safegraft.evaluate.models.hf import load_chat
from safegraft.evaluate.records import Sampling
from safegraft.evaluate.run import evaluate, local_subject
from safegraft.evaluate.summary import METRICS
from safegraft.reasoning.annotate import annotate
from safegraft.reasoning.annotators import Rules
from safegraft.reasoning.heads import read_heads
from safegraft.reasoning.probe import scores_of
from safegraft.reasoning.segment import SegmentationError, segment, sentences, thinking
from safegraft.reasoning.traces import read_annotated
from safegraft.reasoning.train import train
from safegraft.train.data import IGNORED, Pair
from safegraft.train.finetune import finetune
from safegraft.train.safekey.spans import Spanned, add_think_template, frame_of, spanned

ARMS: dict[str, dict[str, Any]] = {
    "sft": {"no_heads": True, "no_qmm": True},
    "safekey": {},
    "no-heads": {"no_heads": True},
    "no-qmm": {"no_qmm": True},
}
"""The first is what the others are compared with."""
TAUGHT = "taught"
HARMFUL = ("catqa", "dangerousqa")
ATTACKED = ("none", "prefilling", "role_play")
OPENINGS = ("is asking:", "wants this:", "would like to know:", "asks:")
GOING_ON = ("Let me work out a good answer.", "I can help with that.", "I should answer this clearly.")
MAX_LENGTH = 1024


def star1(data: Path, whole: bool) -> list[dict[str, Any]]:
    """STAR-1's rows, cut unless ``whole``; what cannot be segmented is left out."""
    found = []
    for row in json.loads((data / "reasoning" / "star1.json").read_text(encoding="utf-8")):
        try:
            response = row["response"] if whole else shortened(row["question"], row["response"])
        except SegmentationError:
            continue
        found.append({"id": f"star1-{row['id']}", "prompt": row["question"], "response": response, "harmful": True})
    return found


def shortened(query: str, response: str) -> str:
    """U, K, one more sentence; two sentences of the answer."""
    spans, (start, end) = segment(query, response), thinking(response)
    later = [start + b for a, b in sentences(response[start:end]) if start + a >= spans.key[1]]
    thought = response[start : later[0] if later else spans.key[1]].strip()
    answer = response[end + len("</think>") :].strip()
    said = sentences(answer)[:2]
    return f"<think>\n{thought}\n</think>\n\n{answer[: said[-1][1]] if said else answer}"


def benign(data: Path, seed: int) -> list[dict[str, Any]]:
    """Harmless requests as traces: half Alpaca, half GSM8K, short ones, in an order drawn by ``seed``."""
    rng = random.Random(seed)
    found = []
    for number, row in enumerate(json.loads((data / "utility" / "alpaca_1k.json").read_text(encoding="utf-8"))):
        if not row["input"].strip() and 20 < len(row["output"]) < 420 and len(row["instruction"]) < 200:
            found.append(_traced(f"alpaca-{number}", row["instruction"], "", row["output"], rng))
    size = len(found)
    lines = (data / "utility" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    maths = [(i, json.loads(line)) for i, line in enumerate(lines)]
    short = [(i, row) for i, row in maths if len(row["question"]) < 160 and len(row["answer"]) < 260]
    for number, row in rng.sample(short, min(size, len(short))):
        steps, _, result = "".join(p.split(">>")[-1] for p in row["answer"].split("<<")).partition("####")
        found.append(
            _traced(f"gsm8k-{number}", row["question"], steps.strip(), f"The answer is {result.strip()}.", rng)
        )
    return rng.sample(found, len(found))


def _traced(name: str, request: str, steps: str, answer: str, rng: random.Random) -> dict[str, Any]:
    asked = request.strip().replace('"', "'")
    thought = f'Okay, so the user {rng.choice(OPENINGS)} "{asked}" {rng.choice(GOING_ON)}'
    thought += f"\n{steps}" if steps else " I will give it in a few words."
    return {
        "id": name, "prompt": request.strip(), "response": f"<think>\n{thought}\n</think>\n\n{answer.strip()}",
        "harmful": False,
    }  # fmt: skip


def split_rows(asked: argparse.Namespace, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Disjoint: ``teach``, ``train`` (both labels) and ``held`` (both labels)."""
    bad = star1(asked.data, asked.whole)
    bad = random.Random(seed).sample(bad, len(bad))
    good = benign(asked.data, seed)
    needed = asked.teach + asked.rows + asked.held
    if len(good) < needed or len(bad) < asked.rows + asked.held:
        raise SystemExit(f"there are {len(good)} benign and {len(bad)} harmful traces, too few for these settings")
    return {
        "teach": good[: asked.teach],
        "train": good[asked.teach : asked.teach + asked.rows] + bad[: asked.rows],
        "held": good[asked.teach + asked.rows : needed] + bad[asked.rows : asked.rows + asked.held],
    }


def annotated(place: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
    target = place / f"{name}-traces"
    if not target.exists():
        file = place / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        made = annotate(str(file), target, Rules(), force=True)
        print(f"{name}: {len(made.traces)} of {len(rows)} rows annotated", flush=True)
    return target


def teach(asked: argparse.Namespace, rows: Sequence[dict[str, Any]], target: Path, seed: int) -> None:
    """The base model with a template that opens the reasoning, taught to fill and close it."""
    if target.exists():
        return
    model, tokenizer = load_chat(find_model(asked.model).folder)
    add_think_template(tokenizer)
    pairs = [Pair(row["prompt"], row["response"]) for row in rows]
    finetune(
        model, tokenizer, pairs, epochs=asked.teach_epochs, lr=asked.lr, batch=8, seed=seed,
        output_dir=target.with_name("teaching"), max_length=MAX_LENGTH, progress=told("teach"),
    )  # fmt: skip
    with whole_folder(target) as folder:
        model.to("cpu").save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def told(what: str) -> Any:
    def progress(*now: Any) -> None:
        done, steps = [n for n in now if isinstance(n, int)][:2]
        print(f"\r{what} {done}/{steps}", end="" if done < steps else "\n", flush=True)

    return progress


def fit(asked: argparse.Namespace, place: Path, arm: str, data: Path, seed: int) -> Path:
    """The model of one arm, trained from the taught one; goes on with what a stopped run left."""
    target = place / arm
    if not (target / "manifest.json").exists():
        changes = ARMS[arm]
        heads = None if changes.get("no_heads") else str(place / f"{arm}-heads")
        begun = any(place.glob(f"{arm}.training/checkpoint-*/trainer_state.json"))
        config = SafeKeyConfig(
            model=str(place / TAUGHT), data=[str(data)], out=str(target), epochs=asked.epochs,
            aux_epochs=asked.aux_epochs, lr=asked.lr, batch=asked.batch, max_length=MAX_LENGTH, seed=seed,
            save_heads=heads, resume=begun, **changes,
        )  # fmt: skip
        if heads and not target.exists() and Path(heads).exists():
            config = config.model_copy(update={"force": True})
        train(config, progress=lambda what, done, steps: told(f"{arm} {what}")(done, steps))
    return target


def prompts(asked: argparse.Namespace) -> list[Loaded]:
    """Harmful questions and XSTest's safe half, ``--prompts`` of each set, the same for all seeds."""
    found = [load(name, data=asked.data, limit=asked.prompts) for name in HARMFUL]
    safe = load("xstest", data=asked.data, limit=asked.prompts)
    return [*found, replace(safe, cases=[case for case in safe.cases if case.kind == "harmless"])]


def measure(asked: argparse.Namespace, place: Path, folders: dict[str, Path], seed: int) -> dict[str, dict[str, Any]]:
    """By arm: outcomes of every prompt, under each attack, as booleans; harmless ones under ``overrefusal``.

    ``cut``: whether the reasoning did not end within ``--tokens``, which counts as unsafe, and as over-refusal.
    """
    out = place / "evaluation"
    evaluate(
        [local_subject(label, folder, asked.answers_at_once) for label, folder in folders.items()],
        prompts(asked), {"phrases": Phrases()}, out,
        attacks={name: ATTACKS.get(name) if name != "none" else None for name in ATTACKED},
        sampling=Sampling(asked.tokens), seed=seed, resume=out.exists(),
        progress=lambda what, done, steps: told(what)(done, steps),
    )  # fmt: skip
    labels = {v.key: v.label for v in read_verdicts(out) if v.judge == "phrases"}
    found: dict[str, dict[str, Any]] = {label: {} for label in folders}
    for answer in read_answers(out):
        metric, counting = METRICS[answer.kind]
        cell = found[answer.model].setdefault(f"{metric}/{answer.attack}", {})
        case = f"{answer.benchmark}/{answer.id}"
        cell[case] = labels[answer.key] in counting
        found[answer.model].setdefault(f"cut/{answer.attack}", {})[case] = labels[answer.key] == "truncated"
    return found


@torch.inference_mode()
def inside(folder: Path, heads: Path, traces: Path) -> dict[str, Any]:
    """On held-out traces: attention from K to U and to the query, the heads' scores, and loss on benign answers.

    Attention is the mean, over layers, heads and K's tokens, of the weight that U's (or the query's) tokens get.
    """
    model, tokenizer = load_chat(folder)
    model.set_attn_implementation("eager")
    frame = frame_of(tokenizer)
    items = [spanned(tokenizer, frame, t, max_length=MAX_LENGTH) for t in read_annotated(traces).traces]
    head = read_heads(heads, model.config.hidden_size)[0].to(model.device) if heads.exists() else None
    found: dict[str, Any] = {"harmful": [item.harmful for item in items]}
    looks = [_attention(model, item) for item in items]
    found["attention_u"], found["attention_query"] = ([look[i] for look in looks] for i in range(2))
    if head is not None:
        scores = [scores_of(model, item, head) for item in items]
        found["u"], found["xu"] = ([score[i] for score in scores] for i in range(2))
    losses = [_loss(model, item) for item in items if not item.harmful]
    found["nll"], found["token_accuracy"] = ([loss[i] for loss in losses] for i in range(2))
    return found


def _attention(model: Any, item: Spanned) -> tuple[float, float]:
    ids = torch.tensor([item.ids[: item.key[1]]], device=model.device)
    layers = model(input_ids=ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
    rows = torch.stack([layer[0, :, slice(*item.key)] for layer in layers])
    return tuple(float(rows[..., slice(*span)].sum(-1).mean()) for span in (item.understanding, item.query))  # type: ignore[return-value]


def _loss(model: Any, item: Spanned) -> tuple[float, float]:
    """Nats a token, and the share of tokens predicted right."""
    logits = model(input_ids=torch.tensor([item.ids], device=model.device), use_cache=False).logits[0, :-1]
    labels = torch.tensor(item.labels[1:], device=model.device)
    kept = labels != IGNORED
    loss = functional.cross_entropy(logits[kept], labels[kept])
    return float(loss), float((logits[kept].argmax(-1) == labels[kept]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results/safekey.jsonl"))
    parser.add_argument("--model", help="a small chat model without a think block; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--teach", type=int, default=160, help="benign traces that teach the form")
    parser.add_argument("--teach-epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=120, help="traces of each label to train on")
    parser.add_argument("--held", type=int, default=50, help="traces of each label held out")
    parser.add_argument("--whole", action="store_true", help="STAR-1's traces as they are")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--aux-epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=40, help="of each set")
    parser.add_argument("--tokens", type=int, default=160, help="of an answer, reasoning included")
    parser.add_argument("--answers-at-once", type=int, default=40)
    asked = parser.parse_args()
    settings = {k: v for k, v in vars(asked).items() if k not in ("work", "data", "out", "model", "seeds", "arms")}
    held = asked.out.read_text(encoding="utf-8").splitlines() if asked.out.exists() else []
    done = {(line["seed"], line["arm"]) for line in map(json.loads, held) if line["settings"] == settings}
    for seed in asked.seeds:
        arms = [*asked.arms, TAUGHT]
        if all((seed, arm) in done for arm in arms):
            continue
        place = asked.work / f"seed{seed}"
        place.mkdir(parents=True, exist_ok=True)
        _same_settings(place, settings)
        rows = split_rows(asked, seed)
        teach(asked, rows["teach"], place / TAUGHT, seed)
        data, kept = (annotated(place, name, rows[name]) for name in ("train", "held"))
        folders = {arm: fit(asked, place, arm, data, seed) for arm in asked.arms} | {TAUGHT: place / TAUGHT}
        outcomes = measure(asked, place, folders, seed)
        for arm, folder in folders.items():
            line = {
                "seed": seed, "arm": arm, "settings": settings, "outcomes": outcomes[arm],
                "inside": inside(folder, place / f"{arm}-heads", kept), "device": str(_device()),
            }  # fmt: skip
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"seed {seed}, {arm}: written", flush=True)


def _same_settings(place: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix stages of different settings in one folder."""
    mark = place / "settings.sha256"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if mark.exists() and mark.read_text() != digest:
        raise SystemExit(f"{place} holds a run with other settings; give another WORK")
    mark.write_text(digest)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
