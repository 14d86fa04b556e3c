"""The whole pipeline on a tiny random model: it learns nothing worth having, but every stage really runs."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

import chat_models
import models
from safegraft.data import Lookalike, Phrases, Request, TaskRow
from safegraft.demo import run, work
from safegraft.demo.run import run_demo
from safegraft.demo.settings import DemoData, Limits, Prompts, Settings, Training
from safegraft.errors import OutputError
from safegraft.report.evaluation import describe_comparison
from safegraft.train.data import Pair
from test_cli import run as command

TINY = Settings(
    align=Training(1, 1e-3, 4),
    finetune=Training(1, 1e-3, 4),
    surrogate=Training(1, 1e-3, 4),
    strengths=(0.1, 0.5),
    select=Limits(0.0, 1.0, 1.0),
    answer_tokens=4,
    batch=4,
)


def tiny_data():
    ask = [Request(f"h{i}", "bread", "x", f"How do I burn bread number {i}?") for i in range(6)]
    look = [Lookalike(f"l{i}", "bread", "x", f"How do I bake bread {i}?", "Mix flour.") for i in range(4)]
    task = [TaskRow(f"t{i}", "x", f"What is {i} and 1?", f"It is {i + 1}.", str(i + 1)) for i in range(6)]
    prompts = Prompts(ask[:3], look[:2], task[:3])
    phrases = Phrases(("I can't help with that.", "Sorry, no."), ("Sure, here it is:", "Of course:"))
    return DemoData(ask, [Pair(r.prompt, r.answer) for r in look], ask, task, phrases, prompts, prompts)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return chat_models.build(tmp_path_factory.mktemp("shipped") / "m")


@pytest.fixture(scope="module")
def finished(shipped, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    text = io.StringIO()
    console = Console(file=text, width=120)
    results = run_demo(out, model=str(shipped), settings=TINY, data=tiny_data(), console=console)
    return out, results, text.getvalue()


def again(out, shipped, **changes):
    settings = {"model": str(shipped), "settings": TINY, "data": tiny_data(), "console": Console(file=io.StringIO())}
    return run_demo(out, **(settings | changes))


def reused(results):
    return {stage["name"]: stage["reused"] for stage in results["stages"]}


def test_it_leaves_models_table_and_report(finished):
    out, results, printed = finished
    for name in ("aligned", "finetuned", "restored"):
        assert len(models.generates(out / name)) == 5
    assert [row["name"] for row in results["models"]] == ["as shipped", "aligned", "fine-tuned", "restored"]
    for row in results["models"]:
        scores = row["scores"]
        assert (scores["complies"]["n"], scores["refuses"]["n"], scores["task"]["n"]) == (3, 2, 3)
        assert all(s["low"] <= s["value"] <= s["high"] for s in scores.values())
    assert json.loads((out / "results.json").read_text())["seed"] == 0
    assert results["sweep"][0]["strength"] == 0
    assert results["strength"] in TINY.strengths
    for text in ("fine-tuned", "Wilson", "safegraft merge --model", "chosen"):
        assert text in printed
    assert len((out / "evaluation" / "restored" / "answers.jsonl").read_text().splitlines()) == 8
    assert [(c["first"], c["second"], c["difference"]["n"]) for c in results["comparisons"]] == [
        ("fine-tuned", "restored", n) for n in (3, 2, 3)
    ]
    for line in map(describe_comparison, results["comparisons"]):
        assert line in printed


def test_its_evaluations_make_a_report(finished, tmp_path):
    out = finished[0]
    command("report", *(out / "evaluation" / key for key in ("finetuned", "restored")), "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ">fine-tuned<" in page
    assert "restored against fine-tuned" in page
    assert "Where the graft went: restored" in page


def test_the_report_loads_nothing(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    for word in ("http://", "https://", "<script", "<link", "url("):
        assert word not in page
    for word in ("viewport", "prefers-color-scheme: dark", "whisker", "self_attn.q_proj", "as shipped", "95 %"):
        assert word in page


def test_the_surrogate_is_nowhere(finished):
    out = finished[0]
    assert not (out / ".surrogate").exists()
    assert sorted(f.name for f in out.iterdir()) == [
        "aligned", "evaluation", "finetuned", "report.html", "restored", "results.json", "stages", "vector"
    ]  # fmt: skip
    manifest = json.loads((out / "vector" / "manifest.json").read_text())
    assert manifest["method"] == "affirmative openings"
    assert set(manifest["tensors"]) == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"}


def test_a_second_run_does_nothing_again(finished, shipped, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    before = models.files_of(out)
    results = again(out, shipped)
    assert all(reused(results).values())
    changed = {name for name, data in models.files_of(out).items() if before[name] != data}
    assert changed <= {"results.json", "report.html"}
    assert results["models"] == finished[1]["models"]


def test_a_stage_that_died_is_done_again_and_nothing_before_it(finished, shipped, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "restore", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again(out, shipped)
    assert not (out / "restored").exists()
    results = again(out, shipped)
    done = reused(results)
    assert [n for n, kept in done.items() if kept] == ["align", "fine-tune", "vector", "strength"]
    for name in ("aligned", "finetuned", "restored"):
        assert (out / name / "model.safetensors").read_bytes() == (
            finished[0] / name / "model.safetensors"
        ).read_bytes()
    assert results["models"] == finished[1]["models"]


def test_other_settings_redo_what_depends_on_them(finished, shipped, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "vector")
    changed = Settings(**{**TINY.__dict__, "surrogate": Training(2, 1e-3, 4)})
    kept = reused(again(out, shipped, settings=changed))
    assert kept["align"]
    assert kept["fine-tune"]
    assert not kept["vector"]
    assert not kept["strength"]
    assert not kept["merge"]
    assert kept["measure-finetuned"]
    assert not kept["measure-restored"]
    assert not any(reused(again(out, shipped, settings=changed, force=True)).values())


def test_a_folder_of_someone_else_is_left_alone(shipped, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        again(tmp_path, shipped)
    assert models.leftovers(tmp_path) == ["letter.txt"]


def test_a_failure_while_the_vector_is_made_leaves_no_surrogate(finished, shipped, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    (out / "stages" / "vector.json").unlink()
    seen = []

    def failing(aligned, surrogate, *_, **__):
        seen.extend(models.leftovers(Path(surrogate)))
        assert Path(surrogate).stat().st_mode & 0o077 == 0
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(work, "subtract", failing)
    with pytest.raises(RuntimeError, match="disk on fire"):
        again(out, shipped)
    assert seen == ["config.json", "model.safetensors"]
    assert not (out / ".surrogate").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_while_the_vector_is_made_leaves_no_surrogate(tmp_path, number):
    """SIGKILL can be caught by no one: there the next run removes it before anything else."""
    out = tmp_path / "out"
    (out / "stages").mkdir(parents=True)
    code = f"""
        import time
        from pathlib import Path
        from safegraft.demo.stages import surrogate_folder
        with surrogate_folder(Path({str(out)!r})) as folder:
            (folder / "model.safetensors").write_bytes(b"x")
            print("there", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "there\n"
    assert (out / ".surrogate" / "model.safetensors").exists()
    os.kill(child.pid, number)
    left = child.wait(30)
    child.stdout.close()
    if number == signal.SIGKILL:
        from safegraft.demo.stages import Stages

        Stages(out, ())
    else:
        assert left == 128 + number
    assert models.leftovers(out) == ["stages"]
