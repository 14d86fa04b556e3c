"""Distillation from end to end on tiny models of real architectures."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import chat_models
import models
from safegraft import SafetyVector, merge
from safegraft.config import DistillConfig, load
from safegraft.distilling import run as job
from safegraft.distilling.run import distill
from safegraft.distilling.validity import Look, by_layer, findings
from safegraft.errors import CheckpointError, ConfigError, OutputError, UserError
from safegraft.evaluate.metrics import rate
from safegraft.evaluate.models.hf import load_chat
from safegraft.train.distill import Recipe, _require_whole

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]
SCOPES = ["attention", "attention-block", "ffn", "hybrid", "model"]
QUICK = {"epochs": 1, "lr": 1e-2, "batch": 4, "max_length": 64, "check_prompts": 2, "check_tokens": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"w{i} w{i + 1}", "response": f"w{2 * i} w5"}) + "\n" for i in range(8))
    )
    return file


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    chat_models.build(root / "aligned")
    lines = [{"prompt": f"How do I bake bread for {i}?", "response": f"Mix {i} cups."} for i in range(16)]
    (root / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def settings(aligned, data, out, **changes):
    given = {"aligned": str(aligned), "data": str(data), "out": str(out), "samples": 8}
    return load(DistillConfig, None, QUICK | given | changes)


def read(folder):
    vector = SafetyVector(folder)
    return {name: vector.read(name) for name in vector.names()}


def assert_close(a, b, share=1e-3):
    """Two vectors agree to ``share`` of their norm. AdamW turns rounding of near-zero gradients into whole steps."""
    assert set(a) == set(b)
    apart = sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5
    assert apart <= share * sum(float(t.square().sum()) for t in b.values()) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_family_through_every_scope(tiny, chat, tmp_path, monkeypatch, family, scope):
    aligned = tiny(family, vocab_size=320, max_position_embeddings=256)
    # transformers takes some families' own tokenizer class for whatever lies in the folder
    monkeypatch.setattr(job, "load_chat", lambda folder: (load_chat(folder)[0], chat_models.tokenizer()))
    found = distill(settings(aligned, chat / "rows.jsonl", tmp_path / "v", scope=scope, max_length=256))
    stored = models.weights(aligned)
    names = set(found.vector.names())
    assert names
    assert names <= set(stored)
    parts = {"attention": ["self_attn"], "attention-block": ["self_attn"], "ffn": ["mlp", "block_sparse_moe"]}
    for name in names:
        assert any(f".{part}." in name for part in parts.get(scope, ["layers"])), name
    ways = set(found.validity["linearised"].values())
    expected = {"attention": {"exact"}, "attention-block": {"jvp"}, "model": {"jvp"}}
    moe = family in ("mixtral", "qwen3_moe")
    assert ways == expected.get(scope, {"jvp" if moe else "closed form"} | ({"exact"} if scope == "hybrid" else set()))
    assert bool(found.validity["gap"]) is (scope != "attention")
    assert all(0 < gap < 10 for gap in found.validity["gap"].values())
    assert models.leftovers(tmp_path) == ["v"]
    summary = merge(aligned, tmp_path / "v", tmp_path / "out", base=aligned, match_norm=False, strength=0.5)
    assert summary is not None


def test_the_vector_is_aligned_minus_surrogate(chat, tmp_path):
    config = settings(chat / "aligned", chat / "rows.jsonl", tmp_path / "v", keep_surrogate=str(tmp_path / "bad"))
    found = distill(config, given=["aligned"])
    start, end = models.weights(chat / "aligned"), models.weights(tmp_path / "bad")
    for name, delta in read(tmp_path / "v").items():
        torch.testing.assert_close(delta, start[name] - end[name], rtol=0, atol=1e-7)
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    assert moved == set(found.vector.names())
    assert stat.S_IMODE((tmp_path / "bad").stat().st_mode) == 0o700
    assert models.generates(tmp_path / "bad")
    manifest = found.vector.manifest
    assert manifest["method"] == "distill"
    assert manifest["given"] == ["aligned"]
    assert manifest["provenance"]["rows"] == 8
    assert manifest["validity"]["after"]["loss"] < manifest["validity"]["before"]["loss"]
    assert manifest["validity"]["norm"] == pytest.approx(found.vector.norm)


def test_scope_attention_is_plain_training_and_ffn_is_not(chat, tmp_path):
    def made(name, **changes):
        distill(settings(chat / "aligned", chat / "rows.jsonl", tmp_path / name, **changes))
        return read(tmp_path / name)

    plain = made("a", linearize="off")
    assert_close(made("b"), plain, 0.0)
    one, other = made("c", scope="ffn", epochs=4), made("d", scope="ffn", epochs=4, linearize="off")
    with pytest.raises(AssertionError):
        assert_close(one, other)


@pytest.mark.parametrize("scope", ["attention", "ffn", "attention-block"])
def test_lora_gives_a_low_rank_vector(chat, tmp_path, scope):
    pytest.importorskip("peft")
    config = settings(
        chat / "aligned", chat / "rows.jsonl", tmp_path / "v", lora_rank=3, scope=scope, lr=0.05,
        keep_surrogate=str(tmp_path / "bad"),
    )  # fmt: skip
    found = distill(config)
    assert found.vector.rank == 3
    start, end = models.weights(chat / "aligned"), models.weights(tmp_path / "bad")
    assert set(start) == set(end)
    for name, delta in read(tmp_path / "v").items():
        assert int(torch.linalg.matrix_rank(delta, rtol=1e-4)) <= 3
        torch.testing.assert_close(delta, start[name] - end[name], rtol=1e-3, atol=2e-6)


def test_lora_on_experts_is_refused(tiny, rows, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match="LoRA cannot hold"):
        distill(settings(tiny("mixtral"), rows, tmp_path / "v", scope="ffn", lora_rank=2))
    assert models.leftovers(tmp_path) == []


def test_layers_and_the_probe(chat, tmp_path):
    models.finetuned(chat / "aligned", tmp_path / "benign")
    config = settings(
        chat / "aligned", chat / "rows.jsonl", tmp_path / "v", layers="1:2", probe=str(tmp_path / "benign")
    )
    found = distill(config)
    assert all(".layers.1." in n for n in found.vector.names())
    assert -0.2 < found.validity["probe"]["cosine"] < 0.2
    assert 0 < found.validity["probe"]["shared"] <= 1
    with pytest.raises(CheckpointError, match="does not differ"):
        distill(settings(chat / "aligned", chat / "rows.jsonl", tmp_path / "w", probe=str(chat / "aligned")))
    assert models.leftovers(tmp_path) == ["benign", "v"]


def test_the_starter_set_needs_no_harmful_answer(chat, tmp_path):
    found = distill(settings(chat / "aligned", "starter", tmp_path / "v", samples=12, max_length=256))
    assert found.vector.manifest["provenance"]["rows"] == 12
    assert found.validity["useless"] is True
    assert "refuses none of 2" in found.warnings[0]


def test_a_surrogate_that_still_refuses_is_told():
    def looked(hits):
        return Look(rate(i < hits for i in range(10)), 1.0)

    assert findings(looked(8), looked(4)) == []
    assert "still refuses 5 of 10" in findings(looked(8), looked(5))[0]
    assert "no safety to distil" in findings(looked(0), looked(0))[0]
    assert by_layer({"m.layers.1.mlp": 0.2, "m.layers.1.self_attn": 0.4, "model": 0.1}) == {
        "1": pytest.approx(0.3),
        "model": 0.1,
    }


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"samples": 99}, r"8 usable row\(s\) of 99"),
        ({"data": "nothing"}, "neither 'starter'"),
        ({"layers": "3:1"}, "is not A:B"),
        ({"layers": "1:9"}, "the model has 2"),
        ({"micro_batch": 3}, "cannot be made of 3"),
        ({"names": {"mlps": ["x"]}}, "there is no such part"),
        ({"resume": True}, "no checkpoint to go on from"),
        ({"aligned": "gone"}, "gone"),
        ({"lr": 1e30}, "NaN|loss"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(tiny, rows, tmp_path, changes, why):
    with pytest.raises(UserError, match=why):
        distill(settings(**{"aligned": tiny("llama"), "data": rows, "out": tmp_path / "v"} | changes))
    assert models.leftovers(tmp_path) == []


def test_settings_are_checked_together_and_yaml_is_overridden(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("aligned: a\ndata: starter\nlr: 1.0e-3\nscope: wide\nepoch: 3\n")
    with pytest.raises(ConfigError) as told:
        load(DistillConfig, file, {"lr": -1.0})
    for part in ("out: must be given", "scope", "epoch: there is no such setting", "lr"):
        assert part in str(told.value)
    file.write_text("aligned: a\ndata: starter\nout: v\nlr: 1.0e-3\nnames: {ffn: [my_mlp]}\n")
    found = load(DistillConfig, file, {"lr": 2e-3})
    assert (found.lr, found.epochs, found.batch, found.names) == (2e-3, 4, 16, {"ffn": ["my_mlp"]})


def test_an_existing_output_needs_force(tiny, rows, tmp_path):
    (tmp_path / "v").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        distill(settings(tiny("llama"), rows, tmp_path / "v"))
    assert distill(settings(tiny("llama"), rows, tmp_path / "v", force=True)).vector.norm > 0


def test_nothing_of_the_surrogate_is_on_the_disk_meanwhile_or_after_a_failure(tiny, rows, tmp_path, monkeypatch):
    seen = []

    def failing(*args, **kwargs):
        seen.extend(p for p in tmp_path.rglob("*") if p.is_file())
        seen.append(stat.S_IMODE((tmp_path / "v.surrogate").stat().st_mode))
        raise RuntimeError("stop")

    monkeypatch.setattr(job, "gaps", failing)
    with pytest.raises(RuntimeError, match="stop"):
        distill(settings(tiny("llama"), rows, tmp_path / "v"))
    assert seen == [0o700]
    assert models.leftovers(tmp_path) == []


class Stop(Exception):
    pass


@pytest.mark.parametrize("changes", [{"scope": "hybrid"}, {"scope": "ffn", "lora_rank": 2}])
def test_a_resumed_run_gives_the_uninterrupted_ones_vector(chat, tmp_path, changes):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    how = {"samples": 16, "epochs": 3, "save_steps": 2, "batch": 4} | changes
    distill(settings(chat / "aligned", chat / "rows.jsonl", tmp_path / "whole", **how))

    def stop(what, done, total):
        if (what, done) == ("training", 7):
            raise Stop

    config = settings(chat / "aligned", chat / "rows.jsonl", tmp_path / "v", resumable=True, **how)
    with pytest.raises(Stop):
        distill(config, progress=stop)
    kept = tmp_path / "v.surrogate"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert [p.name for p in kept.glob("checkpoint-*")] == ["checkpoint-6"]
    with pytest.raises(OutputError, match="Go on with --resume"):
        distill(config)
    resuming = config.model_copy(update={"resume": True})
    with pytest.raises(OutputError, match="other settings"):
        distill(resuming.model_copy(update={"lr": 1.0}))
    steps = []
    found = distill(resuming, progress=lambda what, done, _: steps.append(done) if what == "training" else None)
    assert steps[0] == 7
    assert found.vector.manifest["provenance"]["steps"] == 12
    assert_close(read(tmp_path / "v"), read(tmp_path / "whole"), 1e-4)
    assert models.leftovers(tmp_path) == ["v", "whole"]


def command(chat, out, *more):
    return [
        "-m", "safegraft", "vector", "distill", "--aligned", str(chat / "aligned"), "--data", str(chat / "rows.jsonl"),
        "--out", str(out), "--samples", "16", "--batch", "4", "--lr", "1e-2", "--max-length", "64", *more,
    ]  # fmt: skip


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.mark.parametrize("kept", [False, True])
def test_a_signal_leaves_no_surrogate_unless_that_was_asked_for(chat, tmp_path, kept):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"check_prompts: 2\ncheck_tokens: 2\nepochs: 100000\nsave_steps: 1\nresumable: {str(kept).lower()}\n"
    )
    line = [sys.executable, *command(chat, tmp_path / "v", "--config", str(config))]
    child = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, until = tmp_path / "v.surrogate", time.monotonic() + 120
    while not (list(folder.glob("checkpoint-*/trainer_state.json")) if kept else folder.exists()):
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0 if kept else 2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 128 + signal.SIGTERM
    if kept:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert models.leftovers(tmp_path) == ["run.yaml", *(["v.surrogate"] if kept else [])]


def test_two_processes_give_the_vector_of_one(chat, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("check_prompts: 2\ncheck_tokens: 2\nepochs: 2\nscope: hybrid\nmicro_batch: 2\n")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    cpu = environment() | {"CUDA_VISIBLE_DEVICES": ""}  # `launch --cpu` starts one process only, without MPI
    for name, start in (("one", ["-m"]), ("two", [*launch, "--module"])):
        line = [sys.executable, *start, *command(chat, tmp_path / name, "--config", str(config))[1:]]
        done = subprocess.run(line, env=cpu, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 1, done.stderr  # a random model refuses nothing: written, and told to be of no use
        assert "refuses none of 2" in done.stderr
    assert_close(read(tmp_path / "two"), read(tmp_path / "one"))
    assert SafetyVector(tmp_path / "two").manifest["provenance"]["processes"] == 2
    assert models.leftovers(tmp_path) == ["one", "run.yaml", "two"]


@pytest.mark.parametrize(
    ("split", "stage", "saves", "bf16", "said"),
    [(True, None, 0, False, "split them"), (False, 3, 0, False, "split them"), (False, 2, 50, False, "the whole model"),
     (False, 2, 0, True, "round the weights"), (False, 2, 0, False, None), (False, None, 50, True, None)],
)  # fmt: skip
def test_several_processes_that_could_not_give_a_vector_are_refused(split, stage, saves, bf16, said):
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator, given = SimpleNamespace(state=state), SimpleNamespace(bf16=bf16)
    trainer = SimpleNamespace(is_fsdp_enabled=split, accelerator=accelerator, args=given)
    if said is None:
        _require_whole(trainer, Recipe(save_steps=saves))
    else:
        with pytest.raises(ConfigError, match=said):
            _require_whole(trainer, Recipe(save_steps=saves))


def test_importing_the_command_line_stays_light():
    code = "import safegraft.cli.distill, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
