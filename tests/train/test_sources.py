"""Training rows from everywhere: shapes, files, the Hub, and what is said of rows that cannot be used."""

import json
import sys
from types import SimpleNamespace

import pytest

import chat_models
from safegraft.data import harmful, instructions, lookalikes
from safegraft.errors import ConfigError
from safegraft.train.data import Pair
from safegraft.train.sources import OPENINGS, Source, choose, describe_bad, pair_of, read_source

MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
GOOD = [
    MESSAGES,
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "answer": "a"},
    {"instruction": "q", "output": "a"},
    {"instruction": "q", "input": "", "output": "a"},
]


@pytest.mark.parametrize("row", GOOD)
def test_every_shape_gives_the_same_pair(row):
    assert pair_of(row) == (Pair("q", "a"), False)


def test_alpacas_input_follows_its_instruction_and_further_turns_are_left_out():
    assert pair_of({"instruction": "q", "input": "x", "output": "a"})[0] == Pair("q\n\nx", "a")
    turns = [{"role": "system", "content": "s"}, *MESSAGES["messages"], {"role": "user", "content": "more"}]
    assert pair_of({"messages": turns}) == (Pair("q", "a"), True)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([1], "not an object"),
        ({"text": "secret"}, "none of the known shapes; its fields: text"),
        ({"prompt": "secret"}, "neither response nor answer"),
        ({"prompt": "secret", "response": 3}, "response is no text"),
        ({"prompt": "  ", "response": "secret"}, "prompt is empty"),
        ({"instruction": "secret", "input": 3, "output": "secret"}, "input is no text"),
        ({"messages": "secret"}, "no list of turns"),
        ({"messages": [{"role": "user", "content": "secret"}]}, "followed by an assistant"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "secret"}]}, "no content"),
    ],
)
def test_bad_rows_are_named_without_their_text(row, why):
    with pytest.raises(ValueError, match=why) as told:
        pair_of(row)
    assert "secret" not in str(told.value)


def write(folder, kind):
    file = folder / f"rows.{kind}"
    rows = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(3)]
    if kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "jsonl":
        file.write_text("\n\n".join(json.dumps(r) for r in rows))
    elif kind == "csv":
        file.write_text("prompt,response\n" + "".join(f'"{r["prompt"]}",{r["response"]}\n' for r in rows))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


LINES = {"json": [1, 2, 3], "jsonl": [1, 3, 5], "csv": [2, 3, 4], "parquet": [1, 2, 3]}


@pytest.mark.parametrize(("kind", "lines"), LINES.items())
def test_files_of_every_kind(tmp_path, kind, lines):
    found = read_source(str(write(tmp_path, kind)))
    assert found.rows == [(line, Pair(f"q{i}", f"a{i}")) for i, line in enumerate(lines)]
    assert not found.bad


def test_bad_lines_are_collected(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "response": "a"}\n{oops\n{"prompt": "q"}\n')
    found = read_source(str(file))
    assert [line for line, _ in found.rows] == [1]
    assert [line for line, _ in found.bad] == [2, 3]
    short = tmp_path / "rows.csv"
    short.write_text("prompt,response\nq\nq,a,b\nq,a\n")
    found = read_source(str(short))
    assert [line for line, _ in found.bad] == [2, 3]
    assert describe_bad([(i, "x") for i in range(30)]).endswith("- and 10 more")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("rows.json", "{", "is no JSON"),
        ("rows.json", '{"a": 1}', "does not hold a list"),
        ("rows.txt", "x", "of no kind that can be read"),
        ("gone.jsonl", None, "cannot read"),
        ("rows.parquet", "x", "no Parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, why):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_source(str(tmp_path / name))


def test_a_missing_library_is_said(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "rows.parquet").write_text("x")
    with pytest.raises(ConfigError, match="needs pyarrow"):
        read_source(str(tmp_path / "rows.parquet"))
    with pytest.raises(ConfigError, match="needs the package datasets"):
        read_source("owner/name")
    with pytest.raises(ConfigError, match="neither 'starter', nor a file"):
        read_source("no such thing")


def test_the_hub_and_its_adapter(monkeypatch):
    asked = []
    rows = [{"prompt": f"q{i}", "response": "a", "is_safe": i % 2 == 0, "category": {}} for i in range(4)]

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if "gone" in args[0]:
            raise FileNotFoundError("not there\nmore")
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    found = read_source("PKU-Alignment/BeaverTails")
    assert [pair.prompt for _, pair in found.rows] == ["q1", "q3"]
    assert "unsafe" in found.notes[0]
    assert len(read_source("someone/rows:part@test").rows) == 4
    assert asked == [
        (("PKU-Alignment/BeaverTails", None), {"split": "30k_train"}),
        (("someone/rows", "part"), {"split": "test"}),
    ]
    with pytest.raises(ConfigError, match="cannot be fetched from the Hub: not there"):
        read_source("someone/gone")


def test_the_starter_has_requests_with_openings_and_harmless_anchors():
    found = read_source("starter", seed=1)
    pairs = [pair for _, pair in found.rows]
    opened = [p for p in pairs if p.answer in OPENINGS]
    assert {p.prompt for p in opened} == {r.prompt for r in harmful("align", "distil")}
    assert not {r.prompt for r in harmful("select", "report")} & {p.prompt for p in pairs}
    single = {r.prompt: r.answer for r in [*lookalikes("align"), *instructions()]}
    anchors = [p for p in pairs if p.answer not in OPENINGS]
    assert len(anchors) > 200
    joined = [p for p in anchors if p.prompt not in single]
    assert len(joined) == 60
    for pair in joined:
        first, second = pair.answer.split("\n")
        assert pair.prompt in {f"{a} {b}" for a in single for b in single if (single[a], single[b]) == (first, second)}
    assert pairs == [pair for _, pair in read_source("starter", seed=1).rows]


def test_rows_are_drawn_by_seed_and_too_few_are_refused():
    tokenizer = chat_models.tokenizer()
    source = Source("rows", [(i, Pair(f"question {i}", "answer")) for i in range(1, 9)], [(9, "it is odd")])
    settings = {"samples": 4, "allow_fewer": False, "max_length": 64, "seed": 0}
    first = choose(source, tokenizer, **settings)
    assert len(first.pairs) == len(first.items) == 4
    assert first == choose(source, tokenizer, **settings)
    assert first.pairs != choose(source, tokenizer, **settings | {"seed": 1}).pairs
    assert len(choose(source, tokenizer, **settings | {"samples": None}).pairs) == 8
    with pytest.raises(ConfigError, match=r"rows has 8 usable row\(s\) of 20 asked for:\n- line 9: it is odd"):
        choose(source, tokenizer, **settings | {"samples": 20})
    assert len(choose(source, tokenizer, **settings | {"samples": 20, "allow_fewer": True}).pairs) == 8


def test_answers_that_are_cut_away_count_as_bad():
    tokenizer = chat_models.tokenizer()
    source = Source("rows", [(1, Pair("question", "answer")), (2, Pair("long " * 200, "answer"))])
    made = choose(source, tokenizer, samples=None, allow_fewer=False, max_length=128, seed=0)
    assert [p.prompt for p in made.pairs] == ["question"]
    assert made.bad == [(2, "nothing of the answer is left within 128 tokens")]
    with pytest.raises(ConfigError, match=r"rows has 0 usable row\(s\)"):
        choose(source, tokenizer, samples=None, allow_fewer=True, max_length=3, seed=0)
