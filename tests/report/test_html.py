import math
import re
from itertools import pairwise

import pytest

from safegraft.report.html import bars, graft_map, heatmap, page, scatter


def test_heatmap_tints_from_lowest_to_highest():
    html = heatmap(["0", "1"], ["q", "k"], [[1.0, 2.0], [3.0, None]], title="T", unit="x")
    assert [html.count(f"--tint:{t}") for t in ("0.0", "0.5", "1.0")] == [1, 1, 1]
    assert html.count('class="none"') == 1
    assert ">3</td>" in html


def test_heatmap_with_infinity_equal_values_and_fixed_ends():
    assert "∞" in heatmap(["0"], ["q", "k"], [[math.inf, 1.0]], title="T")
    assert "--tint:0.0" in heatmap(["0"], ["q"], [[5.0]], title="T")
    assert "--tint:0.25" in heatmap(["0"], ["q"], [[1.0]], title="T", low=0, high=4)
    assert "−2" in heatmap(["0"], ["q"], [[-2.0]], title="T")


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, math.nan]]])
def test_heatmap_refuses_other_shapes_and_nan(values):
    with pytest.raises(ValueError, match=r"values|NaN"):
        heatmap(["0"], ["q", "k"], values, title="T")


def test_text_is_escaped():
    html = page("<b>", heatmap(["<i>"], ["&"], [[1.0]], title="<script>"))
    assert "<script>" not in html
    assert "&lt;i&gt;" in html
    row = {"label": "<x>", "value": 0.5, "low": 0.25, "high": 0.75, "hits": 1, "n": 2, "tone": "good"}
    assert "&lt;x&gt;" in bars("t", "n", [row])
    assert "left:25.0%;width:50.0%" in bars("t", "n", [row])


def test_graft_map_orders_layers_by_number():
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (10, 2) for p in "qk"]
    html = graft_map({n: None if "10" in n else 0.5 for n in names} | {"lm_head.weight": 0.1})
    assert html.index('scope="row">2') < html.index('scope="row">10') < html.index('scope="row">other')
    assert html.count("∞") == 2


def point(label, x, y):
    return {"label": label, "tone": "good", "x": around(x), "y": around(y)}


def around(hits):
    return {"hits": hits, "n": 100, "low": max(0, hits - 10) / 100, "high": min(100, hits + 10) / 100}


def circles(html):
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', html)]


def frontier(html):
    found = re.search(r'<polyline class="frontier" points="([^"]*)"', html)
    return [tuple(map(float, p.split(","))) for p in found[1].split()] if found else []


def test_scatter_places_points_and_draws_the_frontier():
    # c is beaten by b on both counts where much of x is good; where little is, by a
    points = [point("a", 10, 0), point("b", 80, 20), point("c", 60, 50)]
    html = scatter("T", "n", points, x="useful", y="unsafe", x_better="high")
    a, b, c = circles(html)
    assert a[0] < c[0] < b[0]
    assert a[1] > b[1] > c[1]
    assert frontier(html) == [a, b]
    assert "b: useful 80% (70% – 90%), unsafe 20% (10% – 30%)" in html
    assert frontier(scatter("T", "n", points, x="refusing", y="unsafe", x_better="low")) == []


def test_labels_of_a_scatter_do_not_lie_on_each_other():
    html = scatter("T", "n", [point(str(i), 50, 50) for i in range(5)], x="x", y="y", x_better="high")
    heights = sorted(
        float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="(?:start|end)">\d<', html)
    )
    assert len(heights) == 5
    assert all(b - a >= 18 for a, b in pairwise(heights))
