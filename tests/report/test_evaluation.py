"""The report of an evaluation: what it says, and what it keeps to itself."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from safegraft.evaluate.answers import Answer, key_of
from safegraft.evaluate.summary import evidence
from safegraft.report.evaluation import write_report

SECRET, REFUSAL = "the harmful reply", "I'm sorry, but I can't."


def answer(model, number, *, kind="harmful", attack="none", refused=False):
    benchmark = {"harmful": "bad", "harmless": "good", "task": "sums"}[kind]
    reply = REFUSAL if refused else SECRET
    return Answer(
        key_of(model, benchmark, str(number), attack), model, benchmark, str(number), kind, f"cat{number % 2}", attack,
        f"<b>request</b> {number}", "42", reply, reply, "", "none", True, 3,
    )  # fmt: skip


@pytest.fixture
def found():
    answers = [answer("tuned", i) for i in range(6)]
    answers += [answer("restored", i, refused=i > 0) for i in range(6)]
    answers += [answer("restored", i, attack="role-play", refused=i > 3) for i in range(6)]
    answers += [answer(m, i, kind="harmless", refused=i == 0) for m in ("tuned", "restored") for i in range(4)]
    answers += [answer(m, i, kind="task") for m in ("tuned", "restored") for i in range(5)]
    labels = {a.key: "refused" if a.reply == REFUSAL else "unsafe" for a in answers if a.kind != "task"}
    right = {a.key: "correct" for a in answers if a.kind == "task"}
    return evidence(answers, {"phrases": labels, "key": right}, examples=3)


MANIFEST = {
    "versions": {"safegraft": "1", "python": "3"}, "seed": 0, "run": {"started": "2026-01-01T00:00:00Z"},
    "config": {
        "models": [
            {"label": "tuned", "path": "a", "sha256": "f" * 64},
            {"label": "restored", "path": "b", "merge": {"method": "interference", "strength": 0.4, "ratios": {
                f"model.layers.{i}.self_attn.{p}_proj.weight": i / 2 for i in range(3) for p in "qkvo"}}},
        ],
        "benchmarks": [{"name": "bad", "source": "here", "sha256": "0" * 64, "cases": 6, "paper": "p", "licence": "l"}],
        "attacks": ["none", "role-play"], "defense": None, "judges": ["phrases"],
        "sampling": {"max_new_tokens": 16, "temperature": 0.0},
    },
}  # fmt: skip


def test_page(found, tmp_path):
    write_report(found, [MANIFEST], tmp_path / "report.html", reveal=False)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert not re.search(r"(src|href)=", text)
    assert SECRET not in text
    assert (
        "request"
        not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).split("Side by side")[1].split("What was run")[0]
    )
    assert "[17 characters, not shown]" in text
    assert "I&#39;m sorry" in text
    for said in ("100 % ", "17 %", "Attack success: restored", "by category", "role-play", "any of them", "after Holm",
                 "greedy, 16 new tokens", "ffffffffffffffff", "Safety against utility",
                 "Where the graft went: restored, interference β 0.4"):  # fmt: skip
        assert said in text, said
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_an_answer_that_refuses_afterwards_is_not_shown(tmp_path):
    late = replace(
        answer("m", 0), judged="First do this with that, and then do the other thing. I'm sorry, but I can't."
    )
    found = evidence([late], {"phrases": {late.key: "refused"}}, examples=1)
    write_report(found, [], tmp_path / "r.html", reveal=False)
    assert "First do this" not in (tmp_path / "r.html").read_text()


def test_texts_are_shown_only_when_asked_and_always_escaped(found, tmp_path):
    write_report(found, [MANIFEST], tmp_path / "report.html", reveal=True)
    text = (tmp_path / "report.html").read_text()
    assert SECRET in text
    assert "&lt;b&gt;request" in text
    assert "<b>request" not in text


def test_markdown(found, tmp_path):
    write_report(found, [MANIFEST], tmp_path / "card.md", reveal=False)
    text = (tmp_path / "card.md").read_text()
    assert "| restored | 17% (3% – 56%, n = 6) | 67% (30% – 90%, n = 6) |" in text
    assert "-83.3 points" in text
    assert SECRET not in text


def test_one_plain_run_has_no_attacks_and_no_comparisons(tmp_path):
    answers = [answer("m", i) for i in range(3)]
    found = evidence(answers, {"phrases": {a.key: "unsafe" for a in answers}})
    write_report(found, [], tmp_path / "r.html", reveal=False)
    text = (tmp_path / "r.html").read_text()
    assert "Attack success" not in text
    assert "Safety against" not in text
    assert "Where the graft went" not in text
    assert "Differences on" not in text
    assert "Side by side" not in text


def test_the_frontier_takes_tasks_scored_by_any_judge(tmp_path):
    """Half by the key, half by a harness; and by a harness alone."""
    answers = [answer(m, i, kind=k) for m in ("a", "b") for k in ("harmful", "task") for i in range(4)]
    tasks = [a for a in answers if a.kind == "task"]
    safety = {a.key: "unsafe" for a in answers if a.kind == "harmful"}
    right = {a.key: "correct" if a.model == "b" or a.id == "3" else "wrong" for a in tasks}
    for by_key in ("01", ""):
        verdicts = {"phrases": safety} | {
            judge: kept for judge, part in (("key", True), ("exact_match", False))
            if (kept := {a.key: right[a.key] for a in tasks if (a.id in list(by_key)) == part})
        }  # fmt: skip
        made = evidence(answers, verdicts)
        assert {m: (r["hits"], r["n"]) for m, r in made["utility"].items()} == {"a": (1, 4), "b": (4, 4)}
        write_report(made, [], tmp_path / "r.html", reveal=False)
        text = (tmp_path / "r.html").read_text()
        assert "Safety against utility" in text
        assert "Safety against over-refusal" not in text


def test_without_a_task_the_frontier_is_over_refusal(tmp_path):
    answers = [answer(m, i, kind=k) for m in ("a", "b") for k in ("harmful", "harmless") for i in range(3)]
    found = evidence(answers, {"phrases": {a.key: "unsafe" for a in answers}})
    write_report(found, [], tmp_path / "r.html", reveal=False)
    assert "Safety against over-refusal" in (tmp_path / "r.html").read_text()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRAME = """<!doctype html><body>
<iframe id="f" style="width:{width}px;height:3000px;border:0"></iframe><pre id="told"></pre>
<script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, wide = page.documentElement;
  const box = e => {{ const b = e.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]; }};
  const all = (selector, f) => [...page.querySelectorAll(selector)].map(f);
  document.getElementById("told").textContent = JSON.stringify({{
    scroll: wide.scrollWidth, width: frame.clientWidth,
    bars: all(".bar", e => ({{label: box(e.querySelector(".label")), number: box(e.querySelector(".number")),
      track: box(e.querySelector(".track")), fill: box(e.querySelector(".fill")),
      whisker: box(e.querySelector(".whisker")), text: e.querySelector(".number").textContent}})),
    svg: all("svg.scatter", box), points: all("svg.scatter circle", box), labels: all("svg.scatter .point text", box),
    titles: all("h2", e => e.textContent), scripts: all("script", e => 1).length,
    loaded: frame.contentWindow.performance.getEntriesByType("resource").length}});
}};
frame.srcdoc = {page};
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1100])
def test_in_a_browser(found, tmp_path, width):
    write_report(found, [MANIFEST], tmp_path / "report.html", reveal=False)
    text = (tmp_path / "report.html").read_text().replace("</", "<\\/")
    quoted = json.dumps(text).replace("<\\\\/", "<\\/")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=quoted))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1200,3000", "--dump-dom"]  # fmt: skip
    url = (tmp_path / "frame.html").as_uri()
    done = subprocess.run([CHROMIUM, *options, url], capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1]))
    assert told["scroll"] <= told["width"] == width, "the page scrolls sideways"
    assert told["loaded"] == told["scripts"] == 0
    assert {"Safety against utility", "Side by side", "What was run"} <= set(told["titles"])
    assert len(told["bars"]) > 6
    for bar in told["bars"]:
        share = int(re.match(r"\s*(\d+) %", bar["text"])[1]) / 100
        track = bar["track"][1] - bar["track"][0]
        assert (bar["fill"][1] - bar["fill"][0]) / track == pytest.approx(share, abs=0.02)
        low, high = (int(n) / 100 for n in re.search(r"\((\d+)–(\d+),", bar["text"]).groups())
        assert (bar["whisker"][0] - bar["track"][0]) / track == pytest.approx(low, abs=0.02)
        assert (bar["whisker"][1] - bar["track"][0]) / track == pytest.approx(high, abs=0.02)
        assert bar["label"][1] <= bar["number"][0] or bar["label"][3] <= bar["number"][2], "label and number overlap"
        assert bar["number"][1] <= width
    (frame,) = told["svg"]
    assert len(told["points"]) == len(told["labels"]) == 2
    for left, right, top, bottom in [*told["points"], *told["labels"]]:
        assert frame[0] <= left < right <= frame[1]
        assert frame[2] <= top < bottom <= frame[3]
    one, other = told["labels"]
    assert one[3] <= other[2] or other[3] <= one[2], "the labels overlap"
