"""mergekit's YAML done here: the settings it becomes, what is refused, and agreement with mergekit's own output."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from models import finetuned, weights
from safegraft import merge
from safegraft.errors import ConfigError
from safegraft.merging.mergekit import from_mergekit


def config(tmp_path, text, **names):
    file = tmp_path / "config.yaml"
    file.write_text(textwrap.dedent(text).format(**names))
    return file


def test_weights_and_shared_parameters(tmp_path):
    file = config(tmp_path, """
        merge_method: task_arithmetic
        base_model: org/base
        models:
          - model: org/base
          - model: org/a
            parameters: {{weight: 0.5}}
          - model: org/b
        parameters: {{weight: 1.5, lambda: 2, int8_mask: true}}
        dtype: bfloat16
    """)  # fmt: skip
    assert from_mergekit(file) == {
        "model": ["org/a", "org/b"], "weights": [1.0, 3.0], "base": "org/base", "method": "task_arithmetic",
        "params": {}, "dtype": "bfloat16",
    }  # fmt: skip


def test_defaults_are_mergekits(tmp_path):
    text = "{{merge_method: {method}, base_model: b, models: [{{model: x, parameters: {{weight: 2}}}}, {{model: y, parameters: {{weight: 2}}}}]}}"  # noqa: E501
    expected = {
        "ties": ([2.0, 2.0], {"density": 1.0, "average": True, "scale": 1.0}),
        "breadcrumbs": ([2.0, 2.0], {"density": 1.0, "outliers": 0.01}),
        "dare_linear": ([2.0, 2.0], {"drop": 0.0}),
    }
    for method, (w, params) in expected.items():
        found = from_mergekit(config(tmp_path, text, method=method))
        assert (found["weights"], found["params"]) == (w, params)
    both = config(
        tmp_path, text.replace("base_model", "parameters: {{normalize: true}}, base_model"), method="dare_linear"
    )
    assert from_mergekit(both)["weights"] == [0.5, 0.5]


def test_everything_without_a_counterpart_is_named_at_once(tmp_path):
    file = config(tmp_path, """
        merge_method: ties
        base_model: b
        tokenizer_source: union
        slerp_all: true
        models:
          - model: x+lora
            parameters: {{weight: [0.1, 0.9], density: 0.5}}
          - model: y
            parameters: {{density: 0.7, epsilon: 0.1}}
        parameters: {{t: 1}}
        dtype: float64
    """)  # fmt: skip
    with pytest.raises(ConfigError) as told:
        from_mergekit(file)
    for part in ("tokenizer_source", "slerp_all", "'x+lora'", "weight of x+lora is [0.1, 0.9]", "weight of y is None",
                 "density differs", "epsilon in parameters of y", "t in parameters", "float64"):  # fmt: skip
        assert part in str(told.value), part
    with pytest.raises(ConfigError, match=r"merge_method 'passthrough'; known: task_arithmetic"):
        from_mergekit(config(tmp_path, "{{merge_method: passthrough}}"))
    with pytest.raises(ConfigError, match="no mergekit configuration"):
        from_mergekit(config(tmp_path, "[1, 2]"))


@pytest.fixture(scope="module")
def two(trio, tmp_path_factory):
    made = trio("llama-tied")
    made.second = finetuned(made.base, tmp_path_factory.mktemp("second") / "task2", scale=2e-3, seed=9)
    return made


PAIR = """
    merge_method: {method}
    base_model: {base}
    models:
      - model: {first}
        parameters: {{weight: 0.4{more}}}
      - model: {second}
        parameters: {{weight: 0.9{more}}}
    parameters: {{{shared}}}
    dtype: float32
"""


@pytest.mark.parametrize(
    ("method", "more", "shared"),
    [
        ("task_arithmetic", "", ""),
        ("task_arithmetic", "", "normalize: true, lambda: 0.7"),
        ("ties", ", density: 0.3", ""),
        ("ties", ", density: 0.8", "normalize: false, lambda: 0.5"),
        ("breadcrumbs", ", density: 0.6, gamma: 0.1", ""),
        ("dare_linear", "", ""),
    ],
)
def test_agrees_with_mergekit(two, tmp_path, method, more, shared):
    """float32 throughout; 2e-7 is a few roundings of weights near 1."""
    pytest.importorskip("mergekit")
    file = config(
        tmp_path, PAIR, method=method, base=two.base, first=two.task, second=two.second, more=more, shared=shared
    )
    program = Path(sys.executable).with_name("mergekit-yaml")
    done = subprocess.run(
        [program, str(file), str(tmp_path / "theirs"), "--no-copy-tokenizer"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    settings = from_mergekit(file)
    merge(settings.pop("model"), None, tmp_path / "ours", **settings)
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert set(theirs) <= set(ours)
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-7), name
        assert not torch.equal(ours[name], weights(two.base)[name]), name


def test_random_methods_agree_in_distribution(two, tmp_path):
    """Both keep a quarter of the base (neither model's entry drawn at density 0.5) and the expected change."""
    pytest.importorskip("mergekit")
    names = {"base": two.base, "first": two.task, "second": two.second}
    file = config(tmp_path, PAIR, method="dare_linear", more=", density: 0.5", shared="", **names)
    program = Path(sys.executable).with_name("mergekit-yaml")
    command = [program, str(file), str(tmp_path / "theirs"), "--no-copy-tokenizer", "--random-seed", "3"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    settings = from_mergekit(file)
    merge(settings.pop("model"), None, tmp_path / "ours", **settings)
    base, first, second = (weights(f) for f in (two.base, two.task, two.second))
    whole = torch.cat([(0.4 * (first[n] - base[n]) + 0.9 * (second[n] - base[n])).flatten() for n in base])
    for out in ("ours", "theirs"):
        found = weights(tmp_path / out)
        change = torch.cat([(found[n] - base[n]).flatten() for n in base])
        assert float((change == 0).float().mean()) == pytest.approx(0.25, abs=0.02), out
        assert float((change @ whole) / (whole @ whole)) == pytest.approx(1.0, abs=0.05), out
