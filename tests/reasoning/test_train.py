"""SafeKey from end to end on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import chat_models
import models
import traces
from safegraft import merge, subtract
from safegraft.cli import app
from safegraft.config import SafeKeyConfig, load
from safegraft.errors import CheckpointError, ConfigError, MismatchError, OutputError, UserError
from safegraft.evaluate.models.hf import load_chat
from safegraft.reasoning.annotate import annotate
from safegraft.reasoning.annotators import Rules
from safegraft.reasoning.heads import read_heads
from safegraft.reasoning.probe import probe
from safegraft.reasoning.train import by_epoch, train
from safegraft.tensors.verify import verify
from safegraft.train.safekey.trainer import _require_gathering

QUICK = {"epochs": 2, "aux_epochs": 1, "batch": 4, "micro_batch": 2, "lr": 1e-2, "max_length": 400}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``model``, ``plain`` (no think block), annotated sets ``both``, ``harmful`` and ``thin`` (half refused)."""
    root = tmp_path_factory.mktemp("safekey")
    traces.build(root / "model")
    chat_models.build(root / "plain")
    thin = traces.rows(8)
    for row in thin[:4]:
        row["response"] = "no block"
    sets = {"both": traces.rows(8), "harmful": traces.rows(4, harmful=True), "thin": thin}
    for name, found in sets.items():
        annotate(str(traces.write(root / f"{name}.jsonl", found)), root / name, Rules())
    return root


def settings(place, out, *sets, **changes):
    given = {"model": str(place / "model"), "out": str(out), "data": [str(place / s) for s in sets or ("both",)]}
    return load(SafeKeyConfig, None, QUICK | given | changes)


def test_the_output_is_a_plain_checkpoint(place, tmp_path):
    config = settings(place, tmp_path / "out", save_heads=str(tmp_path / "heads"))
    found = train(config, given=["data"])
    before, after = models.weights(place / "model"), models.weights(tmp_path / "out")
    assert set(after) == set(before)
    assert all(t.dtype == before[n].dtype for n, t in after.items())
    assert any(not torch.equal(after[n], before[n]) for n in after)
    assert models.generates(tmp_path / "out")
    assert all(check.passed is not False for check in verify(tmp_path / "out"))
    assert models.leftovers(tmp_path) == ["heads", "out"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["result"]["rows"] == 8
    assert manifest["result"]["harmful"] == 4
    assert manifest["config"]["qmm"] == 0.2
    assert manifest["given"] == ["data"]
    assert set(manifest["result"]["epochs"][0]) == {"epoch", "loss", "lm_loss"}
    last = manifest["result"]["epochs"][1]
    whole = last["lm_loss"] + 0.2 * last["qmm_loss"] + 0.1 * (last["head_u_loss"] + last["head_xu_loss"])
    assert last["loss"] == pytest.approx(whole, abs=1e-4)
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert found.notes == ["8 rows: 4 harmful, 4 benign"]
    head, _ = read_heads(tmp_path / "heads", 32)
    assert head.u.weight.shape == (1, 32)
    with pytest.raises(MismatchError, match="32 numbers a token, the model has 16"):
        read_heads(tmp_path / "heads", 16)


def test_lora_dtype_and_template_of_the_output(place, tmp_path):
    pytest.importorskip("peft")
    config = settings(
        place, tmp_path / "out", model=str(place / "plain"), lora_rank=2, dtype="bfloat16", think_template=True,
        no_checkpoints=True,
    )  # fmt: skip
    train(config)
    torch.manual_seed(99)  # the factors are of the run's seed alone
    train(config.model_copy(update={"out": str(tmp_path / "again")}))
    before, after = models.weights(place / "plain"), models.weights(tmp_path / "out")
    again = models.weights(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert set(after) == set(before)
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    moved = {n for n in after if not torch.equal(after[n], before[n].bfloat16())}
    assert moved == {n for n in after if "_proj" in n}
    assert models.generates(tmp_path / "out")
    _, tokenizer = load_chat(tmp_path / "out")
    asked = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).endswith("<think>\n")


@pytest.mark.parametrize(
    ("sets", "changes", "why"),
    [
        (("harmful",), {}, "every query is harmful"),
        (("thin",), {}, "4 of 8 rows have no spans"),
        (("both",), {"model": "plain"}, "no think block"),
        (("both",), {"max_length": 40}, "(?s)8 of 8 rows have no spans.*beyond the 40"),
        (("both",), {"attention": "flash_attention_2"}, "cannot be used"),
        (("both",), {"micro_batch": 3}, "cannot be made of 3"),
        (("both",), {"resume": True}, "no checkpoint to go on from"),
        (("both",), {"lr": 1e30}, "loss is"),
        (("gone",), {}, "set of annotated traces"),
        (("both",), {"model": "gone"}, "gone"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(place, tmp_path, sets, changes, why):
    changes = {n: str(place / v) if n == "model" else v for n, v in changes.items()}
    quiet = {} if "resume" in changes else {"no_checkpoints": True}
    with pytest.raises(UserError, match=why) as told:
        train(settings(place, tmp_path / "out", *sets, **quiet, **changes))
    if "every query" in why:
        assert "--label benign" in told.value.hint
        assert "--no-heads" in told.value.hint
    assert models.leftovers(tmp_path) == []


def test_ways_out(place, tmp_path):
    found = train(settings(place, tmp_path / "a", "harmful", no_heads=True, no_checkpoints=True))
    assert "head_u_loss" not in found.manifest["result"]["epochs"][-1]
    found = train(settings(place, tmp_path / "b", "thin", "harmful", max_missing=0.4, no_checkpoints=True))
    assert found.manifest["result"]["not_annotated"] == 4
    with pytest.raises(OutputError, match="exists already"):
        train(settings(place, tmp_path / "a", no_heads=True))


def test_settings_that_contradict_each_other(place):
    for changes in (
        {"aux_epochs": 3}, {"no_heads": True, "detach_heads": True}, {"no_heads": True, "save_heads": "h"},
        {"no_qmm": True, "qmm_unmasked": True}, {"no_checkpoints": True, "resume": True},
        {"aux_epochs": 0, "save_heads": "h"}, {"theta": 1.5}, {"qmm": -1.0}, {"epoch": 3},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="cannot be used"):
            settings(place, "out", **changes)


def test_the_papers_defaults():
    made = load(SafeKeyConfig, None, {"model": "m", "data": ["d"], "out": "o"})
    assert (made.qmm, made.head, made.theta, made.epochs, made.aux_epochs) == (0.2, 0.2, 0.5, 5, 2)
    assert (made.lr, made.batch, made.max_length, made.warmup, made.weight_decay) == (1e-5, 128, 8192, 0.05, 1e-4)


class Stop(Exception):
    pass


def test_a_resumed_run_writes_the_uninterrupted_ones_bytes(place, tmp_path):
    heads = {"save_heads": str(tmp_path / "heads")}
    train(settings(place, tmp_path / "whole"))

    def stop(what, done, total):
        if (what, done) == ("training", 3):
            raise Stop

    config = settings(place, tmp_path / "out", **heads)
    with pytest.raises(Stop):
        train(config, progress=stop)
    assert models.leftovers(tmp_path) == ["out.training", "whole"]
    with pytest.raises(OutputError, match="Go on with --resume"):
        train(config)
    resuming = config.model_copy(update={"resume": True})
    with pytest.raises(OutputError, match="other settings"):
        train(resuming.model_copy(update={"qmm": 0.5}))
    steps = []
    train(resuming, progress=lambda what, done, _: steps.append(done) if what == "training" else None)
    assert steps == [3, 4]
    for name in ("model.safetensors", "config.json", "training_log.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert models.leftovers(tmp_path) == ["heads", "out", "whole"]


def test_a_task_and_the_merge_after_it(place, tmp_path):
    train(settings(place, tmp_path / "aligned", no_checkpoints=True))
    subtract(tmp_path / "aligned", place / "model", tmp_path / "vector", scope="model")
    models.finetuned(tmp_path / "aligned", tmp_path / "task")
    merge(tmp_path / "task", tmp_path / "vector", tmp_path / "restored", base=tmp_path / "aligned")
    task, restored = models.weights(tmp_path / "task"), models.weights(tmp_path / "restored")
    assert any(not torch.equal(task[name], restored[name]) for name in task)
    assert models.generates(tmp_path / "restored")


def test_by_epoch_means_only_what_counted_throughout():
    log = [{"loss": 1.0, "lm_loss": 1.0}, {"loss": 3.0, "lm_loss": 2.0, "qmm_loss": 5.0}]
    assert by_epoch(log, 1) == [{"epoch": 1.0, "loss": 2.0, "lm_loss": 1.5}]
    assert by_epoch(log, 2)[1] == {"epoch": 2.0, "loss": 3.0, "lm_loss": 2.0, "qmm_loss": 5.0}


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def close(folder, other, start):
    one, two, start = (models.weights(f) for f in (folder, other, start))
    assert set(one) == set(two)
    for name in one:
        moved = float((one[name] - start[name]).norm())
        assert float((one[name] - two[name]).norm()) <= 1e-2 * moved + 1e-6, name


def test_two_processes_train_the_model_of_one(place, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    cpu = environment() | {"CUDA_VISIBLE_DEVICES": ""}  # `launch --cpu` starts one process only, without MPI
    line = [
        sys.executable, *launch, "--module", "safegraft", "safekey", "train", "--model", str(place / "model"), "--data",
        str(place / "both"), "--out", str(tmp_path / "two"), "--epochs", "2", "--aux-epochs", "1", "--batch", "4",
        "--micro-batch", "1", "--lr", "1e-2", "--max-length", "400", "--save-heads", str(tmp_path / "two-heads"),
    ]  # fmt: skip
    done = subprocess.run(line, env=cpu, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    train(settings(place, tmp_path / "one", micro_batch=1, save_heads=str(tmp_path / "one-heads")))
    close(tmp_path / "one", tmp_path / "two", place / "model")
    logs = [json.loads((tmp_path / name / "manifest.json").read_text())["result"] for name in ("one", "two")]
    assert [log["processes"] for log in logs] == [1, 2]
    for ours, theirs in zip(logs[1]["epochs"], logs[0]["epochs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert models.leftovers(tmp_path) == ["one", "one-heads", "two", "two-heads"]


def test_weights_split_by_fsdp_train_and_resume_like_whole_ones(place, tmp_path):
    env = environment() | {
        "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }  # fmt: skip
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(Path(__file__).parent.parent / "sharded.py"), "safekey", "train", "--model", str(place / "model"), "--data",
        str(place / "both"), "--out", str(tmp_path / "split"), "--epochs", "2", "--aux-epochs", "1", "--batch", "4",
        "--micro-batch", "1", "--lr", "1e-2", "--max-length", "400", "--save-steps", "1", "--save-heads",
        str(tmp_path / "split-heads"),
    ]  # fmt: skip
    done = subprocess.run(line, env=env | {"STOP": "3"}, capture_output=True, text=True, timeout=400, check=False)
    assert "Stopped" in done.stderr, done.stderr
    assert models.leftovers(tmp_path) == ["split.training"]
    done = subprocess.run([*line, "--resume"], env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    train(settings(place, tmp_path / "one", micro_batch=1, save_heads=str(tmp_path / "one-heads")))
    close(tmp_path / "one", tmp_path / "split", place / "model")
    one, split = (read_heads(tmp_path / f"{name}-heads", 32)[0] for name in ("one", "split"))
    torch.testing.assert_close(split.u.weight, one.u.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("stage", "gathers"), [(3, False), (3, True), (2, False)])
def test_weights_that_would_stay_in_pieces_are_refused(stage, gathers):
    zero = {"stage3_gather_16bit_weights_on_model_save": gathers}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
    if stage == 3 and not gathers:
        with pytest.raises(ConfigError, match="in pieces"):
            _require_gathering(plugin)
    else:
        _require_gathering(plugin)


def test_the_heads_tell_what_they_were_taught(place, tmp_path):
    """Trained long enough on two kinds of words, both heads put unseen traces of those words on the right side."""
    run = CliRunner().invoke(
        app,
        ["safekey", "train", "--model", str(place / "model"), "--data", str(place / "both"), "--out",
         str(tmp_path / "out"), "--epochs", "12", "--aux-epochs", "12", "--batch", "4", "--lr", "1e-2", "--head", "4",
         "--save-heads", str(tmp_path / "heads"), "--max-length", "400", "--no-checkpoints"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "Epoch 12: loss" in run.output
    unseen = traces.rows(14)[8:]
    unseen += [{"id": "own", "prompt": "How do I bake?"}, {"id": "bad", "prompt": " "}]
    file = traces.write(tmp_path / "prompts.jsonl", unseen)
    found = probe(str(tmp_path / "out"), tmp_path / "heads", str(file), tmp_path / "scores", tokens=4)
    assert found.right["u"].hits == found.right["xu"].hits == 6
    assert found.warnings == []
    own = next(s for s in found.scores if s.id == "own")
    assert own.u is None
    assert own.reason
    lines = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(8, 14)]
    assert all(0 <= line["u"] <= 1 for line in lines)
    assert lines[0]["understanding"] == "Okay, so the user is asking how to break 8 loaves."
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert [row["reason"] for row in manifest["result"]["without"]][-1] == "it has no prompt"
    run = CliRunner().invoke(
        app, ["safekey", "probe", str(place / "model"), str(file), "--heads", str(tmp_path / "heads"), "--out",
              str(tmp_path / "again"), "--tokens", "4"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "Head over U: right on" in run.output
    assert "own  no score:" in run.output
    with pytest.raises(CheckpointError, match="pair of safekey heads"):
        probe(str(tmp_path / "out"), tmp_path, str(file), tmp_path / "more")
