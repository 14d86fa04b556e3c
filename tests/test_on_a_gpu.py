"""What puts models on a GPU where there is one, on an emulated one (gpus.py): no tensor is left on the processor."""

import json

import pytest
import torch

import chat_models
import gpus
import models
import traces
from safegraft import subtract
from safegraft.config import SafeKeyConfig, SomfConfig, load
from safegraft.errors import ConfigError
from safegraft.evaluate.models.hf import HfChatModel, load_chat
from safegraft.evaluate.records import Sampling, ask
from safegraft.masking.run import learn_mask
from safegraft.merging.live import graft
from safegraft.reasoning.annotate import annotate
from safegraft.reasoning.annotators import Rules
from safegraft.reasoning.train import train
from safegraft.train.calibrate import calibrate

SHORT = {"epochs": 1, "aux_epochs": 1, "batch": 4, "micro_batch": 2, "max_length": 400, "precision": "float32"}


@pytest.fixture
def gpu():
    return gpus.Gpus(1, 1 << 40, default=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``base``, a chat model, two fine-tunes ``task`` and ``other``, the vector ``v``, and rows of all kinds.

    Its head is not tied: on its way to an emulated GPU a tied one would become a weight of its own.
    """
    root = tmp_path_factory.mktemp("gpu")
    base = chat_models.build(root / "base", tied=False)
    models.finetuned(base, root / "task", scale=1e-2)
    models.finetuned(base, root / "other", seed=2, scale=1e-2)
    subtract(base, models.unaligned(base, root / "bad", scale=1e-2), root / "v")
    rows = [{"prompt": f"How {i}?", "chosen": f"No, sorry {i}.", "rejected": f"Sure: {i}!"} for i in range(10)]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    traces.build(root / "thinking")
    annotate(str(traces.write(root / "traces.jsonl", traces.rows(4))), root / "traces", Rules())
    return root


def test_answers(place, gpu):
    """Of different lengths, so that rows leave the batch and join it."""
    asked = [ask("How " * n) for n in (1, 5, 2, 9, 1, 3)]

    def answers():
        return HfChatModel(*load_chat(place / "base"), batch=2).replies(asked, Sampling(max_new_tokens=24))

    here = answers()
    with gpu:
        assert answers() == here
    assert {name for _, name, _ in gpu.log} & {"aten::bmm", "aten::scaled_dot_product_attention"}


@pytest.mark.parametrize("memory", [8.0, 1e-6])
def test_a_calibration(place, gpu, tmp_path, memory):
    for name, device in (("here", "cpu"), ("there", "cuda:0")):
        with gpu:
            calibrate(place / "base", tmp_path / name, prompts=place / "rows.jsonl", device=device, memory=memory)
    here, there = (models.weights(tmp_path / name) for name in ("here", "there"))
    assert all(torch.allclose(here[n], there[n], atol=1e-5) for n in here)
    assert gpu.log


def test_a_calibration_on_a_gpu_that_is_not_there(place, gpu, tmp_path):
    with gpu, pytest.raises(ConfigError, match=r"'cuda:1': torch sees 1 CUDA device"):
        calibrate(place / "base", tmp_path / "out", prompts=place / "rows.jsonl", device="cuda:1")


def test_strengths_tried_on_a_loaded_model(place, gpu):
    def weights():
        model, _ = load_chat(place / "task")
        with graft(model, place / "task", place / "base", place / "v") as live:
            found = []
            for method in ("interference", "dare", "enchtable"):
                live.apply(0.4, method=method)
                found.append([p.detach().cpu().clone() for p in model.parameters()])
        return [*found, [p.detach().cpu().clone() for p in model.parameters()]]

    here = weights()
    with gpu:
        there = weights()
    assert all(
        torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("changes", [{}, {"fusion": "dare", "scale": 0.5}, {"fusion": "ties"}])
def test_a_mask_learnt(place, gpu, tmp_path, changes):
    def learn(out):
        given = {
            "aligned": str(place / "base"), "model": [str(place / "task"), str(place / "other")], "out": str(out),
            "preferences": str(place / "rows.jsonl"), "steps": 2, "lr": 0.1, "batch": 4, "check_pairs": 2,
            "allow_fewer": True, "precision": "float32", "scope": "attention",
        }  # fmt: skip
        return learn_mask(load(SomfConfig, None, given | changes), say=lambda _: None).mask.manifest["check"]

    with gpu:
        there = learn(tmp_path / "there")
    here = learn(tmp_path / "here")
    for kind in ("aligned", "continuous"):
        assert there[kind]["margin"] == pytest.approx(here[kind]["margin"], abs=1e-3)
    assert gpu.log


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"packed": True}])
def test_safekey(place, gpu, tmp_path, changes):
    given = {"model": str(place / "thinking"), "data": [str(place / "traces")], "out": str(tmp_path / "out")}
    with gpu:
        found = train(load(SafeKeyConfig, None, SHORT | given | changes), given=[])
    assert found
    assert models.generates(tmp_path / "out")
    assert gpu.log
