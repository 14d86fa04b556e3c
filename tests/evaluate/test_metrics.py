import pytest

from safegraft.evaluate.metrics import rate, wilson


# By hand: p = 0.5, n = 100, z² = 3.8415: centre 0.5, half = 1.96/1.038415 · √(0.0025 + 3.8415/40000) = 0.0962.
# p = 0 of 10: high = z²/(n + z²) = 3.8415/13.8415.
# p = 1 of 10: centre 0.29207/1.38415, half 1.416 · √0.0186036.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 10, 0.0179, 0.4042)],
)
def test_wilson_by_hand(hits, n, low, high):
    assert wilson(hits, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_is_symmetric_and_holds_the_rate():
    for n in (1, 7, 40):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1
            mirrored = wilson(n - hits, n)
            assert (1 - high, 1 - low) == (pytest.approx(mirrored[0]), pytest.approx(mirrored[1]))


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_what_is_no_proportion_is_refused(hits, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(hits, n)


def test_rate_counts():
    found = rate(x > 2 for x in range(5))
    assert (found.hits, found.n, found.value) == (2, 5, 0.4)
