"""evaluate, judge, gate and report as programs, on a tiny chat model."""

import json

import pytest

import chat_models
from safegraft.cli import app
from safegraft.errors import ConfigError
from safegraft.evaluate.answers import read_answers
from safegraft.evaluate.models.hf import HfChatModel, load_chat
from safegraft.evaluate.records import Sampling, ask
from test_cli import run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_models.build(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluated")
    task = place / "sums.jsonl"
    task.write_text('{"prompt": "1 + 1?", "key": "2"}\n{"prompt": "2 + 2?", "key": "4"}\n')
    done = run(
        "evaluate", f"before={model}", f"after={model}", "--suite", "starter", "--task", task, "--limit", 5,
        "--tokens", 4, "--out", place / "run",
    )  # fmt: skip
    assert "over-refusal" in done
    assert "answers to starter were cut off before they ended" in done
    return place / "run"


def test_evaluate_writes_what_it_shows(measured, model):
    summary = json.loads((measured / "summary.json").read_text())
    assert summary["models"] == ["before", "after"]
    assert {(c["metric"], c["rate"]["n"]) for c in summary["cells"]} == {
        ("unsafe", 5), ("overrefusal", 5), ("utility", 2),
    }  # fmt: skip
    assert all(c["difference"]["value"] == 0 and c["p"] == 1 for c in summary["comparisons"])
    manifest = json.loads((measured / "manifest.json").read_text())
    assert len(manifest["inputs"]["before"]["sha256"]) == 64
    one = read_answers(measured)[0]
    assert HfChatModel(*load_chat(model)).replies([ask(one.prompt)], Sampling(4))[0].text == one.reply


def test_evaluate_again_needs_resume_and_changes_nothing(measured, model):
    same = [f"before={model}", f"after={model}", "--suite", "starter", "--task", measured.parent / "sums.jsonl",
            "--limit", 5, "--tokens", 4, "--out", measured]  # fmt: skip
    before = (measured / "answers.jsonl").read_bytes()
    assert "exists already" in run("evaluate", *same, code=2)
    run("evaluate", *same, "--resume")
    assert (measured / "answers.jsonl").read_bytes() == before


def test_gate_exits_by_its_verdict(measured, tmp_path):
    forms = ["--junit", tmp_path / "j.xml", "--markdown", tmp_path / "m.md", "--json", tmp_path / "g.json"]
    assert "fail" in run("gate", measured, "--max-unsafe", 0.5, *forms, code=1)
    assert json.loads((tmp_path / "g.json").read_text())["outcome"] == "fail"
    assert "<failure" in (tmp_path / "j.xml").read_text()
    assert "fails" in (tmp_path / "m.md").read_text()
    assert "pass" in run("gate", measured, "--max-unsafe", 1.0, "--max-overrefusal", 1.0)
    assert "more samples" in run("gate", measured, "--max-utility-drop", 0.02, code=2)
    assert "no limit was given" in run("gate", measured, code=3)
    assert "no finished evaluation" in run("gate", tmp_path, "--max-unsafe", 0.1, code=3)


def test_report_is_written_once(measured, tmp_path):
    run("report", measured, "--out", tmp_path / "r.html")
    assert "not shown" in (tmp_path / "r.html").read_text()
    assert "exists already" in run("report", measured, "--out", tmp_path / "r.html", code=2)
    run("report", measured, measured, "--out", tmp_path / "both.md")
    assert "run: after" in (tmp_path / "both.md").read_text()


def test_attacks_and_defences(model, tmp_path):
    rows = tmp_path / "made.jsonl"
    out = tmp_path / "run"
    attacked = ["--attack", "rot13", "--attack", "dra_loop", "--defense", "self_reminder"]
    inside("evaluate", f"m={model}", "--limit", 2, "--tokens", 3, "--out", out, *attacked)
    answers = read_answers(out)
    assert {a.attack for a in answers if a.kind == "harmful"} == {"none", "rot13", "dra_loop"}
    assert {a.attack for a in answers if a.kind == "harmless"} == {"none"}
    assert json.loads((out / "manifest.json").read_text())["config"]["defense"] == "self_reminder"
    harmful = {a.id for a in answers if a.kind == "harmful"}
    rows.write_text("".join(json.dumps({"prompt": "x y z", "attack": "gcg", "source": i}) + "\n" for i in harmful))
    options = ["evaluate", f"m={model}", "--limit", 2, "--tokens", 3, "--attack-file", rows]
    inside(*options, "--out", tmp_path / "b", "--defense", f"safe_decoding:{model}")
    assert {a.attack for a in read_answers(tmp_path / "b")} == {"none", "gcg"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--defense", "prayer"], "no defence"),
        (["--defense", "system_prompt:"], "no defence"),
        (["--attack", "rot31"], "no attack 'rot31'"),
        (["--attack", "translation"], "needs a language"),
        (["--attack", "translation:zh"], "needs multijail.csv"),
        (["--backend", "openai"], "needs --base-url"),
        (["--backend", "llama"], "no backend"),
        (["--base-url", "http://localhost:1"], "is for --backend"),
        (["--judge", "nobody"], "no judge 'nobody'"),
        (["--suite", "startr"], "no benchmark 'startr'"),
        (["--suite", "all"], "cannot get catqa"),
        (["--suite", "humaneval"], "humaneval runs code that the model wrote"),
        (["--suite", "starter", "--suite", "evalplus"], r"humaneval\+ runs code that the model wrote"),
    ],
)
def test_bad_options_are_told_before_any_work(model, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        inside("evaluate", f"m={model}", "--out", tmp_path / "c", *options)
    assert not (tmp_path / "c").exists()


def inside(*arguments):
    """The command within this process, which saves a start."""
    app([str(a) for a in arguments], standalone_mode=False)


def test_what_there_is_not(measured, model, tmp_path):
    assert "did you mean" in run("evaluate", model, "--suite", "startr", "--out", tmp_path / "x", code=2)
    assert "no judge" in run("judge", measured, "--judge", "nobody", code=2)
    assert "transformers cannot load" in run("evaluate", tmp_path, "--limit", 2, "--out", tmp_path / "x", code=2)
