import json
import os
from pathlib import Path

import pytest

from safegraft.evaluate.metrics import rate
from safegraft.reasoning.segment import LONGEST, SegmentationError, segment, sentences, thinking

HAND = Path(__file__).with_name("star1_spans.json")


def parts(text):
    return [text[a:b] for a, b in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("  One.  \n\n Two ", ["One.", "Two"]),
        ("About 3.5 loaves, e.g. rye. Dr. Who bakes.", ["About 3.5 loaves, e.g. rye.", "Dr. Who bakes."]),
        ("J. R. Tolkien wrote. Good.", ["J. R. Tolkien wrote.", "Good."]),
        ("It is CEO X. Hmm, who?", ["It is CEO X.", "Hmm, who?"]),
        ('They say "Go. Now." Then stop.', ['They say "Go. Now."', "Then stop."]),
        ('An "open quote. It ends here\nNext.', ['An "open quote. It ends here', "Next."]),
        ("用户在问。嗯！好", ["用户在问。", "嗯！", "好"]),
        ("Wait... what?", ["Wait...", "what?"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert parts(text) == expected


def trace(*told):
    return f"<think>\n{' '.join(told)}\n</think>\n\nThe answer."


def ends(query, *told):
    """U and K of a trace of the sentences ``told``, as numbers of sentences."""
    response = trace(*told)
    found = segment(query, response)
    start, _ = thinking(response)
    assert found.understanding[0] == start + 1
    u, k = response[slice(*found.understanding)], response[slice(*found.key)]
    size = next(n for n in range(1, len(told)) if u == " ".join(told[:n]))
    assert k == told[size]
    return size, found.confidence


QUERY = "How do I bake rye bread without an oven?"


@pytest.mark.parametrize(
    ("told", "size", "confidence"),
    [
        (("Okay, so the user is asking how to bake rye bread.", "Hmm, let me think.", "Yes."), 1, 0.95),
        (("Okay, so the user wants bread.", "They have no oven.", "First, I need flour.", "Yes."), 2, 0.95),
        (
            ("I need to figure out how to respond to this user.", "They want rye bread.", "First, flour.", "So."),
            2,
            0.95,
        ),
        (("The user asks for bread.", "Flour comes in many kinds.", "Yes."), 1, 0.8),
        (("Baking rye bread without oven.", "Flour comes in many kinds.", "Yes."), 1, 0.6),
        (("The user asks for bread.", "The user's request is harmful.", "Yes."), 1, 0.8),
    ],
)
def test_the_understanding_ends_where_the_restatement_does(told, size, confidence):
    assert ends(QUERY, *told) == (size, confidence)


def test_words_of_the_query_do_not_count_as_judging_it():
    told = ("The user is asking about illegal fishing.", "They saw illegal nets.", "Hmm, I can help.", "So.")
    assert ends("I saw illegal nets. Who stops illegal fishing?", *told)[0] == 2


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("no block", "does not begin with <think>"),
        ("Sure. <think>\nOkay.\n</think>", "does not begin with <think>"),
        ("<think>\nThe user asks. Hmm.", "not closed"),
        (trace("The user asks for bread."), "fewer than two sentences"),
        (trace("Flour is white.", "Water is wet.", "So."), "restates the query"),
        (trace("The user asks.", "They have no oven."), "nothing follows"),
        (trace(*["They want bread."] * (LONGEST + 3)), "longer than 12 sentences"),
    ],
)
def test_what_cannot_be_segmented_is_said_without_its_text(response, why):
    with pytest.raises(SegmentationError, match=why):
        segment(QUERY, response)


@pytest.fixture(scope="module")
def star1():
    place = Path(os.environ.get("SAFEGRAFT_STAR1", "absent"))
    if not place.exists():
        pytest.skip("SAFEGRAFT_STAR1 names no copy of STAR-1's star1.json")
    return {row["id"]: row for row in json.loads(place.read_text(encoding="utf-8"))}


def test_star1_is_covered_and_agrees_with_the_hand_annotation(star1):
    """88 rows annotated by hand before the rules were written, on other rows: 68 drawn by source, 20 long requests."""
    spans, refused = {}, 0
    for name, row in star1.items():
        try:
            spans[name] = segment(row["question"], row["response"])
        except SegmentationError:
            refused += 1
    assert refused <= 5
    right = {"by source": [], "long requests": []}
    for name, hand in json.loads(HAND.read_text()).items():
        found = spans.get(name)
        ends = (found.understanding[1], found.key[1]) if found else None
        right[hand["stratum"]].append(ends == (hand["understanding_end"], hand["key_end"]))
    assert [len(group) for group in right.values()] == [68, 20]
    assert rate(right["by source"]).hits >= 67
    assert rate(right["long requests"]).hits >= 18
