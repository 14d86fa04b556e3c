"""Safe Delta: numbers by hand, what must hold for any weight, and the way from calibration to a loaded model."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chat_models
import models
from safegraft import merge
from safegraft.errors import CheckpointError, ConfigError, MismatchError, OutputError
from safegraft.merging import methods as _methods
from safegraft.merging.execute import merge_tensor
from safegraft.merging.live import graft
from safegraft.merging.method import METHODS, GlobalStats
from safegraft.merging.methods.calibrated import accepted, chosen, compensated, damage
from safegraft.tensors.calibration import Calibration
from safegraft.tensors.lowrank import Delta
from safegraft.train.calibrate import calibrate

assert _methods
METHOD = METHODS.get("safe_delta")


def run(base, delta, hessian, strength, **params):
    return merge_tensor(
        METHOD, METHOD.parameters(params), GlobalStats(1.0, 0.0, strength), name="w", base=base,
        tasks=[Delta(tuple(delta.shape), full=delta)], safety=Delta(tuple(delta.shape)), hessian=hessian,
    )  # fmt: skip


BASE = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
DELTA = torch.tensor([[1.0, 1.0], [2.0, 1.0]])
HESSIAN = torch.tensor([[1.0, 1.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("strength", "expected", "share"),
    [
        (1.1, [[1.0, -0.5], [0.0, 0.0]], 0.25),
        (1.2, [[1.0, -0.5], [2.0, -1.0]], 0.5),
        (1.34, [[1.0, 1.0], [2.0, -1.0]], 0.75),
    ],
)
def test_by_hand(strength, expected, share):
    """H⁻¹ = [[2, −1], [−1, 1]], so prices ½·(½, 1): column 0 first, δ² = 1, 4 at ¼ (0.25, 1.25 in all), then 1, 1 at ½.
    The base's own damage is 4·¼ = 1, so ε = strength² = 1.21, 1.44, 1.7956. A row that accepts its first entry only
    makes up for it with −δ·H_01/H_11 = −δ/2."""
    out = run(BASE, DELTA, HESSIAN, strength, damping=0.0)
    assert torch.allclose(out.dense(), torch.tensor(expected))
    assert out.figures["accepted"] == share
    assert out.figures["damage"] == pytest.approx(
        damage(torch.tensor(expected), HESSIAN) / damage(DELTA, HESSIAN), rel=1e-6
    )


def test_the_last_entry_makes_the_fine_tune():
    """1.25 + 2·0.5 = 2.25 = 1.5²."""
    assert run(BASE, DELTA, HESSIAN, 1.5, damping=0.0) is None
    assert run(BASE, DELTA, HESSIAN, 1.49, damping=0.0) is not None


def test_no_calibration_or_unused_inputs_keep_the_fine_tune():
    assert run(BASE, DELTA, None, 0.0) is None
    assert run(BASE, DELTA, torch.zeros(2, 2), 0.0) is None


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(0, 999), st.floats(0.0, 3.0))


@CASES
def test_properties(m, n, rows, seed, strength):
    base, delta, inputs = normal((m, n), seed), normal((m, n), seed + 1), normal((rows, n), seed + 2)
    hessian = inputs.T @ inputs / rows
    assert torch.equal(run(base, delta, hessian, 0.0).dense(), torch.zeros(m, n))
    assert run(base, delta, hessian, 1e6) is None
    out = run(base, delta, hessian, strength)
    if out is None:
        return
    plain = run(base, delta, hessian, strength, compensate=False)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n)
    assert damage(out.dense(), damped) <= damage(plain.dense(), damped) * (1 + 1e-4) + 1e-6
    assert damage(out.dense(), damped) <= damage(delta, damped) * (1 + 1e-4) + 1e-6
    taken = plain.dense() != 0
    assert torch.equal(out.dense()[taken], delta[taken])
    assert int(taken.sum()) == round(out.figures["accepted"] * m * n)


@CASES
def test_a_larger_budget_accepts_more_and_stays_within(m, n, rows, seed, budget):
    delta, price = normal((m, n), seed), normal((n,), seed + 1).abs() + 0.01
    small, large = accepted(delta, price.double(), budget), accepted(delta, price.double(), 2 * budget)
    first, second = chosen(delta, small) != 0, chosen(delta, large) != 0
    assert bool((second | ~first).all())
    assert float((chosen(delta, small).double().square() * price).sum()) <= budget * (1 + 1e-9)


def test_compensation_is_the_least_there_is():
    """Against the row by row solution, the accepted entries pinned."""
    delta, inputs = normal((6, 8), 0), normal((40, 8), 1)
    hessian = (inputs.T @ inputs / 40).double()
    choice = accepted(delta, torch.rand(8, generator=torch.Generator().manual_seed(2)).double(), 6.0)
    assert 0 < int(choice.columns.sum()) < 8
    assert 0 < int(choice.rows.sum()) < 6
    out, kept = compensated(delta, hessian, choice), chosen(delta, choice) != 0
    for row, (given_row, pinned) in zip(out.double(), zip(delta.double(), kept, strict=True), strict=True):
        free = ~pinned
        expected = -torch.linalg.solve(hessian[free][:, free], hessian[free][:, pinned] @ given_row[pinned])
        assert torch.allclose(row[free], expected, atol=1e-5)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrated")
    base = chat_models.build(root / "base", tied=False)
    models.finetuned(base, root / "task", scale=1e-2)
    rows = [{"prompt": "How do I bake bread?"}, {"prompt": "Wait", "answer": "I'm sorry, but I can't help with that."}]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    calibrate(base, root / "cal", prompts=root / "rows.jsonl")
    return root


def test_moments_are_those_of_the_inputs(chat):
    """q, k and v (gate and up) share one matrix, which is the mean of xᵀx over every token of both prompts."""
    made = Calibration(chat / "cal")
    shared = {n: i["input"] for n, i in made.manifest["weights"].items()}
    first = "model.layers.0.self_attn."
    assert shared[f"{first}q_proj.weight"] == shared[f"{first}k_proj.weight"] == shared[f"{first}v_proj.weight"]
    assert shared["model.layers.1.mlp.gate_proj.weight"] == shared["model.layers.1.mlp.up_proj.weight"]
    assert len(shared) == 14
    assert len(set(shared.values())) == 8

    model, tokenizer = chat_models.load(chat / "base")
    user = [{"role": "user", "content": "How do I bake bread?"}]
    texts = [tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)]
    turns = [{"role": "user", "content": "Wait"},
             {"role": "assistant", "content": "I'm sorry, but I can't help with that."}]  # fmt: skip
    texts.append(tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n"))
    seen = []
    module = model.model.layers[1].mlp.down_proj
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().reshape(-1, 48)))
    for text in texts:
        model(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    inputs = torch.cat(seen)
    from safegraft.tensors.source import Workspace

    found = made.hessian("model.layers.1.mlp.down_proj.weight", Workspace())
    assert torch.allclose(found, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)
    assert made.manifest["tokens"] == len(inputs)


def test_any_memory_gives_the_same_calibration(chat, tmp_path):
    counted = []
    calibrate(
        chat / "base", tmp_path / "cal", prompts=chat / "rows.jsonl", memory=1,
        progress=lambda done, total: counted.append((done, total)),
    )  # fmt: skip
    assert counted[-1] == (16, 16)
    one, other = (models.weights(f) for f in (chat / "cal", tmp_path / "cal"))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_stopped_calibration_goes_on_with_the_pass_it_was_in(chat, tmp_path):
    settings = {"prompts": chat / "rows.jsonl", "memory": 1}
    per_pass = 2  # two prompts

    def stop(done, total):
        if done == 3 * per_pass + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(chat / "base", tmp_path / "cal", progress=stop, **settings)
    assert models.leftovers(tmp_path) == ["cal.partial"]
    with pytest.raises(OutputError, match="did not finish"):
        calibrate(chat / "base", tmp_path / "cal", **settings)
    with pytest.raises(OutputError, match="other inputs or settings"):
        calibrate(chat / "base", tmp_path / "cal", resume=True, **settings | {"max_length": 9})
    counted = []
    made = calibrate(
        chat / "base", tmp_path / "cal", resume=True, progress=lambda *now: counted.append(now), **settings
    )
    assert counted[:4] == [(2, 16), (4, 16), (6, 16), (7, 16)]  # three passes are there, the fourth runs anew
    assert (tmp_path / "cal" / "calibration.safetensors").read_bytes() == (
        chat / "cal" / "calibration.safetensors"
    ).read_bytes()
    whole = Calibration(chat / "cal")
    assert made.manifest["rows"] == whole.manifest["rows"]
    assert made.manifest["weights"] == whole.manifest["weights"]
    assert models.leftovers(tmp_path) == ["cal"]


def test_the_starter_set_is_drawn_by_seed(chat, tmp_path):
    for seed, name in [(1, "a"), (1, "b"), (2, "c")]:
        calibrate(chat / "base", tmp_path / name, limit=3, max_length=64, scope="attention", seed=seed)
    a, b, c = (models.weights(tmp_path / n) for n in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_budgets_on_a_model(chat, tmp_path):
    """Nothing accepted: the base where there is a calibration; a huge budget: the fine-tune's very bytes."""
    settings = {"base": chat / "base", "method": "safe_delta", "calibration": str(chat / "cal")}
    none = merge(chat / "task", None, tmp_path / "none", strength=0, **settings)
    merge(chat / "task", None, tmp_path / "all", strength=1e9, **settings)
    some = merge(chat / "task", None, tmp_path / "some", strength=0.02, workers=2, **settings)
    base, task, a = (models.weights(f) for f in (chat / "base", chat / "task", tmp_path / "none"))
    known = Calibration(chat / "cal").names()
    assert all(torch.equal(a[n], (base if n in known else task)[n]) for n in task)
    assert (tmp_path / "all" / "model.safetensors").read_bytes() == (chat / "task" / "model.safetensors").read_bytes()
    assert all(0 < f["accepted"] < 1 and f["damage"] < 1 for f in some.tensors.values())
    assert len(some.tensors) == 14
    assert none.merged == 14
    assert some.warnings == []
    assert "model.embed_tokens.weight" in some.notes[0]
    manifest = json.loads((tmp_path / "some" / "manifest.json").read_text())
    assert manifest["inputs"]["calibration"]["inputs"]["model"]["name"].endswith("base")
    assert "budget" in (tmp_path / "some" / "README.md").read_text()
    model, _ = chat_models.load(tmp_path / "some")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_adapter_as_the_fine_tune(chat, tmp_path):
    """It gives what the same fine-tune gives merged into its base."""
    from peft import LoraConfig, get_peft_model

    model, _ = chat_models.load(chat / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter += 0.05 * normal(parameter.shape, len(name))
        tuned.save_pretrained(tmp_path / "adapter")
        tuned.merge_and_unload().save_pretrained(tmp_path / "whole")
    settings = {"base": chat / "base", "method": "safe_delta", "calibration": str(chat / "cal"), "strength": 0.02}
    found = {}
    for name in ("adapter", "whole"):
        summary = merge(tmp_path / name, None, tmp_path / f"{name}-out", **settings)
        found[name] = weights = models.weights(tmp_path / f"{name}-out")
        assert sum("accepted" in f for f in summary.tensors.values()) == 4
    assert all(torch.allclose(weights[n], found["adapter"][n], atol=1e-5) for n in found["adapter"])


def test_workers_change_nothing(chat, tmp_path):
    settings = {"base": chat / "base", "method": "safe_delta", "calibration": str(chat / "cal"), "strength": 0.02}
    for workers in (1, 3):
        merge(chat / "task", None, tmp_path / str(workers), workers=workers, **settings)
    one, three = (models.weights(tmp_path / w) for w in ("1", "3"))
    assert all(torch.equal(one[n], three[n]) for n in one)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "safegraft calibrate BASE"),
        ({"calibration": "cal", "vector": "v"}, "uses no safety vector"),
        ({"calibration": "cal", "match_norm": True}, "no share"),
        ({"calibration": "cal", "as_adapter": True}, "as-adapter"),
        ({"calibration": "cal", "method": "resta", "vector": "v"}, "resta uses no calibration"),
        ({"calibration": "base"}, "is not a calibration"),
    ],
)
def test_what_does_not_go_together_is_one_error(chat, tmp_path, settings, said):
    given = {"method": "safe_delta", **settings}
    vector = given.pop("vector", None)
    if given.get("calibration"):
        given["calibration"] = str(chat / given["calibration"])
    with pytest.raises((ConfigError, CheckpointError), match=said):
        merge(chat / "task", vector, tmp_path / "out", base=chat / "base", **given)
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_told(chat, tmp_path, tiny):
    other = chat_models.build(tmp_path / "other", seed=5, tied=False)
    models.finetuned(other, tmp_path / "task")
    settings = {"method": "safe_delta", "calibration": str(chat / "cal")}
    summary = merge(tmp_path / "task", None, tmp_path / "out", base=other, **settings)
    assert "14 of 14 calibrated weights" in summary.warnings[0]
    narrow = tiny("llama")
    with pytest.raises(MismatchError, match="has inputs of 32"):
        merge(narrow, None, tmp_path / "out2", base=narrow, **settings)


def test_a_damaged_calibration_is_found(chat, tmp_path):
    import shutil

    shutil.copytree(chat / "cal", tmp_path / "cal")
    file = tmp_path / "cal" / "calibration.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed or damaged"):
        merge(chat / "task", None, tmp_path / "out", base=chat / "base", method="safe_delta",
              calibration=str(tmp_path / "cal"))  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{"scope": "all of it"}, {"limit": 0}, {"max_length": 1}, {"memory": 0}, {"device": "tpu"}]
)
def test_calibrating_with_odd_settings_is_refused(chat, tmp_path, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        calibrate(chat / "base", tmp_path / "cal", **settings)


def test_experts_in_stacks_have_no_calibration(tiny, tmp_path):
    """transformers keeps Mixtral's experts in stacks, no nn.Linear: attention alone is calibrated, experts are kept."""
    base = tiny("mixtral")
    task = models.finetuned(base, tmp_path / "task")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2 w3 w4"}\n')
    made = calibrate(base, tmp_path / "cal", prompts=tmp_path / "rows.jsonl")
    assert made.names()
    assert all("experts" not in n for n in made.names())
    summary = merge(task, None, tmp_path / "out", base=base, method="safe_delta", calibration=tmp_path / "cal",
                    strength=0)  # fmt: skip
    ours, theirs = models.weights(tmp_path / "out"), models.weights(task)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs if "experts" in n)
    assert any("experts" in note for note in summary.notes)


def test_in_memory_as_on_disk(chat, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chat / "task")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge(
        chat / "task", None, tmp_path / "out", base=chat / "base", method="safe_delta", calibration=chat / "cal",
        strength=0.02,
    )  # fmt: skip
    with graft(model, chat / "task", chat / "base", calibration=chat / "cal") as live:
        live.apply(0.001, method="safe_delta")
        figures = live.apply(0.02, method="safe_delta")
        assert set(figures) <= set(live.names)
        assert all(0 < f["accepted"] < 1 for f in figures.values())
        expected = models.weights(tmp_path / "out")
        assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
        with pytest.raises(ConfigError, match="interference needs a vector"):
            live.apply(0.1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_command_line(chat, tmp_path):
    def safegraft(*arguments, code=0):
        done = subprocess.run([sys.executable, "-m", "safegraft", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    cal = tmp_path / "cal"
    text = safegraft("calibrate", chat / "base", "--prompts", chat / "rows.jsonl", "--out", cal)
    assert "14 weights with 8 different inputs" in text
    assert "--force" in safegraft("calibrate", chat / "base", "--out", cal, code=2)
    options = ["--model", chat / "task", "--base", chat / "base", "--method", "safe_delta"]
    text = safegraft("merge", *options, "--calibration", cal, "--out", tmp_path / "out", "--strength", 0.02)
    assert "of 14 calibrated weights" in text
    assert "FAIL" not in safegraft("verify", tmp_path / "out")
    assert "merge" in safegraft("merge", *options, "--calibration", cal, "--out", tmp_path / "o2", "--dry-run")
    text = safegraft("merge", *options, "--calibration", cal, "--out", tmp_path / "o4", "--strength", 1e6)
    assert "14 of 14 calibrated weights stay wholly" in text
    assert "the output is the fine-tune" in text
    assert "needs a calibration" in safegraft("merge", *options, "--out", tmp_path / "o3", code=2)


def test_sqrt_of_the_budget_is_a_relative_size():
    """δ = q·W_b is accepted whole from strength q on, whatever H and the scale of both."""
    base, inputs = normal((5, 4), 0), normal((20, 4), 1)
    hessian = inputs.T @ inputs
    for scale in (1e-3, 1.0, 1e3):
        assert run(scale * base, 0.01 * scale * base, hessian, 0.0101) is None
        assert run(scale * base, 0.01 * scale * base, hessian, 0.0099) is not None
    assert math.isclose(METHOD.strength, 0.004)
