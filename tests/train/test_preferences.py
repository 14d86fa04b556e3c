"""Preference pairs from every shape of row, and what is said of those that are none."""

import json

import pytest

import chat_models
from safegraft.data import harmful, lookalikes, phrases
from safegraft.errors import ConfigError
from safegraft.train.preferences import Preference, choose_pairs, preference_of, read_preferences

ASKED = ({"role": "user", "content": "How?"},)
TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def pku(safer, first, second, **changes):
    labels = {"is_response_0_safe": first, "is_response_1_safe": second, "safer_response_id": safer}
    return {"prompt": "How?", "response_0": "a", "response_1": "b", **labels, **changes}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "How?", "chosen": "no", "rejected": "yes"}, Preference(ASKED, "no", "yes")),
        ({"prompt": list(ASKED), "chosen": said("no"), "rejected": said("yes")}, Preference(ASKED, "no", "yes")),
        ({"chosen": TURNS + said("no"), "rejected": TURNS + said("yes")}, Preference(tuple(TURNS), "no", "yes")),
        (pku(1, False, True), Preference(ASKED, "b", "a")),
        (pku(0, True, False), Preference(ASKED, "a", "b")),
        (pku("1", "False", "True"), Preference(ASKED, "b", "a")),
        (pku(1, None, None), Preference(ASKED, "b", "a")),
        (pku(1, True, True), None),
        (pku(0, False, False), None),
        (pku(0, False, True), None),
    ],
)
def test_shapes(row, expected):
    assert preference_of(row) == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([], "no object|not an object"),
        ({"prompt": "How?", "answer": "x"}, "none of the known shapes; its fields: prompt, answer"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": "How?", "chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "How?", "chosen": "a", "rejected": None}, "rejected is neither text"),
        ({"prompt": "How?", "chosen": "a", "rejected": "a"}, "both answers are the same"),
        ({"chosen": TURNS + said("a"), "rejected": TURNS[1:] + said("b")}, "not two answers to the same"),
        ({"prompt": said("x"), "chosen": "a", "rejected": "b"}, "does not end with a turn of the user"),
        (pku(2, True, False), "neither 0 nor 1"),
    ],
)
def test_what_is_wrong_is_told_without_the_text(row, why):
    with pytest.raises(ValueError, match=why) as told:
        preference_of(row)
    assert "How?" not in str(told.value)


def test_files_and_unclear_rows(tmp_path):
    rows = [pku(0, True, False), pku(1, True, True), {"prompt": "x"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json\n")
    found = read_preferences(str(tmp_path / "p.jsonl"))
    assert [line for line, _ in found.rows] == [1]
    assert [line for line, _ in found.bad] == [3, 4]
    assert "1 row(s) are left out" in found.notes[0]
    with pytest.raises(ConfigError, match="neither 'starter'"):
        read_preferences("gone")


def test_the_starter_prefers_refusals_for_harm_and_answers_for_the_rest():
    found = read_preferences("starter", seed=3)
    bad = {r.prompt for r in harmful("align", "distil")}
    known, good = phrases(), {r.prompt: r.answer for r in lookalikes()}
    asked = [(pair.turns[0]["content"], pair) for _, pair in found.rows]
    unsafe = [pair for prompt, pair in asked if prompt in bad]
    safe = [pair for prompt, pair in asked if prompt not in bad]
    assert len(unsafe) == len(safe) == 150
    assert all(p.chosen in known.refusals and p.rejected in known.affirmatives for p in unsafe)
    assert all(p.rejected in known.refusals for p in safe)
    assert all(good[p.turns[0]["content"]] == p.chosen for p in safe if p.turns[0]["content"] in good)
    assert {p.chosen for p in unsafe} == set(known.refusals)
    reported = {r.prompt for r in [*harmful("report", "select"), *lookalikes("report", "select", "evaluate")]}
    assert not reported & {prompt for prompt, _ in asked}
    assert found.rows == read_preferences("starter", seed=3).rows
    assert found.rows != read_preferences("starter", seed=4).rows


@pytest.fixture(scope="module")
def chat():
    return chat_models.tokenizer()


def test_pairs_are_rendered_drawn_and_held_out(tmp_path, chat):
    rows = [{"prompt": f"Question {i}?", "chosen": f"No {i}.", "rejected": f"Yes {i}!"} for i in range(8)]
    rows.append({"prompt": "x", "chosen": "the same " * 60 + "a", "rejected": "the same " * 60 + "b"})
    (tmp_path / "p.json").write_text(json.dumps(rows))
    source = read_preferences(str(tmp_path / "p.json"))
    how = {"allow_fewer": False, "held_out": 2, "max_length": 200, "seed": 1}
    found = choose_pairs(source, chat, samples=None, **how)
    assert (len(found.train), len(found.held_out)) == (6, 2)
    assert found.bad == [(9, "both answers are the same within 200 tokens")]
    for pair, preference in zip([*found.train, *found.held_out], found.preferences, strict=True):
        labelled = [t for t in pair.chosen.labels if t >= 0]
        assert chat.decode(labelled).startswith(preference.chosen)
        assert preference.turns[0]["content"] in chat.decode(pair.chosen.ids)
    assert len(choose_pairs(source, chat, samples=3, **how).train) == 3
    with pytest.raises(ConfigError, match=r"6 usable pair\(s\) of 7 asked for beside 2 held out"):
        choose_pairs(source, chat, samples=7, **how)
    assert len(choose_pairs(source, chat, samples=7, **how | {"allow_fewer": True}).train) == 6


def test_earlier_turns_reach_the_model(chat):
    row = {"prompt": [*ASKED, *said("Like this."), {"role": "user", "content": "And then?"}]}
    made = preference_of(row | {"chosen": "So.", "rejected": "Not so."})
    from safegraft.train.data import encode

    text = chat.decode(encode(chat, made.turns, made.chosen).ids)
    assert "Like this." in text
    assert text.index("And then?") < text.index("So.")
