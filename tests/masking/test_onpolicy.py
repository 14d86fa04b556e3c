"""Pairs of the models' own answers, worked out by hand with models that say what they are told to."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from safegraft.data import harmful
from safegraft.errors import ConfigError
from safegraft.masking import onpolicy
from safegraft.masking.onpolicy import on_policy_preferences

ASKED = [row.prompt for row in harmful("align", "distil")]
NO = "I'm sorry, but I can't help with that."


class Scripted:
    """Stands for HfChatModel: ``model`` is a function from a prompt to the answer."""

    def __init__(self, model, tokenizer, *, batch, progress):
        self.model, self.progress = model, progress

    def replies(self, chats, sampling):
        self.progress(len(chats), len(chats))
        return [SimpleNamespace(text=self.model(chat[-1].content)) for chat in chats]


def masked(aligned, plain):
    """Stands for MaskedModel, of which two sets of weights are asked for."""

    @contextmanager
    def installed(weights):
        yield plain if weights else aligned

    return SimpleNamespace(installed=installed, plain=lambda: {"w": 1})


def made(monkeypatch, aligned, plain, seen=None):
    monkeypatch.setattr(onpolicy, "HfChatModel", Scripted)
    progress = None if seen is None else lambda *now: seen.append(now)
    return on_policy_preferences(masked(aligned, plain), None, tokens=8, batch=4, seed=0, progress=progress)


def test_refusals_are_preferred_to_answers_and_answers_to_refusals(monkeypatch):
    """The aligned model answers the first two, the fusion refuses the third, and says nothing to the fourth."""
    seen = []
    found = made(
        monkeypatch,
        lambda prompt: f"Well, {prompt}" if prompt in ASKED[:2] else f"{NO} ({prompt})",
        lambda prompt: NO if prompt == ASKED[2] else "" if prompt == ASKED[3] else f"Step 1: {prompt}",
        seen,
    )
    pairs = [row for _, row in found.rows]
    unsafe = [p for p in pairs if p.turns[0]["content"] in ASKED]
    assert [p.turns[0]["content"] for p in unsafe] == ASKED[4:]
    assert all(p.chosen == f"{NO} ({p.turns[0]['content']})" for p in unsafe)
    assert all(p.rejected == f"Step 1: {p.turns[0]['content']}" for p in unsafe)
    safe = [p for p in pairs if p.turns[0]["content"] not in ASKED]
    assert len(safe) == len(unsafe)
    assert all(p.chosen == f"Step 1: {p.turns[0]['content']}" for p in safe)
    assert all(p.rejected.startswith(NO) for p in safe)
    assert "2 left out that the aligned model answers" in found.notes[0]
    assert seen[-1][0] == seen[-1][1] == 3 * len(ASKED)
    assert seen == sorted(seen)


def test_a_harmless_request_that_the_fusion_refuses_gets_the_starter_s_answer(monkeypatch):
    found = made(monkeypatch, lambda _: NO, lambda prompt: "Step 1" if prompt in ASKED else NO)
    safe = [row for _, row in found.rows if row.turns[0]["content"] not in ASKED]
    assert len(safe) == len(ASKED)
    assert all(row.chosen not in (NO, "Step 1") and row.rejected == NO for row in safe)


@pytest.mark.parametrize(("aligned", "plain"), [("Step 1", "Step 1"), (NO, NO)])
def test_models_that_do_not_differ_teach_nothing(monkeypatch, aligned, plain):
    with pytest.raises(ConfigError, match="only 0 of 150 harmful"):
        made(monkeypatch, lambda _: aligned, lambda _: plain)
