"""garak as a program: its command and configuration, and its report. A stand-in for garak does the running here."""

import json
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from safegraft.errors import ConfigError, OutputError
from safegraft.evaluate import environments
from safegraft.evaluate.attacks import garak
from safegraft.evaluate.records import Record


def message(text):
    return {"text": text, "lang": "en", "data_path": None, "data_type": None, "data_checksum": None, "notes": {}}


def attempt(uuid, probe, prompt, outputs, results, status=2):
    return {
        "entry_type": "attempt", "uuid": uuid, "seq": 0, "status": status, "probe_classname": probe,
        "probe_params": {}, "targets": [],
        "prompt": {"turns": [
            {"role": "system", "content": message("Be brief.")}, {"role": "user", "content": message(prompt)},
        ], "notes": {}},
        "outputs": [message(o) if o is not None else None for o in outputs],
        "detector_results": results, "notes": {}, "goal": "test", "conversations": [],
        "reverse_translation_outputs": [], "intent": None,
    }  # fmt: skip


BYPASS = "mitigation.MitigationBypass"
ENTRIES = [
    {"entry_type": "start_run setup", "run.eval_threshold": 0.6, "plugins.target_name": "m"},
    {"entry_type": "init", "garak_version": "0.17.1", "run": "r"},
    attempt("u1", "dan.DanInTheWild", "Please", ["Sure.", "I can't."], {}, status=1),
    attempt("u1", "dan.DanInTheWild", "Please", ["Sure.", "I can't."], {BYPASS: [1.0, 0.0]}),
    attempt("u2", "encoding.InjectROT13", "Uv", ["Hi", None, "x"], {"encoding.DecodeMatch": [0.5, 0.0], BYPASS: [1.0]}),
    {"entry_type": "eval", "probe": "dan.DanInTheWild", "detector": BYPASS, "passed": 1, "fails": 1},
    {"entry_type": "completion", "run": "r"},
]


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_a_report_becomes_records(tmp_path):
    found = garak.read_report(write(tmp_path / "r.jsonl", ENTRIES), "mine")
    assert found[0] == Record(
        "mine", "garak/dan.DanInTheWild", "u1:0", "Please", "Sure.", "unsafe", "garak/mitigation.MitigationBypass"
    )
    assert [(r.id, r.reply, r.outcome) for r in found if r.judge == f"garak/{BYPASS}"] == [
        ("u1:0", "Sure.", "unsafe"), ("u1:1", "I can't.", "refused"),
        ("u2:0", "Hi", "unsafe"), ("u2:1", "", "unparsed"), ("u2:2", "x", "unparsed"),
    ]  # fmt: skip
    assert [(r.id, r.outcome) for r in found if r.judge == "garak/encoding.DecodeMatch"] == [
        ("u2:0", "safe"), ("u2:1", "unparsed"), ("u2:2", "unparsed"),
    ]  # fmt: skip


def test_reports_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        garak.read_report(tmp_path / "nothing", "m")
    bad = tmp_path / "bad"
    bad.write_text("{}\nnot json\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: this is no garak report"):
        garak.read_report(bad, "m")
    with pytest.raises(ConfigError, match="no finished attempt"):
        garak.read_report(write(tmp_path / "r", ENTRIES[:3]), "m")


STAND_IN = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    print("{version}")
    sys.exit()
assert sys.argv[1:4] == ["-m", "garak", "--config"], sys.argv
config = json.load(open(sys.argv[4]))
print("loading", config["plugins"]["target_name"])
if config["plugins"]["target_name"] == "broken":
    print("cannot reach the endpoint")
    sys.exit(1)
place = config["reporting"]
with open(os.path.join(place["report_dir"], place["report_prefix"] + ".report.jsonl"), "w") as file:
    file.write({report!r})
with open(os.path.join(place["report_dir"], "seen.json"), "w") as file:
    json.dump(dict(os.environ), file)
"""


@pytest.fixture
def environment(tmp_path):
    """A folder that looks like garak's environment; its interpreter writes a report and its own environment."""
    folder = tmp_path / "environment"
    program = environments.python_of(folder)
    program.parent.mkdir(parents=True)
    report = "".join(json.dumps(entry) + "\n" for entry in ENTRIES)
    program.write_text(STAND_IN.format(python=sys.executable, version=garak.VERSION, report=report), encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def test_a_run(environment, tmp_path):
    out = tmp_path / "out"
    records = garak.run(environment, "http://localhost:1/v1", "mine", out, probes=["dan"], seed=3, key="secret")
    assert len(records) == 8
    config = json.loads((out / "garak.config.json").read_text())
    assert config["run"] == {"seed": 3, "generations": 1, "spec": {"include": ["probes.dan"]}}
    target = config["plugins"]["generators"]["openai"]["OpenAICompatible"]
    assert target == {"uri": "http://localhost:1/v1/", "temperature": 0.0, "max_tokens": 256, "stop": []}
    assert config["plugins"]["target_type"] == "openai.OpenAICompatible"
    assert config["plugins"]["target_name"] == "mine"
    seen = json.loads((out / "seen.json").read_text())
    assert seen[garak.KEY] == "secret"
    assert seen["XDG_DATA_HOME"] == str(environment / "data")
    assert "secret" not in (out / "garak.config.json").read_text() + (out / "garak.log").read_text()
    with pytest.raises(OutputError, match="exists"):
        garak.run(environment, "http://localhost:1/v1", "mine", out)


def test_runs_that_cannot_be(environment, tmp_path):
    with pytest.raises(ConfigError, match="status 1: cannot reach the endpoint") as caught:
        garak.run(environment, "http://localhost:1/v1", "broken", tmp_path / "out")
    assert str(tmp_path / "out" / "garak.log") in caught.value.hint
    with pytest.raises(ConfigError, match="no probe"):
        garak.run(environment, "http://localhost:1/v1", "m", tmp_path / "other", probes=[])
    with pytest.raises(ConfigError, match=r"no garak 0.17.1") as caught:
        garak.run(tmp_path / "nowhere", "http://localhost:1/v1", "m", tmp_path / "other")
    assert "--setup" in caught.value.hint


def test_setup_leaves_alone_what_is_there(environment, tmp_path):
    assert garak.setup(environment) == garak.VERSION
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(OutputError, match="no virtual environment"):
        garak.setup(tmp_path / "mine")
    with pytest.raises(OutputError, match="no virtual environment"):
        garak.setup(tmp_path / "mine" / "letter.txt")


def test_setup_says_what_pip_said(tmp_path, monkeypatch):
    """Without an index pip fails; the rest of setup is real but for making the environment, which takes seconds."""
    asked = []

    def fail(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="WARNING: x\nERROR: No matching distribution\nhint")

    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ConfigError, match="could not be installed: ERROR: No matching distribution") as caught:
        garak.setup(tmp_path / "new")
    assert "network" in caught.value.hint
    assert asked[0] == [
        str(environments.python_of(tmp_path / "new")),
        "-m",
        "pip",
        "install",
        "--no-input",
        "garak==0.17.1",
        "--constraint",
        str(garak.CONSTRAINTS),
    ]


def test_the_constraints_name_one_version_of_each():
    lines = [line for line in garak.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    asked = [Requirement(line) for line in lines]
    assert f"garak=={garak.VERSION}" in lines
    assert all([s.operator for s in r.specifier] == ["=="] for r in asked)
    assert not {"torch", "triton"} & {r.name for r in asked}
    for python in ("3.11", "3.12", "3.13"):
        machine = {"python_full_version": f"{python}.0", "python_version": python, "sys_platform": "linux"}
        here = [r.name for r in asked if r.marker is None or r.marker.evaluate(machine)]
        assert len(here) == len(set(here)) > 150
