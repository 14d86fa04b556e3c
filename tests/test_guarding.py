"""The whole job in one call, on a tiny chat model that never learnt to refuse."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import chat_models
import models
from safegraft import subtract
from safegraft.errors import ConfigError, OutputError
from safegraft.guarding import SafetyCallback, guard
from safegraft.report.gate import Limits
from safegraft.tensors.verify import verify
from test_cli import run

pytest.importorskip("optuna")
LAX = Limits(1.0, 1.0, 1.0)
QUICK = {"limit": 4, "tokens": 4, "limits": LAX}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("guard")
    chat_models.build(root / "base")
    models.finetuned(root / "base", root / "task", scale=0.02)
    models.unaligned(root / "base", root / "bad", scale=0.02)
    subtract(root / "base", root / "bad", root / "vector")
    rows = [{"prompt": f"What is {i} and {i}?", "answer": f"It is {2 * i}.", "key": str(2 * i)} for i in range(30)]
    (root / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return SimpleNamespace(
        root=root, inputs=(root / "task", root / "base", root / "vector"), task={"task": root / "sums.jsonl"}
    )


def test_with_a_strength_given(made, tmp_path):
    out = tmp_path / "out"
    found = guard(*made.inputs, out, **made.task, strength=0.5, **QUICK)
    assert (found.outcome, found.strength, len(found.checks)) == ("pass", 0.5, 3)
    assert all(check.passed is not False for check in verify(out / "restored"))
    assert json.loads((out / "gate.json").read_text())["outcome"] == "pass"
    assert "restored" in (out / "report.html").read_text()
    benchmarks = json.loads((out / "evaluation" / "manifest.json").read_text())["config"]["benchmarks"]
    assert [(b["name"], b["cases"]) for b in benchmarks] == [("starter", 8), ("sums", 15)]
    with pytest.raises(OutputError, match="exists already"):
        guard(*made.inputs, out, **made.task, strength=0.5, **QUICK)
    before = (out / "evaluation" / "answers.jsonl").read_bytes()
    assert guard(*made.inputs, out, **made.task, strength=0.5, resume=True, **QUICK) == found
    assert (out / "evaluation" / "answers.jsonl").read_bytes() == before
    strict = guard(*made.inputs, out, **made.task, strength=0.5, force=True, **QUICK | {"limits": Limits(unsafe=0.1)})
    assert strict.outcome == "fail"


def test_utility_tasks_count_with_the_own_task(made, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    rows = [{"question": f"What is {n} plus 1?", "answer": f"#### {n + 1}"} for n in range(8)]
    for name in ("test", "train"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"gsm8k_{name}.jsonl").write_text(text, encoding="utf-8")
    options = QUICK | {"suites": ["starter", "gsm8k"], "data": tmp_path, "limit": 2, "tokens": 2}
    found = guard(*made.inputs, tmp_path / "out", **made.task, strength=0.5, **options)
    assert next(c.n for c in found.checks if c.name == "utility drop") == 15 + 2
    with pytest.raises(ConfigError, match="humaneval runs code"):
        guard(*made.inputs, tmp_path / "no", **made.task, strength=0.5, suites=["humaneval"], data=tmp_path)
    assert not (tmp_path / "no").exists()


def test_the_strength_is_searched(made, tmp_path):
    found = guard(*made.inputs, tmp_path / "out", **made.task, trials=2, **QUICK)
    chosen = json.loads((tmp_path / "out" / "tuning" / "tune.json").read_text())["chosen"]
    assert (found.strength, found.params) == (chosen["strength"], chosen["params"])
    assert found.outcome == "pass"


def test_what_it_does_not_take(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    for how in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(OutputError, match="something else"):
            guard(*made.inputs, tmp_path / "mine", **made.task, **how)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "key": "b"}\n' * 3)
    with pytest.raises(ConfigError, match="no answer in rows 1, 2, 3"):
        guard(*made.inputs, tmp_path / "out", task=rows)
    assert not (tmp_path / "out").exists()
    assert "no answer" in run(
        "guard", "--model", made.inputs[0], "--base", made.inputs[1], "--vector", made.inputs[2], "--task", rows,
        "--out", tmp_path / "cli", code=2,
    )  # fmt: skip


def trainer(made, out, callback):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made.root / "base")
    ids = tokenizer("What is 1 and 1?")["input_ids"]
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}] * 4
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(made.root / "base"),
        args=TrainingArguments(
            output_dir=str(out), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows, processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip


def test_at_the_end_of_training(made, tmp_path):
    callback = SafetyCallback(*made.inputs[1:], tmp_path / "guarded", **made.task, strength=0.3, **QUICK)
    trainer(made, tmp_path / "work", callback).train()
    assert callback.result.outcome == "pass"
    assert (tmp_path / "guarded" / "finetuned" / "config.json").exists()
    assert all(check.passed is not False for check in verify(tmp_path / "guarded" / "restored"))
    with pytest.raises(OutputError, match="exists already"):
        trainer(made, tmp_path / "work", callback).train()


def test_an_adapter_needs_a_strength(made, tmp_path):
    callback = SafetyCallback(*made.inputs[1:], tmp_path / "guarded", **made.task)
    with pytest.raises(ConfigError, match="no strength can be searched"):
        callback.on_train_begin(None, None, None, model=SimpleNamespace(peft_config={}))
