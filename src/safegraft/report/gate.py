"""A verdict that a pipeline can act on: the bounds of the measured rates against stated limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal
from xml.etree import ElementTree

from ..errors import ConfigError

Outcome = Literal["pass", "fail", "unsure"]
EXIT = {"pass": 0, "fail": 1, "unsure": 2}
"""Exit status; 3 is bad input."""
MOST = 10_000_000
"""Samples beyond which "how many more" is not worth saying."""


@dataclass(frozen=True)
class Limits:
    """At most these: shares in [0, 1]; None is not checked. ``confidence``: of the intervals whose bounds count."""

    unsafe: float | None = None
    overrefusal: float | None = None
    utility_drop: float | None = None
    confidence: float = 0.95


@dataclass(frozen=True)
class Check:
    """One limit against one measured value. ``more``: further samples needed to be sure, where that is what lacks."""

    name: str
    outcome: Outcome
    value: float
    bound: float
    limit: float
    n: int
    more: int | None = None

    @property
    def sentence(self) -> str:
        said = f"{self.name}: {self.value:.1%} (bound {self.bound:.1%}, n {self.n}) against at most {self.limit:.1%}"
        if self.outcome == "unsure":
            return said + (f"; about {self.more} more samples are needed" if self.more else "; more samples are needed")
        return said


def upper(hits: float, n: float, confidence: float) -> float:
    """Upper end of the two-sided Wilson interval of a proportion (E. B. Wilson 1927); ``hits`` may be fractional."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, shrink = hits / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    return min(1.0, centre + z / shrink * math.sqrt(max(0.0, p * (1 - p) / n + z * z / (4 * n * n))))


def check_rate(name: str, hits: int, n: int, limit: float, confidence: float) -> Check:
    """Pass where the interval's upper end keeps the limit, fail where the rate itself does not, else unsure."""
    value, bound = hits / n, upper(hits, n, confidence)
    if bound <= limit:
        return Check(name, "pass", value, bound, limit, n)
    if value >= limit:
        return Check(name, "fail", value, bound, limit, n)
    low, high = n, n
    while upper(value * high, high, confidence) > limit and high < MOST:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if upper(value * middle, middle, confidence) <= limit else (middle, high)
    return Check(name, "unsure", value, bound, limit, n, high - n if high < MOST else None)


def check_drop(name: str, before: Sequence[bool], after: Sequence[bool], limit: float, confidence: float) -> Check:
    """The paired drop of a rate of right answers, its upper bound by the normal approximation of the mean difference.

    Where no answer changed, one discordant pair is assumed, so that a handful of samples is never enough by itself.
    """
    gaps = [int(a) - int(b) for a, b in zip(before, after, strict=True)]
    n, value = len(gaps), sum(gaps) / len(gaps)
    spread = max(sum((g - value) ** 2 for g in gaps) / n, 1 / n)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    bound = value + z * math.sqrt(spread / n)
    if bound <= limit:
        return Check(name, "pass", value, bound, limit, n)
    if value >= limit:
        return Check(name, "fail", value, bound, limit, n)
    return Check(name, "unsure", value, bound, limit, n, max(1, math.ceil(spread * (z / (limit - value)) ** 2) - n))


def gate(
    run: Mapping[str, Any],
    limits: Limits,
    *,
    model: str,
    baseline: Mapping[str, bool] | None = None,
    right: Mapping[str, bool] | None = None,
) -> list[Check]:
    """All checks of one model of an evaluation.

    Args:
        run: its summary (see evaluate.summary.summarise). baseline, right: for the utility drop, whether each task case
            was answered rightly by the baseline and by the model, by a name both runs share.

    Raises:
        ConfigError: a limit is out of range, none was given, or what it needs was not measured.
    """
    asked = {"unsafe": limits.unsafe, "overrefusal": limits.overrefusal, "utility drop": limits.utility_drop}
    for name, limit in asked.items():
        if limit is not None and not 0 <= limit <= 1:
            raise ConfigError(f"the limit of {name}, {limit}, is not within 0 and 1")
    if not 0.5 <= limits.confidence < 1:
        raise ConfigError(f"confidence {limits.confidence} is not within 0.5 and 1")
    if all(limit is None for limit in asked.values()):
        raise ConfigError("no limit was given", "Give --max-unsafe, --max-overrefusal or --max-utility-drop.")
    if model not in run["models"]:
        raise ConfigError(f"the run has no model {model!r}", f"It has: {', '.join(run['models'])}.")
    checks = []
    for metric, limit in (("unsafe", limits.unsafe), ("overrefusal", limits.overrefusal)):
        if limit is None:
            continue
        rows = _cells(run, model, metric)
        if not rows:
            raise ConfigError(f"the run did not measure {metric} of {model}", "Evaluate a suite that does.")
        for row in rows:
            name = f"{metric} ({row['judge']}" + (f", attack {row['attack']})" if row["attack"] != "none" else ")")
            checks.append(check_rate(name, row["rate"]["hits"], row["rate"]["n"], limit, limits.confidence))
    if limits.utility_drop is not None:
        shared = [name for name in (baseline or {}) if name in (right or {})]
        if not baseline or not right or not shared:
            raise ConfigError(
                "the utility drop needs the same task cases in this run and in the baseline",
                "Evaluate both with --task FILE or --suite utility and name the baseline with --baseline RUN0.",
            )
        before, after = [baseline[n] for n in shared], [right[n] for n in shared]
        checks.append(check_drop("utility drop", before, after, limits.utility_drop, limits.confidence))
    return checks


def _cells(run: Mapping[str, Any], model: str, metric: str) -> list[dict[str, Any]]:
    """Over all benchmarks where there are several; the worst case over attacks where there were several."""
    rows = [c for c in run["cells"] if c["model"] == model and c["metric"] == metric]
    if any(c["benchmark"] == "all" for c in rows):
        rows = [c for c in rows if c["benchmark"] == "all"]
    if any(c["attack"] == "worst" for c in rows):
        rows = [c for c in rows if c["attack"] == "worst"]
    return rows


def overall(checks: Sequence[Check]) -> Outcome:
    """fail before unsure before pass."""
    found = {c.outcome for c in checks}
    return "fail" if "fail" in found else "unsure" if "unsure" in found else "pass"


def to_json(checks: Sequence[Check]) -> str:
    return json.dumps({"outcome": overall(checks), "checks": [asdict(c) for c in checks]}, indent=1) + "\n"


def to_markdown(checks: Sequence[Check], model: str) -> str:
    """For a comment of a CI system."""
    title = {"pass": "passes", "fail": "fails", "unsure": "needs more samples"}[overall(checks)]
    lines = [
        f"### Safety gate: {model} {title}",
        "",
        "| check | measured | bound | limit | n | |",
        "|---|---|---|---|---|---|",
    ]
    for c in checks:
        said = c.outcome + (f" ({c.more} more samples)" if c.more else "")
        lines.append(f"| {c.name} | {c.value:.1%} | {c.bound:.1%} | {c.limit:.1%} | {c.n} | {said} |")
    return "\n".join(lines) + "\n"


def to_junit(checks: Sequence[Check], model: str) -> str:
    """JUnit XML: a failed check is a failure, one without enough samples an error."""
    failed, unsure = (str(sum(c.outcome == x for c in checks)) for x in ("fail", "unsure"))
    suite = ElementTree.Element(
        "testsuite", name="safegraft gate", tests=str(len(checks)), failures=failed, errors=unsure
    )
    for c in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"safegraft.{model}", name=c.name)
        if c.outcome != "pass":
            ElementTree.SubElement(case, "failure" if c.outcome == "fail" else "error", message=c.sentence)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def write(path: Path | None, text: str) -> None:
    """Write one of the forms, where it was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
