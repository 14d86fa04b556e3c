import pytest

from safegraft.evaluate.tasks import holds


@pytest.mark.parametrize(
    ("reply", "key", "held"),
    [
        ("That makes 3 x 6 = 18 euros in all.", "18 euros", True),
        ("That makes 118 euros.", "18 euros", False),
        ("It is 18 eurosongs.", "18 euros", False),
        ("18  EUROS", "18 euros", True),
        ("Leave at 18:40.", "8:40", False),
        ("fig, kiwi, pear.", "fig, kiwi, pear", True),
        ("A+B?", "A+B?", True),
        ("", "x", False),
    ],
)
def test_holds(reply, key, held):
    assert holds(reply, key) is held
