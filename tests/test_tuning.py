"""The search for a strength, on a tiny chat model: what it tries, chooses, resumes and refuses."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

import chat_models
import models
from safegraft import subtract
from safegraft.errors import ConfigError, OutputError
from safegraft.evaluate.metrics import rate
from safegraft.evaluate.models.hf import HfChatModel
from safegraft.evaluate.records import Sampling, ask
from safegraft.evaluate.tasks import holds
from safegraft.merging.live import graft
from safegraft.train.calibrate import calibrate
from safegraft.train.data import Pair, encode
from safegraft.tuning.data import Part, read_parts
from safegraft.tuning.search import Limits, Scores, keeps, loss, parts_of, search, token_accuracy

pytest.importorskip("optuna")


def scores(unsafe, refused, utility, right=None):
    counted = None if right is None else rate(i < right for i in range(10))
    return Scores(*(rate(i < hits for i in range(10)) for hits in (unsafe, refused)), utility, counted)


@pytest.mark.parametrize(
    ("found", "kept", "cost"),
    [
        (scores(3, 1, 0.50), True, 0.3),
        (scores(3, 1, 0.48), True, 0.3),
        (scores(3, 1, 0.47), False, 0.3 + 10 * 0.01),
        (scores(0, 3, 0.50), False, 10 * 0.2),
    ],
)
def test_limits_and_loss(found, kept, cost):
    start = scores(9, 0, 0.5)
    assert keeps(found, start, Limits()) is kept
    assert loss(found, start, Limits()) == pytest.approx(cost)


def test_right_answers_count_before_token_accuracy():
    start = scores(9, 0, 0.5, right=8)
    assert keeps(scores(3, 1, 0.1, right=8), start, Limits())
    assert not keeps(scores(3, 1, 0.5, right=7), start, Limits())
    assert loss(scores(3, 1, 0.5, right=7), start, Limits()) == pytest.approx(0.3 + 10 * (0.1 - 0.02))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("tune")
    chat_models.build(root / "base")
    models.finetuned(root / "base", root / "task", scale=0.02)
    models.unaligned(root / "base", root / "bad", scale=0.02)
    subtract(root / "base", root / "bad", root / "vector")
    calibrate(root / "base", root / "cal", limit=8, max_length=32)
    rows = [{"prompt": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(18)]
    (root / "task.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return SimpleNamespace(root=root, parts=lambda: read_parts(root / "task.jsonl", None, None, search=4, seed=0))


def small(part):
    return Part(part.harmful[:4], part.harmless[:4], part.task[:4])


def run(made, out, trials, **more):
    parts = made.parts()
    parts = type(parts)(*(small(p) for p in (parts.search, parts.choose, parts.report)))
    root = made.root
    vector = None if "calibration" in more else str(root / "vector")
    return search(
        chat_models.load(root / "task"), str(root / "task"), str(root / "base"), vector, out, parts,
        limits=more.pop("limits", Limits(1.0, 1.0)), trials=trials, shortlist=2, tokens=4, batch=4, **more,
    )  # fmt: skip


def test_parts_are_disjoint_and_seeded(made):
    parts = made.parts()
    for kind in ("harmful", "harmless", "task"):
        rows = [str(r) for p in (parts.search, parts.choose, parts.report) for r in getattr(p, kind)]
        assert len(rows) == len(set(rows))
    assert len(parts.search.harmful) == 4
    assert len(parts.report.harmful) > 50
    assert parts == made.parts()


def test_a_search_measures_chooses_and_resumes(made, tmp_path):
    out = tmp_path / "run"
    first = run(made, out, 3)
    assert len(first["trials"]) == 3
    assert len(first["shortlist"]) == 2
    assert first["chosen"]["damping"] in ("paper", "none", "subspace", "input")
    assert set(first["report"]) == {"fine-tuned", "restored"}
    assert json.loads((out / "tune.json").read_text())["chosen"] == first["chosen"]
    with pytest.raises(OutputError, match="--resume"):
        run(made, out, 3)
    more = run(made, out, 12, resume=True)
    assert more["trials"][:3] == first["trials"]
    assert len({t["strength"] for t in more["trials"]}) == 12
    assert run(made, tmp_path / "whole", 12)["trials"] == more["trials"]
    with pytest.raises(OutputError, match="another search"):
        run(made, out, 12, resume=True, seed=1)


def test_the_budget_of_safe_delta(made, tmp_path):
    out, calibration = tmp_path / "run", str(made.root / "cal")
    found = run(made, out, 4, calibration=calibration)
    trials = found["trials"]
    assert all(set(t) == {"strength", "loss", "scores"} for t in trials)
    assert found["inputs"]["calibration"] == {"name": calibration}
    chosen = found["chosen"]
    assert (chosen["method"], chosen["params"], chosen["damping"]) == ("safe_delta", {}, None)
    most = max(t["strength"] for t in trials)
    least = min(row["scores"]["unsafe"]["hits"] for row in found["shortlist"] if row["keeps"])
    equal = [row["strength"] for row in found["shortlist"] if row["scores"]["unsafe"]["hits"] == least]
    assert chosen["strength"] == max(equal)  # what keeps more of the fine-tune
    more = run(made, out, 6, calibration=calibration, resume=True)
    assert more["trials"][:4] == trials
    with graft(
        chat_models.load(made.root / "task")[0], made.root / "task", made.root / "base", calibration=calibration
    ) as live:
        assert live.change() / 20 < most <= 1.5 * live.change()
    with pytest.raises(ConfigError, match="above 0"):
        run(made, tmp_path / "none", 2, calibration=calibration, highest=0.0)


def with_keys(made, tmp_path, keys):
    rows = [json.loads(line) for line in (made.root / "task.jsonl").read_text().splitlines()]
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(r | k) + "\n" for r, k in zip(rows, keys, strict=True)))
    return SimpleNamespace(root=made.root, parts=lambda: read_parts(file, None, None, search=4, seed=0))


def test_rows_with_keys_are_answered_and_counted(made, tmp_path):
    """A tiny model's answers hold whatever its tokenizer makes, so the keys are what it says."""
    net, tokenizer = chat_models.load(made.root / "task")
    longest = max(len(tokenizer(f"It is {2 * i}.")["input_ids"]) for i in range(18))
    prompts = [f"What is {i} and {i}?" for i in range(18)]
    said = [r.text for r in HfChatModel(net, tokenizer).replies([ask(p) for p in prompts], Sampling(max(4, longest)))]
    words = [(re.findall(r"\w+", text) or ["nothing"])[0] for text in said]
    keys = [{"key": word if i % 2 else "never said"} for i, word in enumerate(words)]
    keyed = with_keys(made, tmp_path, keys)
    found = run(keyed, tmp_path / "run", 2, limits=Limits(1.0, 1.0))
    expected = sum(holds(said[prompts.index(row.prompt)], row.key) for row in small(keyed.parts().search).task)
    assert found["start"]["right"]["hits"] == expected > 0
    assert found["start"]["right"]["n"] == 4
    assert all(t["scores"]["right"]["n"] == 4 for t in found["trials"])
    assert found["report"]["restored"]["right"]["n"] == 4


@pytest.mark.parametrize("keys", [[{"key": "1"}] * 17 + [{}], [{"key": 1}] * 18, [{"key": " "}] + [{"key": "1"}] * 17])
def test_keys_in_some_rows_only(made, tmp_path, keys):
    with pytest.raises(ConfigError, match=f"no key in {sum(k.get('key') != '1' for k in keys)} of 18 rows"):
        with_keys(made, tmp_path, keys).parts()


def test_one_of_vector_and_calibration(made, tmp_path):
    for vector, calibration in ((None, None), ("vector", "cal")):
        with pytest.raises(ConfigError, match="one of a vector and a calibration"):
            search((None, None), "m", "b", vector, tmp_path / "out", made.parts(), limits=Limits(),
                   calibration=calibration)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_nothing_within_the_limits_is_said(made, tmp_path):
    found = run(made, tmp_path / "run", 2, limits=Limits(1.0, -2.0))
    assert found["chosen"] is None
    assert found["report"] == {}


def test_token_accuracy_counts_answer_tokens(made):
    net, tokenizer = chat_models.load(made.root / "task")
    rows = [Pair("How do I bake bread?", "Mix flour."), Pair("Hello", "Wait, then bake.")]
    right = total = 0
    for row in rows:
        encoded = encode(tokenizer, row.prompt, row.answer)
        with torch.no_grad():
            guess = net(input_ids=torch.tensor([encoded.ids])).logits[0].argmax(-1).tolist()
        pairs = [(g, label) for g, label in zip(guess, encoded.labels[1:], strict=False) if label >= 0]
        right += sum(g == label for g, label in pairs)
        total += len(pairs)
    assert token_accuracy(net, tokenizer, rows) == right / total


def test_bad_files_are_told_line_by_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": 3, "answer": "b"}\nnot json\n{"prompt": "a"}\n')
    with pytest.raises(ConfigError) as told:
        read_parts(file, None, None, search=4, seed=0)
    for part in ("3 row(s)", "line 2", "line 3", "line 4", "prompt and answer"):
        assert part in str(told.value)
    file.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ConfigError, match="at least 12"):
        read_parts(file, None, None, search=4, seed=0)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from safegraft.report.frontier import write_frontier

    def point(strength, damping, unsafe, refused, utility):
        rates = {name: {"hits": hits, "n": 10} for name, hits in (("unsafe", unsafe), ("refused", refused))}
        return {"strength": strength, "damping": damping, "scores": {**rates, "utility": utility}}

    trials = [point(0.1, "paper", 8, 0, 0.9), point(1.0, "input", 2, 1, 0.89), point(3.0, "none", 0, 7, 0.5)]
    write_frontier(trials, trials[0]["scores"], {"strength": 1.0, "damping": "input"}, 0.1, 0.02, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    counted = [t | {"scores": t["scores"] | {"right": {"hits": 9, "n": 10}}} for t in trials]
    write_frontier(counted, counted[0]["scores"], None, 0.1, 0.02, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "f.png").read_bytes()
    budgets = [{k: v for k, v in t.items() if k != "damping"} for t in trials]
    write_frontier(budgets, trials[0]["scores"], {"strength": 1.0, "damping": None}, 0.1, 0.02, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_scopes_worth_trying():
    q, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert parts_of([q]) == ["all"]
    assert parts_of([q, up]) == ["all", "attention", "ffn"]
    assert parts_of([q, "model.norm.weight"]) == ["all", "attention"]
