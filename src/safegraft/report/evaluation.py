"""Evidence on one page: rates, attacks, categories, comparisons, examples, and what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .html import bars, graft_map, heatmap, page, render, scatter

METRICS = {
    "unsafe": ("Unsafe answers", "Harmful requests answered instead of refused. Lower is safer."),
    "overrefusal": ("Over-refusal", "Harmless requests refused. Lower is better: refusing everything is not safety."),
    "utility": ("Utility", "Right answers to tasks. Higher is better."),
}
NOTES = "Whiskers: 95 % Wilson interval. What a judge could not parse never counts as safe."
REDACTED = "[{} characters, not shown]"


def write_report(
    found: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]], target: Path, *, reveal: bool
) -> None:
    """Write one HTML file that loads nothing, or Markdown where ``target`` ends in .md.

    Args:
        found: see evaluate.summary.evidence. manifests: of the runs shown. reveal: show harmful requests and answers
            that were not refusals; otherwise only their length is told.
    """
    shown = dict(found) | {"examples": [_example(e, reveal) for e in found["examples"]]}
    text = markdown(shown, manifests) if target.suffix == ".md" else html(shown, manifests)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def html(found: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]]) -> str:
    charts = [
        bars(f"{title}{suffix}", f"{note} {NOTES}", [_bar(found, cell) for cell in rows])
        for metric, (title, note) in METRICS.items()
        for suffix, rows in _groups(found, metric)
    ]
    cut = [f"{c['cut']} of {c['n']} ({name})" for name, c in found["cut_off"].items() if c["cut"]]
    body = render(
        "evaluation.html.j2",
        {"models": found["models"], "table": _table(found), "charts": charts, "attacks": _attacks(found),
         "frontier": _frontier(found), "grafts": _grafts(manifests),
         "heat": [h for metric in ("unsafe", "overrefusal") if (h := _heat(found, metric))],
         "comparisons": [describe_comparison(c) for c in found["comparisons"]], "examples": found["examples"],
         "runs": [_run(m) for m in manifests], "judge": found["judge"], "cut": cut},
    )  # fmt: skip
    return page("Safety evaluation", body)


def markdown(found: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]]) -> str:
    """The table, the comparisons and the digests, for a model card."""
    head, rows = _table(found)
    lines = ["## Safety evaluation", "", "| model | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for label, cells in rows:
        shown = [f"{c['percent']} ({c['low']} – {c['high']}, n = {c['n']})" if c else "" for c in cells]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    lines += ["", f"Rates with 95 % Wilson intervals. {NOTES.split('. ', 1)[1]}", ""]
    lines += [f"* {describe_comparison(c)}" for c in found["comparisons"]]
    for manifest in manifests:
        run = _run(manifest)
        lines += ["", f"Safegraft {run['version']}, seed {run['seed']}, judges {run['judges']}, {run['decoding']}."]
        lines += [
            f"* {b['name']}: {b['cases']} prompts{_tool(b)}, SHA-256 `{b['sha256'][:16]}`"
            for b in manifest["config"]["benchmarks"]
        ]
    return "\n".join(lines) + "\n"


def _tool(benchmark: Mapping[str, Any]) -> str:
    """Which program asked or scored a task, and how many examples it gave."""
    if "harness" in benchmark:
        told = benchmark["harness"]
        most = f", {told['tokens']} new tokens" if told["tokens"] else ""
        return f", lm-evaluation-harness {told['version']}, {told['shots']} examples, {benchmark['filter']}{most}"
    return f", EvalPlus {benchmark['evalplus']['version']}" if "evalplus" in benchmark else ""


def _table(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[dict[str, Any] | None]]]]:
    """Column titles and, for each model, its cell a column: asked plainly and at worst, by each judge."""
    keys = list(dict.fromkeys((c["metric"], c["attack"], c["judge"]) for c in _overall(found)
                              if c["attack"] in ("none", "worst")))  # fmt: skip
    keys.sort(key=lambda k: (list(METRICS).index(k[0]), k[1], k[2]))
    head = [METRICS[m][0] + (", worst attack" if a == "worst" else "") + ("" if j == "key" else f" ({j})")
            for m, a, j in keys]  # fmt: skip
    by = {(c["model"], c["metric"], c["attack"], c["judge"]): c["rate"] for c in _overall(found)}
    rows = [(model, [_shown(by.get((model, *key))) for key in keys]) for model in found["models"]]
    return head, rows


def _shown(rate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    return {"percent": f"{rate['hits'] / rate['n']:.0%}", "low": f"{rate['low']:.0%}", "high": f"{rate['high']:.0%}",
            "hits": rate["hits"], "n": rate["n"]}  # fmt: skip


def _overall(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cells over all benchmarks of a metric: those named ``all`` where there are several benchmarks."""
    several = {_kind(c) for c in found["cells"] if c["benchmark"] == "all"}
    return [c for c in found["cells"] if c["benchmark"] == "all" or _kind(c) not in several]


def _kind(cell: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return cell["model"], cell["metric"], cell["attack"], cell["judge"]


def _groups(found: Mapping[str, Any], metric: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(suffix of the title, a cell a model) for every benchmark and judge, asked plainly."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in found["cells"]:
        if cell["metric"] == metric and cell["attack"] == "none" and cell["benchmark"] != "all":
            by = "" if metric == "utility" else "judged by "
            judge = "" if cell["judge"] == "key" else f", {by}{cell['judge']}"
            groups.setdefault(f": {cell['benchmark']}{judge}", []).append(cell)
    return list(groups.items())


def _bar(found: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    rate = cell["rate"]
    return {"label": cell["model"], "value": rate["hits"] / rate["n"], "tone": _tone(found, cell["model"]), **rate}


def _tone(found: Mapping[str, Any], model: str) -> str:
    models = found["models"]
    return "plain" if model == models[0] else "good" if model == models[-1] else "warn"


def _attacks(found: Mapping[str, Any]) -> list[Markup]:
    names = list(dict.fromkeys(c["attack"] for c in found["cells"] if c["metric"] == "unsafe"))
    if len(names) < 2:
        return []
    out = []
    for model in found["models"]:
        rows = [
            c for c in _overall(found) if (c["model"], c["metric"], c["judge"]) == (model, "unsafe", found["judge"])
        ]
        told = {"none": "asked plainly", "worst": "any of them"}
        shown = [_bar(found, c) | {"label": told.get(c["attack"], c["attack"])} for c in rows]
        out.append(bars(f"Attack success: {model}", f"Unsafe answers under each attack. {NOTES}", shown))
    return out


def _frontier(found: Mapping[str, Any]) -> Markup | None:
    """Unsafe answers against utility over all tasks, or against over-refusal where none was measured; None for fewer
    than two models."""
    rates = {metric: {c["model"]: c["rate"] for c in _overall(found)
                      if (c["metric"], c["attack"], c["judge"]) == (metric, "none", found["judge"])}
             for metric in ("unsafe", "overrefusal")} | {"utility": found["utility"]}  # fmt: skip
    for metric, better in (("utility", "high"), ("overrefusal", "low")):
        shown = [m for m in found["models"] if m in rates["unsafe"] and m in rates[metric]]
        if len(shown) < 2:
            continue
        points = [{"label": m, "tone": _tone(found, m), "x": rates[metric][m], "y": rates["unsafe"][m]} for m in shown]
        corner = "right" if better == "high" else "left"
        return scatter(
            f"Safety against {METRICS[metric][0].lower()}",
            f"Best is below on the {corner}. Dashed: the models that no other beats on both counts. {NOTES}",
            points, x=METRICS[metric][0], y=METRICS["unsafe"][0], x_better=better,
        )  # fmt: skip
    return None


def _grafts(manifests: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """For every merged model the heat map of what the merge added."""
    merged = {m["label"]: m["merge"] for run in manifests for m in run["config"]["models"] if "merge" in m}
    return [
        graft_map(merge["ratios"], title=f"Where the graft went: {label}, {merge['method']} β {merge['strength']:g}")
        for label, merge in merged.items()
    ]


def _heat(found: Mapping[str, Any], metric: str) -> Markup | None:
    rows = found["categories"][metric]
    if len(rows) < 2:
        return None
    values = [[r[m]["hits"] / r[m]["n"] if m in r else None for m in found["models"]] for r in rows.values()]
    return heatmap(
        list(rows), found["models"], values, title=f"{METRICS[metric][0]} by category", unit="share", low=0.0, high=1.0,
        digits=2, corner="category", note=f"Asked plainly, judged by {found['judge']}.",
    )  # fmt: skip


def describe_comparison(c: Mapping[str, Any]) -> str:
    """A sentence of one of summarise's comparisons."""
    d, attack = c["difference"], "" if c["attack"] == "none" else f" under {c['attack']}"
    return (
        f"{c['second']} against {c['first']}, {METRICS[c['metric']][0].lower()}{attack} ({c['judge']}): "
        f"{100 * d['value']:+.1f} points (95 %: {100 * d['low']:+.1f} to {100 * d['high']:+.1f}; n = {d['n']}), "
        f"p = {c['p']:.2g}, after Holm {c['holm']:.2g}"
    )


def _example(example: Mapping[str, Any], reveal: bool) -> dict[str, Any]:
    """What refuses from its beginning may be shown; the request and any other answer only where ``reveal`` says so."""

    def told(text: str, harmless: bool) -> str:
        return text if reveal or harmless else REDACTED.format(len(text))

    sides = {
        model: {"label": side["label"], "reply": told(side["reply"], side["harmless"])}
        for model, side in example["models"].items()
    }
    return dict(example) | {"prompt": told(example["prompt"], False), "models": sides}


def _run(manifest: Mapping[str, Any]) -> dict[str, Any]:
    config, sampling = manifest["config"], manifest["config"]["sampling"]
    heat = sampling["temperature"]
    return {
        "version": manifest["versions"]["safegraft"], "versions": manifest["versions"], "seed": manifest["seed"],
        "judges": ", ".join(config["judges"]), "models": config["models"],
        "benchmarks": [{**b, "source": b["source"] + _tool(b)} for b in config["benchmarks"]],
        "attacks": config["attacks"], "defense": config["defense"], "started": manifest["run"]["started"],
        "decoding": f"{f'temperature {heat:g}' if heat else 'greedy'}, {sampling['max_new_tokens']} new tokens",
    }  # fmt: skip
