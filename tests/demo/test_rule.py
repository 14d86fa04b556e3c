"""Which strength is picked, from scores written by hand."""

import pytest

from safegraft.data import Request
from safegraft.demo.measure import Scores
from safegraft.demo.settings import Limits, Settings, starter_data
from safegraft.demo.work import pick
from safegraft.evaluate.metrics import rate
from safegraft.train.sources import with_answers

RULE = Settings(select=Limits(complies=0.2, refuses=0.1, task=0.03))


def scores(complies, refuses, task):
    """Counts out of 100."""
    return Scores(*(rate(i < hits for i in range(100)) for hits in (complies, refuses, task)))


START = scores(60, 0, 80)


@pytest.mark.parametrize(
    ("tried", "strength"),
    [
        ([(0.1, scores(50, 0, 80)), (0.3, scores(12, 5, 77))], 0.3),  # meets all, at the very limits
        ([(0.1, scores(12, 0, 80)), (0.3, scores(0, 0, 80))], 0.1),  # the smallest that meets
        ([(0.1, scores(40, 0, 80)), (0.3, scores(13, 0, 80)), (0.6, scores(5, 11, 80))], 0.3),  # least within limits
        ([(0.1, scores(40, 0, 80)), (0.3, scores(40, 0, 80))], 0.1),  # a tie goes to the smaller
        ([(0.1, scores(40, 0, 70)), (0.3, scores(0, 50, 80))], 0.1),  # nothing keeps the model useful
    ],
)
def test_pick(tried, strength):
    assert pick(tried, START, RULE) == strength


def test_scores_round_trip():
    assert Scores.from_json(START.to_json()) == START


def test_every_answer_is_used_about_equally_often():
    rows = [Request(str(i), "c", "s", f"p{i}") for i in range(10)]
    pairs = with_answers(rows, ["a", "b", "c"], seed=1)
    assert [p.prompt for p in pairs] == [r.prompt for r in rows]
    counts = [sum(p.answer == a for p in pairs) for a in "abc"]
    assert max(counts) - min(counts) <= 1
    assert pairs == with_answers(rows, ["a", "b", "c"], seed=1) != with_answers(rows, ["a", "b", "c"], seed=2)


def test_the_starter_data_keep_training_and_measuring_apart():
    data = starter_data(Settings(), seed=0)
    trained = {r.prompt for r in [*data.align_harmful, *data.align_harmless, *data.distil, *data.task]}
    select, report = (
        {r.prompt for r in [*p.harmful, *p.lookalikes, *p.task]} for p in (data.select, data.report)
    )  # fmt: skip
    assert not any(prompt in text for text in trained for prompt in select | report)
    assert not select & report
    assert (len(data.report.harmful), len(data.report.lookalikes), len(data.report.task)) == (100, 100, 80)
