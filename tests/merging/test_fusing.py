"""Several fine-tunes of one base, fused with and without a vector, through the real pipeline."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from models import build, files_of, finetuned, generates, noise, weights
from safegraft import merge, verify
from safegraft.errors import ConfigError, MismatchError

FAMILY = "llama-tied"


@pytest.fixture(scope="module")
def several(trio, tmp_path_factory):
    made = trio(FAMILY)
    made.second = finetuned(made.base, tmp_path_factory.mktemp("second") / "task2", scale=2e-3, seed=9)
    return made


def deltas(made):
    base = weights(made.base)
    return base, *({n: t - base[n] for n, t in weights(m).items()} for m in (made.task, made.second))


def test_task_arithmetic_of_two_with_weights_and_a_vector(several, tmp_path):
    out = tmp_path / "out"
    done = merge([several.task, several.second], several.vector, out, base=several.base,
                 method="task_arithmetic", weights=[0.5, 2.0], strength=0.7)  # fmt: skip
    base, first, second = deltas(several)
    away = weights(several.unaligned)
    for name, tensor in weights(out).items():
        safety = 0.7 * (base[name] - away[name])
        expected = base[name] + 0.5 * first[name] + 2.0 * second[name] + safety
        assert torch.allclose(tensor, expected, atol=2e-7), name
    assert (done.alpha, done.match_norm) == (0.7, False)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"model", "model 2", "base", "vector"}
    assert manifest["inputs"]["model"]["sha256"] != manifest["inputs"]["model 2"]["sha256"]
    verify(out)
    generates(out)


def test_a_matched_strength_is_measured_against_the_fused_delta(several, tmp_path):
    done = merge([several.task, several.second], several.vector, tmp_path / "out", base=several.base,
                 method="task_arithmetic", weights=[1.0, 3.0], strength=0.2, match_norm=True)  # fmt: skip
    _, first, second = deltas(several)
    fused = sum(float((first[n] + 3 * second[n]).double().square().sum()) for n in first) ** 0.5
    assert done.task_norm == pytest.approx(fused, rel=1e-5)
    assert done.alpha == pytest.approx(0.2 * fused / done.safety_norm, rel=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "breadcrumbs", "della", "model_stock", "tsv_merge"])
def test_fusing_without_a_vector_does_not_depend_on_workers(several, tmp_path, method):
    outs = []
    for workers in (1, 3):
        outs.append(tmp_path / f"{workers}")
        merge([several.task, several.second], None, outs[-1], base=several.base, method=method, workers=workers)
    first, second = (files_of(out) for out in outs)
    assert first["model.safetensors"] == second["model.safetensors"]
    generates(outs[0])
    assert "without a safety vector" in (outs[0] / "README.md").read_text()


def test_a_checkpoint_and_an_adapter_can_be_fused(several, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(several.base)
        tuned = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.copy_(noise(name, parameter.shape, 0) * 0.1)
        tuned.save_pretrained(tmp_path / "adapter")
        expected_of = tuned.merge_and_unload().state_dict()
    merge([several.task, tmp_path / "adapter"], None, tmp_path / "out", base=several.base, method="task_arithmetic")
    _, first, _ = deltas(several)
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.allclose(tensor, expected_of[name] + first[name], atol=1e-6), name


def test_what_cannot_be_fused_is_refused(several, tmp_path):
    two = [several.task, several.second]
    with pytest.raises(ConfigError, match="interference takes one fine-tune"):
        merge(two, several.vector, tmp_path / "out", base=several.base)
    with pytest.raises(ConfigError, match="the vector is missing"):
        merge(several.task, None, tmp_path / "out", base=several.base, method="ties")
    with pytest.raises(ConfigError, match="1 given for 2 fine-tune"):
        merge(two, None, tmp_path / "out", base=several.base, method="ties", weights=[1.0])
    with pytest.raises(ConfigError, match=r"weights\.1"):
        merge(two, None, tmp_path / "out", base=several.base, method="ties", weights=[1.0, -1.0])
    other = build(FAMILY, tmp_path / "other", hidden_size=8, head_dim=2)
    with pytest.raises(MismatchError, match="hidden_size"):
        merge([several.task, other], None, tmp_path / "out", base=several.base, method="ties")
    assert not list(tmp_path.glob("out*"))


PLUGIN = '''
"""A toy package that adds a method."""
from pydantic import Field
from safegraft.config import Settings
from safegraft.merging.method import Merged, merge_method

class Half(Settings):
    share: float = Field(0.5, ge=0, description="of the vector")

@merge_method("half", params=Half, paper="none", strength=1.0, match_norm=False)
def half(t, p, stats):
    """Add a share of the vector."""
    return Merged(t.task.dense() + p.share * t.safety.dense(), {})
'''


def test_another_package_adds_a_method_by_an_entry_point(several, tmp_path):
    site = tmp_path / "site"
    info = site / "toy_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "toy_methods.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[safegraft.methods]\nhalf = toy_methods\n")
    command = [sys.executable, "-m", "safegraft", "merge", "--model", str(several.task), "--base", str(several.base),
               "--vector", str(several.vector), "--out", str(tmp_path / "out"), "--method", "half",
               "--param", "share=0.25"]  # fmt: skip
    path = filter(None, [os.environ.get("PYTHONPATH")])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base, first, _ = deltas(several)
    away = weights(several.unaligned)
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.allclose(tensor, base[name] + first[name] + 0.25 * (base[name] - away[name]), atol=1e-7)
