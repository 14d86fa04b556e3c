"""Tasks of lm-evaluation-harness on local files: its own definitions, scripted and tiny models, results by hand."""

import gzip
import json
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

import chat_models
from safegraft.cli import app
from safegraft.errors import ConfigError
from safegraft.evaluate.answers import latest, read_answers, read_manifest, read_verdicts
from safegraft.evaluate.models.hf import HfChatModel, load_chat
from safegraft.evaluate.records import Reply, Sampling
from safegraft.evaluate.run import Subject, evaluate, rejudge
from safegraft.evaluate.summary import right
from safegraft.evaluate.utility import chatlm, divide, harness, load, sandbox
from safegraft.evaluate.utility.base import place
from safegraft.evaluate.utility.quiet import quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]

SUMS = [("Tom has 3 apples and buys 4. How many?", 7), ("Ann has 9 pens and loses 5. How many?", 4),
        ("A box holds 12 eggs. How many in 2?", 24), ("Sam runs 1000 m, then 500 m. How far?", 1500)]  # fmt: skip
SHOTS = [(f"What is {n} plus {n}?", 2 * n) for n in range(1, 8)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files as they are published, a few rows each, written for this test."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("test", SUMS), ("train", SHOTS)):
        write(folder / f"gsm8k_{name}.jsonl", [{"question": q, "answer": f"So it is.\n#### {a}"} for q, a in rows])
    write(folder / "math500.jsonl", [
        {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2"},
        {"problem": "What is half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
    ])  # fmt: skip
    options = {"opa": "liver", "opb": "heart", "opc": "lung", "opd": "skin"}
    (folder / "medmcqa_dev.json").write_text(json.dumps(
        [{"question": f"Which organ is number {n}?", **options, "cop": n} for n in (1, 2, 3, 4)]
    ))  # fmt: skip
    write(folder / "medqa_us_test.jsonl", [
        {"question": f"Is it {right}?", "answer_idx": right, "options": dict.fromkeys("ABCD", "this") | {right: "it"}}
        for right in "AD"
    ])  # fmt: skip
    problems = [
        {"task_id": f"HumanEval/{i}", "entry_point": name, "prompt": f"def {name}(a, b):\n    \"\"\"{said}\"\"\"\n",
         "test": f"def check(candidate):\n    assert candidate(6, 3) == {value}\n"}
        for i, (name, said, value) in enumerate([("add", "a plus b", 9), ("sub", "less", 3), ("mul", "times", 18)])
    ]  # fmt: skip
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(p) + "\n" for p in problems))
    write(folder / "mbpp.jsonl", [
        {"task_id": n, "text": f"Write a function f that returns {n}.", "code": f"def f(): return {n}",
         "test_list": [f"assert f() == {n}"] * 3, "test_setup_code": "", "challenge_test_list": []}
        for n in (2, 11, 12, 601)
    ])  # fmt: skip
    return folder


class Scripted:
    """Answers by what the last question holds; counts; may break down after some batches."""

    def __init__(self, said, breaks_after=None):
        self.said, self.breaks_after, self.asked = said, breaks_after, []

    def replies(self, batch, sampling):
        if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
            raise RuntimeError("killed")
        self.asked += [c[-1].content for c in batch]
        self.last, self.sampling = batch[-1], sampling
        texts = [next(v for k, v in self.said.items() if k in " ".join(m.content for m in c[-2:])) for c in batch]
        return [Reply(text, 5, True) for text in texts]


GSM8K = {
    "Tom": "3 + 4 = 7\n#### 7",
    "Ann": "<think>9 - 5 is 4. Question: sure?</think>It is 4 pens.\nQuestion: 99?",
    "box": "It is\u2028\x85 23.",  # ends of lines to str.splitlines, not to JSON Lines
    "Sam": "<think>1000 and 500 makes 1500",
}


def test_a_generated_answer_is_scored_by_the_harness(data, tmp_path):
    task = harness.load("gsm8k", data=data)
    assert (task.about["cases"], task.about["metric"], task.about["harness"]["shots"]) == (4, "exact_match", 5)
    model = Scripted(GSM8K)
    rows = task.measure("m", model, tmp_path, None)
    assert [(r.verdict.judge, r.verdict.label) for r in rows] == [
        ("exact_match", "correct"), ("exact_match", "correct"), ("exact_match", "wrong"), ("exact_match", "truncated"),
    ]  # fmt: skip
    assert len(model.last) == 11  # five examples as turns, then the question
    assert model.sampling == Sampling(256, 0.0)
    ann, sam = rows[1].answer, rows[3].answer
    assert (ann.judged, ann.reasoning, ann.thinking) == ("It is 4 pens.\n", "9 - 5 is 4. Question: sure?", "complete")
    assert ann.prompt == "Question: Ann has 9 pens and loses 5. How many?\nAnswer:"
    assert (sam.judged, sam.thinking) == ("", "truncated")
    kept = json.loads((tmp_path / "results.json").read_text())["results"]["gsm8k"]
    assert (kept["exact_match,flexible-extract"], kept["exact_match,strict-match"]) == (0.5, 0.25)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().split("\n") if line]
    assert len(samples) == 8  # two filters


def test_settings(data, tmp_path):
    task = harness.load("gsm8k", data=data, limit=1, tokens=9)
    model = Scripted(GSM8K)
    assert [r.answer.id for r in task.measure("m", model, tmp_path, None)] == ["0"]
    assert model.sampling == Sampling(9, 0.0)
    assert harness.load("gsm8k", data=data).about["harness"]["tokens"] is None
    with pytest.raises(ConfigError, match="decodes with top_p"):
        chatlm._sampling({"do_sample": True, "top_p": 0.9})
    assert chatlm._sampling({"do_sample": True, "temperature": 0.7, "until": "x"}) == Sampling(256, 0.7)
    assert chatlm._sampling({"temperature": 0.7}) == Sampling(256, 0.0)


def test_mathematics(data, tmp_path):
    task = harness.load("math500", data=data)
    said = {"1+1": "Final Answer: The final answer is $2$. I hope it is correct.", "half": "$\\boxed{0.4}$"}
    rows = task.measure("m", Scripted(said), tmp_path, None)
    assert [(r.verdict.judge, r.verdict.label) for r in rows] == [("math_verify", "correct"), ("math_verify", "wrong")]


def test_an_interrupted_task_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(chatlm, "CHUNK", 1)
    task = harness.load("gsm8k", data=data)
    whole = task.measure("m", Scripted(GSM8K), tmp_path / "whole", None)
    with pytest.raises(RuntimeError, match="killed"):
        task.measure("m", Scripted(GSM8K, breaks_after=2), tmp_path / "cut", None)
    with (tmp_path / "cut" / "replies.jsonl").open("a") as file:
        file.write('{"key": "torn')
    rest = Scripted(GSM8K)
    assert task.measure("m", rest, tmp_path / "cut", None) == whole
    assert len(rest.asked) == 2
    for name in ("replies.jsonl", "samples.jsonl", "results.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = chat_models.build(tmp_path_factory.mktemp("chat") / "tiny")
    return HfChatModel(*load_chat(folder), batch=2)


def test_choices_are_scored_by_likelihood(data, tmp_path, tiny):
    """By hand: log p of each letter after the model's own template."""
    import torch

    task = harness.load("medmcqa", data=data)
    assert task.needs == {"likelihood"}
    rows = task.measure("m", tiny, tmp_path, None)
    assert [r.answer.expected for r in rows] == ["0", "1", "2", "3"]
    for row in rows:
        turns = [{"role": "user", "content": row.answer.prompt}]
        text = tiny.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = tiny.model(torch.tensor([ids])).logits[0, -1].detach()
        best = max("ABCD", key=lambda letter, x=logits: float(x[tiny.tokenizer(letter)["input_ids"][0]]))
        assert row.answer.reply == best
        assert row.verdict.label == ("correct" if "ABCD".index(best) == int(row.answer.expected) else "wrong")
    with pytest.raises(ConfigError, match="need a model in this process"):
        task.measure("m", Scripted({}), tmp_path / "other", None)


def test_the_harness_gives_the_same_with_its_own_model(data, tmp_path, tiny):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    for name, size in (("gsm8k", 2), ("medqa", 2)):
        task = harness.load(name, data=data, limit=size, tokens=12)
        task.measure("m", tiny, tmp_path / name, None)
        ours = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().split("\n") if line]
        with quiet():
            theirs = lm_eval.evaluate(
                HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=1), {"tasks": task.tasks}, limit=size,
                apply_chat_template=True, fewshot_as_multiturn=True, bootstrap_iters=0,
            )["samples"]  # fmt: skip
        theirs = [row for rows in theirs.values() for row in rows]
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            if name == "gsm8k":
                assert a["resps"][0][0].strip() == b["resps"][0][0].strip()
            else:
                assert [r[0][0] for r in a["resps"]] == pytest.approx([r[0][0] for r in b["resps"]], abs=1e-3)


def granted():
    """Skips, with the reason, where the machine grants no sandbox."""
    try:
        sandbox.require()
    except ConfigError as error:
        pytest.skip(str(error))


CODE = {
    "def add(": "    return a + b\n```\nThat is it.",
    "def sub(": "    import sys\n    sys.exit(0)\n```",
    "def mul(": "    open('/usr/x', 'w')\n    return a * b\n```",
}


def test_generated_code_runs_in_the_sandbox_only(data, tmp_path, monkeypatch):
    granted()
    ran = []
    run = sandbox.passes
    monkeypatch.setattr(sandbox, "passes", lambda program: ran.append(program) or run(program))
    task = harness.load("humaneval", data=data, allow_code=True)
    assert task.needs == {"continue"}
    rows = task.measure("m", Scripted(CODE), tmp_path, None)
    assert [(r.verdict.judge, r.verdict.label) for r in rows] == [
        ("pass@1", "correct"), ("pass@1", "wrong"), ("pass@1", "wrong"),
    ]  # fmt: skip
    assert sum("candidate(6, 3)" in program for program in ran) == 3
    task = harness.load("mbpp", data=data, allow_code=True)
    said = {"returns 11.": "def f(): return 11\n```", "returns 12.": "def f(): return 13\n```"}
    rows = task.measure("m", Scripted(said), tmp_path / "mbpp", None)
    assert [r.verdict.label for r in rows] == ["correct", "wrong"]  # rows 2 and 601 are of other splits


def test_code_needs_to_be_allowed(data, monkeypatch):
    for name in ("humaneval", "mbpp"):
        with pytest.raises(ConfigError, match=f"{name} runs code that the model wrote") as caught:
            load([name, "gsm8k"], data=data)
        assert "--allow-code-execution" in caught.value.hint
    own = SimpleNamespace(UNSAFE_CODE=True, get_config={"process_results": write}.get)  # a scorer without code_eval
    ready = partial(harness._ready, "lm_eval:own", None, {"own": own}, {}, None, None, 0)
    with pytest.raises(ConfigError, match="lm_eval:own runs code"):
        ready(False)
    monkeypatch.setattr(sandbox, "require", lambda: None)
    with pytest.raises(ConfigError, match="by a program of its own, which cannot be shut in"):
        ready(True)
    monkeypatch.undo()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    sandbox.require.cache_clear()
    with pytest.raises(ConfigError, match="cannot be shut in on darwin"):
        load(["humaneval"], data=data, allow_code=True)


def test_what_cannot_be_had(data, tmp_path):
    with pytest.raises(ConfigError, match="cannot load mmlu_pro") as caught:
        harness.load("mmlu_pro")
    assert "mmlu_pro_test.jsonl and mmlu_pro_validation.jsonl" in caught.value.hint
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "?", "answer": "1"}])
    with pytest.raises(ConfigError, match=r"needs gsm8k_train\.jsonl beside it"):
        harness.load("gsm8k", data=tmp_path)
    write(tmp_path / "gsm8k_train.jsonl", [{"question": "?"}])
    with pytest.raises(ConfigError, match="row 1 has no answer"):
        harness.load("gsm8k", data=tmp_path)
    (tmp_path / "medmcqa_dev.json").write_text(json.dumps(
        [{"question": "?", "opa": "", "opb": "", "opc": "", "opd": "", "cop": n} for n in (1, 5)]
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="counted neither from 0 nor from 1"):
        harness.load("medmcqa", data=tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        harness.load("gsm8k", data=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="limit 0 is below 1"):
        load(["gsm8k"], data=data, limit=0)


def test_any_other_task(monkeypatch):
    """The whole index takes seconds to read; one folder of it stands for it here."""
    from pathlib import Path

    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / "gsm8k"
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False, include_path=folder))
    with pytest.raises(ConfigError, match="has no task 'no_such_task'"):
        load(["lm_eval:no_such_task"])
    with pytest.raises(ConfigError, match="cannot load lm_eval:gsm8k"):
        load(["lm_eval:gsm8k"])


def test_a_group(tmp_path, monkeypatch):
    """MMLU-Pro: fourteen tasks, one a subject, each with the rows of its category."""
    from lm_eval import tasks

    subjects = ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history",
                "law", "math", "other", "philosophy", "physics", "psychology")  # fmt: skip
    rows = [{"question": f"Q {s}?", "options": ["x", "y"], "answer": "B", "answer_index": 1, "category": s,
             "cot_content": "A: Let's think step by step. The answer is (B)."} for s in subjects]  # fmt: skip
    write(tmp_path / "mmlu_pro_test.jsonl", rows)
    write(tmp_path / "mmlu_pro_validation.jsonl", rows * 5)
    task = harness.load("mmlu_pro", data=tmp_path)
    assert task.about["cases"] == 14
    said = {"Q law?": "The answer is (A).", "Q ": "Hm. The answer is (B)."}
    found = task.measure("m", Scripted(said), tmp_path / "out", None)
    assert {r.answer.id for r in found if r.verdict.label == "wrong"} == {"mmlu_pro_law/0"}
    assert {r.answer.category for r in found} == set(task.tasks)
    assert isinstance(tasks.__file__, str)


def test_names():
    assert divide(["starter", "utility", "gsm8k", "lm_eval:arc_easy"]) == (
        ["starter"], ["gsm8k", "math500", "medmcqa", "medqa", "mmlu_pro", "ifeval", "lm_eval:arc_easy"],
    )  # fmt: skip
    assert divide(["code", "evalplus"]) == ([], ["humaneval", "mbpp", "humaneval+", "mbpp+"])


def subject(label, model):
    @contextmanager
    def opened():
        yield model

    return Subject(label, opened, {})


def test_in_a_run(data, tmp_path, monkeypatch):
    """Two models in an evaluation: rates, the paired comparison, an interruption, and judging again."""
    monkeypatch.setattr(chatlm, "CHUNK", 1)
    tasks = load(["gsm8k"], data=data)
    perfect = {q.split()[0] if q[0] != "A" or q[1] != " " else "box": f"#### {a}" for q, a in SUMS}

    def go(out, second, **changes):
        models = [subject("a b/c", Scripted(GSM8K)), subject("second", second)]
        return evaluate(
            models, [], {}, out, attacks={"none": None}, utility=tasks, sampling=Sampling(), **changes
        )  # fmt: skip

    whole = go(tmp_path / "whole", Scripted(perfect))
    cells = {c["model"]: (c["metric"], c["benchmark"], c["judge"], c["rate"]["hits"], c["rate"]["n"], c["unparsed"])
             for c in whole["cells"]}  # fmt: skip
    assert cells == {
        "a b/c": ("utility", "gsm8k", "exact_match", 2, 4, 1), "second": ("utility", "gsm8k", "exact_match", 4, 4, 0),
    }  # fmt: skip
    assert [(c["difference"]["value"], c["difference"]["n"]) for c in whole["comparisons"]] == [(0.5, 4)]
    manifest = read_manifest(tmp_path / "whole")
    assert manifest["config"]["benchmarks"][0]["harness"]["tasks"] == {"gsm8k": 3.0}
    folder = place(tmp_path / "whole", "a b/c", "gsm8k")
    assert {f.name for f in folder.iterdir()} == {"replies.jsonl", "samples.jsonl", "results.json", "scored.json"}
    answers, verdicts = read_answers(tmp_path / "whole"), latest(read_verdicts(tmp_path / "whole"))
    assert right(answers, verdicts, "a b/c") == {
        "gsm8k/0": True, "gsm8k/1": True, "gsm8k/2": False, "gsm8k/3": False,
    }  # fmt: skip

    out = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="killed"):
        go(out, Scripted(perfect, breaks_after=2))
    assert not (out / "manifest.json").exists()
    rest = Scripted(perfect)
    assert go(out, rest, resume=True) == whole
    assert len(rest.asked) == 2
    for name in ("answers.jsonl", "verdicts.jsonl", "summary.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (place(out, "second", "gsm8k") / "scored.json").unlink()
    again = Scripted({})
    assert go(out, again, resume=True) == whole
    assert again.asked == []
    assert rejudge(out, {}) == whole
    with pytest.raises(ConfigError, match="two benchmarks have one name"):
        evaluate([subject("m", again)], [], {}, tmp_path / "x", attacks={"none": None}, utility=tasks * 2,
                 sampling=Sampling())  # fmt: skip


def inside(*arguments):
    """A command within this process, which saves a start. Returns its exit status, None where it ended well."""
    return app([str(a) for a in arguments], standalone_mode=False)


def test_as_commands(data, tmp_path, capsys):
    """evaluate, gate and report on two metrics and the models' own answers."""
    model = chat_models.build(tmp_path / "tiny")
    run, options = tmp_path / "run", ["--data", data, "--limit", 3, "--task-tokens", 4]
    inside("evaluate", f"a={model}", f"b={model}", "--suite", "gsm8k", "--suite", "medmcqa", *options, "--out", run)
    assert "exact_match" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert {(c["benchmark"], c["judge"], c["rate"]["n"]) for c in summary["cells"]} == {
        ("gsm8k", "exact_match", 3), ("medmcqa", "acc", 3),
    }  # fmt: skip
    assert inside("gate", run, "--max-utility-drop", 0.02) == 2
    assert "n 6" in capsys.readouterr().out
    inside("report", run, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Utility (exact_match)" in page
    assert "Utility (acc)" in page
    assert "Utility: gsm8k, exact_match" in page
    inside("report", run, "--out", tmp_path / "r.md")
    assert "lm-evaluation-harness 0.4" in (tmp_path / "r.md").read_text()
    inside("utility", "list")
    said = capsys.readouterr().out
    assert all(name in said for name in ("humaneval+", "gsm8k_train.jsonl", "minerva_math500"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--suite", "medmcqa", "--defense", "self_reminder"], "medmcqa compares the likelihoods of given answers"),
        (["--suite", "medqa", "--backend", "vllm"], "which the backend vllm does not allow"),
        (["--suite", "mbpp", "--backend", "vllm", "--allow-code-execution"], "mbpp begins the answer for the model"),
        (["--suite", "mbpp+", "--allow-code-execution"], r"mbpp\+ needs EvalPlus"),
        (["--suite", "mmlu_pro"], "cannot load mmlu_pro"),
    ],
)
def test_bad_options_are_told_before_any_work(data, tmp_path, options, said):
    if "--allow-code-execution" in options:
        granted()
    with pytest.raises(ConfigError, match=said):
        inside("evaluate", f"m={tmp_path}", "--data", data, "--out", tmp_path / "c", *options)
    assert not (tmp_path / "c").exists()


def test_the_docs_name_every_task_and_file():
    from pathlib import Path

    from safegraft.evaluate.utility.tasks import KNOWN, PLUS, SUITES

    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    files = [names[0] for known in KNOWN.values() for names in known.files.values()] + [p[1][0] for p in PLUS.values()]
    tasks = [known.task for known in KNOWN.values()]
    assert [name for name in (*SUITES, *KNOWN, *PLUS, *tasks, *files) if name not in page] == []
    assert {name for names in SUITES.values() for name in names} == {*KNOWN, *PLUS}
