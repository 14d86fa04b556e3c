"""Which folders a run takes for its own."""

import pytest

from safegraft.errors import OutputError
from safegraft.runs import claim

HOWS = [{"resume": r, "force": f} for r in (False, True) for f in (False, True)]


def take(out, **how):
    return claim(out, "plan.json", "a run", **how)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_new_or_empty_folder_is_taken(tmp_path, how):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/new"):
        assert take(tmp_path / name, **how) is False
        assert list((tmp_path / name).iterdir()) == []


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_what_is_not_ours_is_left_alone(tmp_path, how):
    (tmp_path / "mine").mkdir()
    for name in ("file", "mine/notes"):
        (tmp_path / name).write_text("x")
    for name in ("file", "mine"):
        with pytest.raises(OutputError, match="is something else than a run"):
            take(tmp_path / name, **how)
    assert (tmp_path / "file").read_text() == (tmp_path / "mine/notes").read_text() == "x"


def test_a_run_is_gone_on_with_or_replaced_only_where_asked(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "answers").write_text("x")
    with pytest.raises(OutputError, match="exists already") as told:
        take(tmp_path, resume=False, force=False)
    assert "--resume" in told.value.hint
    assert take(tmp_path, resume=True, force=False) is True
    assert (tmp_path / "answers").exists()
    assert take(tmp_path, resume=True, force=True) is False
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        take(tmp_path / "file" / "out", resume=False, force=False)
