"""EvalPlus as a program in the sandbox. A stand-in with its command line does the scoring here, except where
$SAFEGRAFT_EVALPLUS names an environment that `safegraft utility evalplus --setup` made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from safegraft.errors import ConfigError, OutputError
from safegraft.evaluate import environments
from safegraft.evaluate.records import Reply
from safegraft.evaluate.utility import evalplus, sandbox

ADD = {
    "task_id": "HumanEval/0", "entry_point": "add", "contract": "", "atol": 0,
    "prompt": "def add(a, b):\n    \"\"\"The sum.\"\"\"\n", "canonical_solution": "    return a + b\n",
    "base_input": [[1, 2]], "plus_input": [[0, 0], [-5, 3]],
}  # fmt: skip
DOUBLE = ADD | {
    "task_id": "HumanEval/1", "entry_point": "double", "prompt": "def double(a):\n    \"\"\"Twice.\"\"\"\n",
    "canonical_solution": "    return 2 * a\n", "base_input": [[2]], "plus_input": [[3], [-1]],
}  # fmt: skip
NAME = ADD | {
    "task_id": "HumanEval/2", "entry_point": "name", "prompt": "def name():\n    \"\"\"x\"\"\"\n",
    "canonical_solution": "    return 'x'\n", "base_input": [[]], "plus_input": [[]],
}  # fmt: skip


class Coder:
    """Adds rightly; doubles by squaring, which the base test does not notice; is cut off while thinking of a name."""

    asked = 0

    def replies(self, batch, sampling):
        self.asked += len(batch)
        texts = {
            "add": "<think>Easy.</think>Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
            "double": "```python\ndef double(a):\n    return a * a\n```",
            "name": "<think>Names are hard",
        }
        return [Reply(next(v for k, v in texts.items() if f"def {k}(" in c[-1].content), 9, True) for c in batch]


@pytest.fixture(scope="module", autouse=True)
def granted():
    try:
        sandbox.require()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = "".join(json.dumps(p) + "\n" for p in (ADD, DOUBLE, NAME))
    (folder / "HumanEvalPlus.jsonl").write_text(rows)
    return folder


STAND_IN = """
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
problems = [json.loads(line) for line in open(os.environ["HUMANEVAL_OVERRIDE_PATH"])]
assert open(os.environ["MBPP_OVERRIDE_PATH"]).read() == ""
{body}
"""
SANITIZE = """
rows = [json.loads(line) for line in open(options["--samples"])]
with open(options["--samples"].replace(".jsonl", "-sanitized.jsonl"), "w") as file:
    for row in rows:
        code = row["solution"].partition("```python\\n")[2].partition("```")[0]
        file.write(json.dumps(row | {"solution": code}) + "\\n")
"""
EVALUATE = """
assert options["--dataset"] == "humaneval"
by = {p["task_id"]: p for p in problems}
found = {}
for line in open(options["--samples"]):
    row = json.loads(line)
    problem, status = by[row["task_id"]], {}
    for kind in ("base", "plus"):
        try:
            ours, theirs = {}, {}
            exec(row["solution"], ours)
            exec(problem["prompt"] + problem["canonical_solution"], theirs)
            name = problem["entry_point"]
            right = all(ours[name](*i) == theirs[name](*i) for i in problem[kind + "_input"])
        except Exception:
            right = False
        status[kind + "_status"] = "pass" if right else "fail"
    found[row["task_id"]] = [row | status]
print("scored", len(found))
with open(options["--samples"].replace(".jsonl", "_eval_results.json"), "w") as file:
    json.dump({"eval": found}, file)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment, without pip, that holds a package of EvalPlus's name and version."""
    folder = tmp_path_factory.mktemp("evalplus") / "environment"
    environments.venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    package = site / "evalplus"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sanitize.py").write_text(STAND_IN.replace("{body}", SANITIZE))
    (package / "evaluate.py").write_text(STAND_IN.replace("{body}", EVALUATE))
    info = site / f"evalplus-{evalplus.VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: evalplus\nVersion: {evalplus.VERSION}\n")
    return folder


def check(environment, data, tmp_path):
    task = evalplus.load("humaneval+", environment, data=data, allow_code=True)
    assert task.about["cases"] == 3
    coder, folder = Coder(), tmp_path / "out"
    rows = task.measure("m", coder, folder, None)
    assert [(r.answer.id, r.verdict.judge, r.verdict.label) for r in rows] == [
        ("HumanEval/0", "pass@1", "correct"), ("HumanEval/1", "pass@1", "wrong"),
        ("HumanEval/2", "pass@1", "truncated"),
    ]  # fmt: skip
    assert rows[0].answer.reasoning == "Easy."
    assert rows[0].answer.judged.startswith("Here:")
    kept = json.loads((folder / "eval_results.json").read_text())["eval"]
    assert (kept["HumanEval/1"][0]["base_status"], kept["HumanEval/1"][0]["plus_status"]) == ("pass", "fail")
    (folder / "eval_results.json").unlink()
    with (folder / "replies.jsonl").open("a") as file:
        file.write('{"torn')
    assert task.measure("m", coder, folder, None) == rows
    assert coder.asked == 3


def test_the_stand_in_scores_in_the_sandbox(environment, data, tmp_path):
    check(environment, data, tmp_path)
    assert "scored 3" in (tmp_path / "out" / "evalplus.log").read_text()


def test_the_real_one(data, tmp_path):
    place = os.environ.get("SAFEGRAFT_EVALPLUS")
    if not place:
        pytest.skip("SAFEGRAFT_EVALPLUS names no environment")
    check(Path(place), data, tmp_path)


def test_a_failure_is_told_with_its_log(environment, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(environment, broken, symlinks=True)
    module = next(broken.glob("lib/python*/site-packages/evalplus/evaluate.py"))
    module.write_text("raise SystemExit('no tests today')")
    task = evalplus.load("humaneval+", broken, data=data, limit=1, allow_code=True)
    with pytest.raises(ConfigError, match="EvalPlus failed: no tests today") as caught:
        task.measure("m", Coder(), tmp_path / "out", None)
    assert str(tmp_path / "out" / "evalplus.log") in caught.value.hint
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_what_lacks_is_told_before_any_work(environment, data, tmp_path):
    with pytest.raises(ConfigError, match="runs code that the model wrote") as caught:
        evalplus.load("humaneval+", environment, data=data)
    assert "--allow-code-execution" in caught.value.hint
    for place in (None, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="needs EvalPlus") as caught:
            evalplus.load("humaneval+", place, data=data, allow_code=True)
        assert "--setup" in caught.value.hint
    with pytest.raises(ConfigError, match=r"problems of mbpp\+ are not in"):
        evalplus.load("mbpp+", environment, data=data, allow_code=True)
    (data / "MbppPlus.jsonl").write_text('{"task_id": "Mbpp/2"}\n')
    with pytest.raises(ConfigError, match="row 1 has no prompt, entry_point"):
        evalplus.load("mbpp+", environment, data=data, allow_code=True)


def test_setup(environment, tmp_path, monkeypatch):
    """Without an index pip fails, without a network no problems come; making the environment takes seconds."""
    assert "could not download" in evalplus.setup(environment)
    (environment / "data").mkdir()
    for name in ("HumanEvalPlus.jsonl", "MbppPlus.jsonl"):
        (environment / "data" / name).touch()
    assert evalplus.setup(environment).endswith(f"problems are in {environment}.")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(OutputError, match="no virtual environment"):
        evalplus.setup(tmp_path / "mine")
    asked = []

    def fail(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="WARNING: x\nERROR: No matching distribution\nhint")

    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ConfigError, match="could not be installed: ERROR: No matching distribution"):
        evalplus.setup(tmp_path / "new")
    assert asked[0][1:] == ["-m", "pip", "install", "--no-input", f"evalplus=={evalplus.VERSION}"]
    assert sys.executable != asked[0][0]
