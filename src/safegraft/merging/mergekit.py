"""mergekit's YAML read as settings of our merge, for the methods that compute the same.

Written against mergekit 0.1.5 (the parameter names and defaults of its task_arithmetic, ties, dare_linear and
breadcrumbs). What has no counterpart here is refused by name; nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError


@dataclass(frozen=True)
class _Kind:
    """How mergekit's method is called here, its default for ``normalize``, and its parameters under our names."""

    ours: str
    normalizes: bool
    params: Mapping[str, str]


KINDS = {
    "task_arithmetic": _Kind("task_arithmetic", False, {}),
    "ties": _Kind("ties", True, {"density": "density"}),
    "dare_linear": _Kind("dare", False, {"density": "drop"}),
    "breadcrumbs": _Kind("breadcrumbs", False, {"density": "density", "gamma": "outliers"}),
}
DEFAULTS = {"density": 1.0, "gamma": 0.01}
SHARED = ("normalize", "lambda", "int8_mask", "rescale")
DTYPES = ("float32", "float16", "bfloat16")
ABSENT = ("modules", "slices", "tokenizer_source", "tokenizer", "chat_template")


def from_mergekit(file: Path) -> dict[str, Any]:
    """The settings of MergeConfig (all but ``out``) that compute what mergekit computes from ``file``.

    Raises:
        ConfigError: the file is no mergekit configuration, or asks for what is not done here; all of it at once.
    """
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(read, dict) or "merge_method" not in read:
        raise ConfigError(f"{file} is no mergekit configuration: it has no merge_method")
    problems: list[str] = []
    settings = _converted(read, problems)
    if problems:
        raise ConfigError(
            f"{file} asks for what Safegraft does not do:\n" + "\n".join(f"- {p}" for p in problems),
            "Change these, or run it with mergekit.",
        )
    return settings


def _converted(read: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    name = read["merge_method"]
    kind = KINDS.get(name)
    if kind is None:
        problems.append(f"merge_method {name!r}; known: {', '.join(KINDS)}")
        return {}
    problems += [f"{key}: {read[key]!r}" for key in ABSENT if read.get(key) is not None]
    known = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", *ABSENT}
    problems += [f"{key}: there is no such key" for key in read if key not in known]
    base = read.get("base_model")
    if not isinstance(base, str):
        problems.append(f"base_model {base!r}: name one model")
    dtype = read.get("out_dtype") or read.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"dtype {dtype!r}; known: {', '.join(DTYPES)}")
    shared = read.get("parameters") or {}
    models = [m for m in read.get("models") or [] if not (m.get("model") == base and not m.get("parameters"))]
    rows = [_model(row, shared, kind, problems) for row in models]
    _check_names(shared, {*SHARED, "weight", *kind.params}, "parameters", problems)
    params = _params(rows, kind, problems)
    weights = [row["weight"] for row in rows]
    if not rows:
        problems.append("models: none but the base")
    if problems:
        return {}
    factor = float(shared.get("lambda", 1.0))
    normalizes = bool(shared.get("normalize", kind.normalizes))
    if kind.ours == "ties":
        params |= {"average": normalizes, "scale": factor}
    else:
        if normalizes:
            factor /= sum(weights)
        weights = [weight * factor for weight in weights]
    if len(rows) == 1 and weights == [1.0]:
        problems.append("models: one model at weight 1 with nothing to merge it with")
    return {
        "model": [row["model"] for row in rows], "weights": weights, "base": base, "method": kind.ours,
        "params": params, "dtype": dtype,
    }  # fmt: skip


def _model(row: dict[str, Any], shared: dict[str, Any], kind: _Kind, problems: list[str]) -> dict[str, Any]:
    """One entry of ``models`` with its parameters, the shared ones where it has none of its own."""
    name, own = row.get("model"), row.get("parameters") or {}
    if not isinstance(name, str) or "+" in name:
        problems.append(f"model {name!r}: name a folder or Hub id; of a LoRA adapter its own, without base and '+'")
    _check_names(own, {"weight", *kind.params}, f"parameters of {name}", problems)
    found: dict[str, Any] = {"model": name}
    for key in ("weight", *kind.params):
        value = own.get(key, shared.get(key, DEFAULTS.get(key)))
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"{key} of {name} is {value!r}; give one number for all tensors")
            value = 1.0
        found[key] = float(value)
    return found


def _check_names(given: dict[str, Any], known: set[str], where: str, problems: list[str]) -> None:
    problems += [f"{key} in {where}: there is no such parameter here" for key in given if key not in known]


def _params(rows: list[dict[str, Any]], kind: _Kind, problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for theirs, ours in kind.params.items():
        values = sorted({row[theirs] for row in rows})
        if len(values) > 1:
            problems.append(f"{theirs} differs between models ({', '.join(map(str, values))}); give one for all")
        elif values:
            found[ours] = 1 - values[0] if ours == "drop" else values[0]
    return found
