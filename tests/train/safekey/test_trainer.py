import pytest
import torch

import traces
from safegraft.errors import ConfigError, NumericError, OutputError
from safegraft.evaluate.models.hf import load_chat
from safegraft.reasoning.segment import segment
from safegraft.train.distill import prepare
from safegraft.train.safekey.losses import HEAD_U, HEAD_XU, LM, QMM, Weights
from safegraft.train.safekey.spans import Trace, frame_of, spanned
from safegraft.train.safekey.trainer import SafeKeyRecipe, plain, train_safekey


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return traces.build(tmp_path_factory.mktemp("model") / "m")


def items(tokenizer, count=6, **kind):
    frame, found = frame_of(tokenizer), []
    for row in traces.rows(count, **kind):
        spans = segment(row["prompt"], row["response"])
        given = (row["id"], row["prompt"], row["response"], row["harmful"], spans.understanding, spans.key)
        found.append(spanned(tokenizer, frame, Trace(*given), max_length=400))
    return found


def run(folder, tmp_path, weights=None, *, lora=None, count=6, progress=None, resume=False, kind=None, **changes):
    model, tokenizer = load_chat(folder)
    if lora:
        prepare(model, scope="model", lora_rank=lora)
    settings = {"epochs": 3, "aux_epochs": 2, "batch": 4, "lr": 1e-2, "saves": False, "micro_batch": 2} | changes
    return train_safekey(
        model, tokenizer, items(tokenizer, count, **(kind or {})), weights or Weights(), SafeKeyRecipe(**settings),
        tmp_path / "work", resume=resume, progress=progress,
    )  # fmt: skip


def same(ours, theirs, within=1e-4):
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=within)


def test_terms_are_logged_by_name_and_the_loss_is_their_weighted_sum(folder, tmp_path):
    seen = []
    found = run(folder, tmp_path, Weights(qmm=0.3, head=0.4, theta=0.25), progress=lambda *now: seen.append(now))
    assert found.steps == 6 == len(found.log) == len(seen)  # the second step of an epoch has two rows, not four
    for entry in found.log[:2]:
        assert {LM, QMM, HEAD_U, HEAD_XU} & set(entry) == {LM}
        assert entry["loss"] == pytest.approx(entry[LM], abs=1e-5)
    for entry in found.log[2:]:
        whole = entry[LM] + 0.3 * entry[QMM] + 0.4 * (0.25 * entry[HEAD_U] + 0.75 * entry[HEAD_XU])
        assert entry["loss"] == pytest.approx(whole, abs=1e-5)
        assert entry["loss"] != pytest.approx(entry[LM], abs=1e-2)
    assert found.log[-1][LM] < found.log[0][LM]


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 4}, {"packed": True}, {"checkpoints": True}])
def test_how_a_batch_is_dealt_out_changes_nothing(folder, tmp_path, changes):
    plain_run, other = run(folder, tmp_path), run(folder, tmp_path, **changes)
    for ours, theirs in zip(other.log, plain_run.log, strict=True):
        for name in (LM, QMM, HEAD_U, HEAD_XU, "loss"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=2e-4)
    same(other.heads, plain_run.heads, 1e-3)


def test_ablations_change_only_their_own_term(folder, tmp_path):
    """At the first step all runs have the same weights, so terms that differ there differ by the ablation alone."""
    everywhere = {"aux_epochs": 2, "epochs": 2}
    whole = run(folder, tmp_path, **everywhere)
    first = whole.log[0]
    variants = {
        (HEAD_U, HEAD_XU): run(folder, tmp_path, Weights(heads="off"), **everywhere),
        (QMM,): run(folder, tmp_path, Weights(query="off"), **everywhere),
        (): run(folder, tmp_path, Weights(heads="detached"), **everywhere),
    }
    for gone, found in variants.items():
        assert [n for n in (LM, QMM, HEAD_U, HEAD_XU) if n not in found.log[0]] == list(gone)
        for name in {LM, QMM, HEAD_U, HEAD_XU} - set(gone):
            assert found.log[0][name] == pytest.approx(first[name], abs=1e-5)
    seen = run(folder, tmp_path, Weights(query="seen"), **everywhere)
    assert seen.log[0][QMM] != pytest.approx(first[QMM], abs=1e-3)
    for name in (LM, HEAD_U, HEAD_XU):
        assert seen.log[0][name] == pytest.approx(first[name], abs=1e-5)
    without, detached = variants[(HEAD_U, HEAD_XU)], variants[()]
    same(detached.state, without.state, 0)
    assert any(not torch.equal(whole.state[n], without.state[n]) for n in whole.state)
    assert any(not torch.equal(detached.heads[n], without.heads[n]) for n in detached.heads)


def test_lora_is_added_to_the_weights(folder, tmp_path):
    pytest.importorskip("peft")
    start, _ = load_chat(folder)
    found = run(folder, tmp_path, lora=2)
    before = start.state_dict()
    assert set(found.state) == set(before)
    moved = [n for n in before if not torch.equal(found.state[n], before[n])]
    assert sorted(moved) == sorted(n for n in before if "_proj" in n)
    for name in moved:
        assert int(torch.linalg.matrix_rank(found.state[name] - before[name], rtol=1e-3)) <= 2


def test_plain_adds_the_product_times_the_scaling():
    up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    state = {
        "a.base_layer.weight": torch.ones(2, 3), "a.lora_A.safegraft.weight": down, "a.lora_B.safegraft.weight": up,
        "a.base_layer.bias": torch.ones(2), "b.weight": torch.zeros(1),
    }  # fmt: skip
    found = plain(state, {"a": (0.5, False)})
    assert set(found) == {"a.weight", "a.bias", "b.weight"}
    assert found["a.weight"].tolist() == [[2.5, 3.0, 3.5], [4.0, 5.0, 6.0]]
    state["a.base_layer.weight"] = torch.ones(3, 2)
    assert plain(state, {"a": (0.5, True)})["a.weight"].tolist() == [[2.5, 4.0], [3.0, 5.0], [3.5, 6.0]]


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, at):
    whole = run(folder, tmp_path, saves=True)

    def stop(done, steps, loss):
        if done == at + 1:
            raise Stop

    with pytest.raises(Stop):
        run(folder, tmp_path / "other", saves=True, save_steps=at, progress=stop)
    found = run(folder, tmp_path / "other", saves=True, save_steps=at, resume=True)
    same(found.state, whole.state, 0)
    same(found.heads, whole.heads, 0)
    assert [e["step"] for e in found.log] == list(range(1, 7))
    for ours, theirs in zip(found.log, whole.log, strict=True):
        assert ours == theirs
    with pytest.raises(OutputError, match="no checkpoint"):
        run(folder, tmp_path / "empty", resume=True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"epochs": 0, "aux_epochs": 0}, "epochs 0"),
        ({"aux_epochs": 4}, "aux_epochs 4"),
        ({"lr": 0.0, "warmup": 1.0}, "(?s)lr 0.*warmup 1"),
        ({"micro_batch": 3}, "cannot be made of 3"),
        ({"kind": {"harmful": True}}, "harmful and benign"),
        ({"count": 0}, "harmful and benign|no rows"),
    ],
)
def test_what_cannot_work_is_refused(folder, tmp_path, changes, why):
    with pytest.raises(ConfigError, match=why):
        run(folder, tmp_path, **changes)


def test_a_loss_that_is_not_finite_stops_it(folder, tmp_path):
    with pytest.raises(NumericError, match="loss is"):
        run(folder, tmp_path, lr=1e30)


def test_packing_is_refused_where_it_would_lose_windows(tiny, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("gemma3_text"))
    _, tokenizer = load_chat(folder)
    with pytest.raises(ConfigError, match="sliding windows"):
        train_safekey(
            model, tokenizer, items(tokenizer, 2), Weights(), SafeKeyRecipe(batch=2, packed=True), tmp_path / "work"
        )
