"""Learning a mask through the real pipeline: families, full and LoRA, resuming, memory, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

import chat_models
import masks
import models
from safegraft import merge
from safegraft.cli import app
from safegraft.config import SomfConfig, load
from safegraft.errors import ConfigError, MismatchError, OutputError, UserError
from safegraft.masking.check import Check, Look, findings
from safegraft.masking.memory import Memory, expected, require_room
from safegraft.masking.run import learn_mask
from safegraft.merging.fusion import Fusion
from safegraft.tensors.finetune import FineTune
from safegraft.tensors.masking import Grain

ROWS = [{"prompt": f"How {i}?", "chosen": f"No, sorry {i}.", "rejected": f"Sure: {i}!"} for i in range(14)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """``tuned(family, how)``: an aligned chat model and three fine-tunes of it."""
    root, made = tmp_path_factory.mktemp("somf"), {}
    (root / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))

    def get(family="llama-tied", how="full"):
        if (family, how) not in made:
            place = root / f"{family}-{how}"
            base = models.build(family, place / "base", vocab_size=320, eos_token_id=2, max_position_embeddings=512)
            (base / "chat_template.jinja").unlink()
            chat_models.tokenizer().save_pretrained(base)
            three = [
                masks.adapter(base, place / f"{i}", seed=i)
                if how == "lora" or (how == "mixed" and i)
                else models.finetuned(base, place / f"{i}", seed=i + 1, scale=3e-2)
                for i in range(3)
            ]
            made[family, how] = (base, three)
        return (*made[family, how], root / "pairs.jsonl")

    return get


def settings(made, out, count=1, **changes):
    base, three, pairs = made
    given = {
        "aligned": str(base), "model": [str(m) for m in three[:count]], "preferences": str(pairs), "out": str(out),
        "steps": 6, "lr": 0.1, "batch": 4, "check_pairs": 2, "allow_fewer": True, "save_steps": 2,
    }  # fmt: skip
    return load(SomfConfig, None, given | changes)


CASES = [
    ("llama-tied", "full", 1, {}),
    ("qwen2", "lora", 3, {"granularity": "row"}),
    ("mistral", "mixed", 2, {"granularity": "block", "block": 5, "fusion": "ties"}),
    ("qwen3", "full", 2, {"scope": "attention", "fusion": "dare", "scale": 0.5}),
    ("mistral", "lora", 2, {"mask_factors": True, "fusion": "mean"}),
]


@pytest.mark.parametrize(("family", "how", "count", "changes"), CASES)
def test_what_is_learnt_is_what_is_fused(tuned, tmp_path, family, how, count, changes):
    """The fused checkpoint has the log-probabilities that the masked model in memory had; and the plain one too."""
    made = tuned(family, how)
    said = []
    found = learn_mask(settings(made, tmp_path / "mask", count, **changes), say=said.append)
    assert "Expected memory" in said[0]
    manifest = found.mask.manifest
    assert manifest["learning"]["steps"] == 6
    assert manifest["reference"] == "aligned, frozen"
    assert sum(k.startswith("model") for k in manifest["inputs"]) == count
    assert all(0 < t["continuous"] < 1 for t in manifest["tensors"].values())
    if changes.get("scope") == "attention":
        assert all(".self_attn." in n and "norm" not in n for n in found.mask.weights)
    if "mask_factors" in changes:
        assert "not masking the weights" in manifest["caveats"][0]
        assert any("not masking the weights" in sentence for sentence in said)
    assert models.leftovers(tmp_path) == ["mask"]

    base, three, _ = made
    for kind in ("continuous", "binary"):
        out = tmp_path / kind
        done = merge(three[:count], None, out, base=base, method="somf", mask=str(tmp_path / "mask"),
                     params={"kind": kind})  # fmt: skip
        assert not [w for w in done.warnings if "mask" in w]
        assert margin(out, ROWS, manifest) == pytest.approx(manifest["check"][kind]["margin"], abs=2e-3)
    assert margin(base, ROWS, manifest) == pytest.approx(manifest["check"]["aligned"]["margin"], abs=2e-3)


def margin(folder, rows, manifest):
    """Mean of log p(chosen) − log p(rejected) on the held-out pairs, by the model as transformers loads it."""
    import random

    from safegraft.train.data import encode

    model, tokenizer = chat_models.load(folder)
    order = random.Random(0).sample(rows, len(rows))[: manifest["check"]["pairs"]]

    @torch.no_grad()
    def log_p(prompt, text):
        side = encode(tokenizer, prompt, text)
        scores = model(input_ids=torch.tensor([side.ids])).logits[0].log_softmax(-1)
        return sum(float(scores[i - 1, t]) for i, t in enumerate(side.labels) if t >= 0)

    return sum(log_p(r["prompt"], r["chosen"]) - log_p(r["prompt"], r["rejected"]) for r in order) / len(order)


def test_learning_prefers_the_chosen_answers(tuned, tmp_path):
    found = learn_mask(settings(tuned(), tmp_path / "mask", 2, steps=25, check_pairs=4, fusion="sum"))
    assert found.check.binary.margin > found.check.fused.margin
    assert not found.useless
    assert 0.2 < found.kept < 0.8


def test_a_mask_that_learnt_nothing_is_told():
    worse, better = Look(0.5, 0.5, 0.7), Look(1.0, 0.5, 0.6)
    assert findings(Check(4, better, worse, worse, better)) == []
    assert (
        "on 4 held-out pairs (margin +0.50 against +1.00 nats)" in findings(Check(4, better, better, worse, worse))[0]
    )


def test_permuting_the_fine_tunes_learns_the_same_mask(tuned, tmp_path):
    base, three, pairs = tuned()
    for name, order in (("a", three), ("b", three[::-1])):
        learn_mask(settings((base, order, pairs), tmp_path / name, 3))
    a, b = (models.files_of(tmp_path / n)["mask.safetensors"] for n in "ab")
    assert a == b


class StopError(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"logits_dtype": "bfloat16", "optimizer": "adafactor", "reference": "fused"}])
def test_a_resumed_run_is_the_uninterrupted_one(tuned, tmp_path, changes):
    learn_mask(settings(tuned(), tmp_path / "whole", 2, **changes))

    def stop(what, done, total):
        if (what, done) == ("learning", 5):
            raise StopError

    config = settings(tuned(), tmp_path / "mask", 2, **changes)
    with pytest.raises(StopError):
        learn_mask(config, progress=stop)
    assert models.leftovers(tmp_path) == ["mask.training", "whole"]
    with pytest.raises(OutputError, match="Go on with --resume"):
        learn_mask(config)
    resuming = config.model_copy(update={"resume": True})
    with pytest.raises(OutputError, match="other settings"):
        learn_mask(resuming.model_copy(update={"lr": 1.0}))
    seen = []
    found = learn_mask(resuming, progress=lambda what, done, _: seen.append((what, done)))
    assert [done for what, done in seen if what == "learning"] == [5, 6]
    assert "reference" not in {what for what, _ in seen}
    assert found.mask.manifest["learning"]["steps"] == 6
    assert models.leftovers(tmp_path) == ["mask", "whole"]
    one, other = (models.files_of(tmp_path / n)["mask.safetensors"] for n in ("mask", "whole"))
    assert one == other


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": "gone"}, "gone"),
        ({"aligned": "gone"}, "gone"),
        ({"preferences": "gone"}, "neither 'starter'"),
        ({"preferences": "on-policy", "answer_tokens": 2}, "only 0 of 150 harmful requests"),
        ({"samples": 100, "allow_fewer": False}, "of 100 asked for"),
        ({"check_pairs": 14}, "0 usable pair"),
        ({"layers": "1:9"}, "the model has 2"),
        ({"names": {"mlps": ["x"]}}, "there is no such part"),
        ({"mask_factors": True}, "no LoRA adapter"),
        ({"mask_factors": True, "granularity": "row"}, "masked by element"),
        ({"mask_factors": True, "fusion": "ties"}, "takes whole changes"),
        ({"micro_batch": 3}, "cannot be made of 3"),
        ({"weights": [1.0, 2.0]}, "2 given for 1"),
        ({"fusion": "sums"}, "fusion"),
        ({"resume": True}, "nothing to go on from"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(tuned, tmp_path, changes, why):
    with pytest.raises(UserError, match=why):
        learn_mask(settings(tuned(), tmp_path / "mask", **changes))
    assert models.leftovers(tmp_path) == []


def test_fine_tunes_that_do_not_fit(tuned, tmp_path):
    base, three, pairs = tuned("llama", "lora")
    other = masks.adapter(base, tmp_path / "other", rank=3)
    with pytest.raises(MismatchError, match="different rank"):
        learn_mask(settings((base, [three[0], other], pairs), tmp_path / "mask", 2, mask_factors=True))
    with pytest.raises(ConfigError, match="differs from the aligned model"):
        learn_mask(settings((base, [base], pairs), tmp_path / "mask"))
    (tmp_path / "mask").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        learn_mask(settings((base, three, pairs), tmp_path / "mask"))
    assert learn_mask(settings((base, three, pairs), tmp_path / "mask", force=True)).mask.weights


def test_memory_by_hand(tiny):
    """One 16 × 16 projection of two full fine-tunes, and the rest fused plainly, in bfloat16."""
    base = tiny("llama")
    fine = FineTune.open([str(base), str(base)], base, None)
    name = "model.layers.0.self_attn.q_proj.weight"
    own = sum(fine.base.spec(n).numel for n in fine.base.names())

    def memory(kind, grain, width, adamw):
        return expected(
            fine,
            [name],
            ["model.norm.weight"],
            Fusion(kind),
            grain,
            factors=False,
            width=2,
            logit_width=width,
            adamw=adamw,
        )

    found = memory("sum", Grain(), 4, True)
    assert found == Memory((own + 16) * 2, 256 * 2, 256 * (4 + 4 + 8), 256, 256 * 2 + 24 * 256)
    assert memory("ties", Grain(), 4, True).changes == 2 * 256 * 2
    factored = memory("sum", Grain(), 2, False)
    assert (factored.logits, factored.numbers) == (256 * 4 + 4 * 32, 256)
    assert memory("sum", Grain("row"), 4, True).numbers == 16
    assert memory("sum", Grain("block", 8), 4, True).logits == 4 * 16


@pytest.mark.parametrize(("granularity", "most"), [("row", 0.01), ("block", 0.01)])
def test_rows_and_blocks_cost_at_most_a_hundredth_of_a_7b_model(granularity, most):
    """Llama-2-7B's layers, float32 weights: logits, gradients and AdamW."""
    grain = Grain(granularity)
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    numel = sum(torch.Size(s).numel() for s in layer)
    logits = sum(torch.Size(grain.shape(s)).numel() for s in layer)
    assert 16 * logits <= most * 2 * numel


def test_what_does_not_fit_is_refused_before_anything_is_loaded():
    huge = Memory(10**18, 0, 0, 1, 0)
    with pytest.raises(ConfigError, match="--granularity row or block"):
        require_room(huge, torch.device("cpu"))
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert "activations come on top" in require_room(Memory(int(0.9 * has), 0, 0, 1, 0), torch.device("cpu"))[0]
    assert require_room(Memory(1000, 0, 0, 1, 0), torch.device("cpu")) == []


def test_the_command_line_and_a_signal(tuned, tmp_path):
    base, three, pairs = tuned()
    command = [
        sys.executable, "-m", "safegraft", "somf", "train", "--aligned", str(base), "--model", str(three[0]),
        "--model", str(three[1]), "--preferences", str(pairs), "--out", str(tmp_path / "mask"), "--lr", "0.1",
        "--batch", "4", "--check-pairs", "2", "--allow-fewer", "--fusion", "sum", "--save-steps", "2",
    ]  # fmt: skip
    running = subprocess.Popen([*command, "--steps", "5000"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "mask.training").glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) != 0
    running.stderr.close()
    assert models.leftovers(tmp_path) == ["mask.training"]
    done = CliRunner().invoke(app, [*command[3:], "--steps", "20", "--force"])
    assert done.exit_code == 0, done.output
    assert "Expected memory" in done.stderr
    assert "held-out pairs" in done.stdout
    assert "somf fuse --aligned" in done.stdout.replace("\n", " ")
    assert models.leftovers(tmp_path) == ["mask"]
