"""Fusing under a mask: numbers by hand, the limits bit for bit, and the way through the real pipeline."""

import json
import math
import warnings

import pytest
import torch
from typer.testing import CliRunner

import masks
import models
from safegraft import merge, verify
from safegraft.cli import app
from safegraft.config import MergeConfig
from safegraft.errors import CheckpointError, ConfigError, LineageError, MismatchError
from safegraft.merging import run as merging_run
from safegraft.merging.execute import merge_tensor
from safegraft.merging.forecast import forecast
from safegraft.merging.method import METHODS, GlobalStats
from safegraft.tensors.lowrank import Delta, LowRank
from safegraft.tensors.masking import Grain, Logits

METHOD = METHODS.get("somf")
ATTENTION = "model.layers.0.self_attn.q_proj.weight"


def run(base, deltas, logits, weights=None, **params):
    return merge_tensor(
        METHOD, METHOD.parameters(params), GlobalStats(1.0, 0.0, 1.0), name="w", base=base, tasks=deltas,
        safety=Delta(tuple(base.shape)), weights=weights or (1.0,) * len(deltas), mask=logits,
    )  # fmt: skip


def whole(tensor):
    return Delta(tuple(tensor.shape), full=tensor)


def test_by_hand():
    """σ(0) = ½, σ(ln 3) = ¾: mean ⅝, so gates 0.8 and 1.2. Binary: 0 and 1, mean ½, so gates 0 and 2."""
    logits = Logits(torch.tensor([[0.0, math.log(3)]]), (1, 2), Grain())
    base, delta = torch.tensor([[5.0, 5.0]]), torch.tensor([[1.0, -1.0]])
    soft, hard = (run(base, [whole(delta)], logits, kind=kind) for kind in ("continuous", "binary"))
    assert torch.allclose(soft.dense(), torch.tensor([[0.8, -1.2]]))
    assert torch.allclose(hard.dense(), torch.tensor([[0.0, -2.0]]))
    assert soft.figures["density"] == pytest.approx(0.625)
    assert hard.figures == {"density": 0.5, "size": pytest.approx(math.sqrt(2))}
    fused = run(base, [whole(delta), whole(3 * delta)], logits, kind="binary", fusion="task-arithmetic", scale=0.5)
    assert torch.allclose(fused.dense(), torch.tensor([[0.0, -4.0]]))


def test_factors_by_hand():
    """δ = [1, 2]ᵀ[3, 4]; the left gate of logits (0, ln 3) is (0.8, 1.2), the right one's 1."""
    low = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    pair = (
        Logits(torch.tensor([[0.0], [math.log(3)]]), (2, 1), Grain()),
        Logits(torch.full((2, 1), torch.inf), (2, 1), Grain()),
    )
    made = run(torch.zeros(2, 2), [Delta((2, 2), low=low)], pair)
    assert torch.allclose(made.dense(), torch.tensor([[2.4, 3.2], [7.2, 9.6]]))
    assert made.figures["density"] == pytest.approx((0.625 + 1) / 2)


def test_drawn_masks_depend_on_the_seed_alone():
    base, delta = torch.zeros(6, 4), models.noise("d", (6, 4), 0)
    logits = Logits(models.noise("s", (6, 4), 1), (6, 4), Grain())
    first, again, other = (run(base, [whole(delta)], logits, kind="binary", seed=s).dense() for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(run(base, [whole(delta)], logits).dense(), run(base, [whole(delta)], logits).dense())


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """``tuned(family, how)``: an aligned model and three fine-tunes of it, full, LoRA or both."""
    root, made = tmp_path_factory.mktemp("tuned"), {}

    def get(family, how="full"):
        if (family, how) not in made:
            base, place = tiny(family), root / f"{family}-{how}"
            three = []
            for i in range(3):
                if how == "full" or (how == "mixed" and i == 0):
                    three.append(models.finetuned(base, place / f"{i}", seed=i + 1))
                else:
                    three.append(masks.adapter(base, place / f"{i}", seed=i))
            made[family, how] = (base, three)
        return made[family, how]

    return get


CASES = [("llama-tied", "full"), ("llama", "lora"), ("qwen2", "full"), ("mistral", "lora"), ("mistral", "mixed")]


@pytest.mark.parametrize(("family", "how"), CASES)
@pytest.mark.parametrize("fusion", ["task-arithmetic", "ties", "dare"])
def test_logits_of_infinity_bit_for_bit(tuned, tmp_path, family, how, fusion):
    """s → +∞: the plain fusion, here a mask-less one; s → −∞: the aligned model."""
    base, three = tuned(family, how)
    nothing = {"model.norm.weight": torch.full((16,), torch.inf)}
    masks.by_hand(tmp_path / "none", base, three, nothing, fusion=fusion, scale=0.3)
    masks.by_hand(tmp_path / "all", base, three, masks.everywhere(base, torch.inf), fusion=fusion, scale=0.3)
    masks.by_hand(tmp_path / "gone", base, three, masks.everywhere(base, -torch.inf), fusion=fusion, scale=0.3)
    for mask, kind in (("none", "continuous"), ("all", "continuous"), ("all", "binary"), ("gone", "binary")):
        merge(three, None, tmp_path / f"{mask}-{kind}", base=base, method="somf", mask=str(tmp_path / mask),
              params={"kind": kind})  # fmt: skip
    plain, soft, hard, gone = (
        models.weights(tmp_path / n) for n in ("none-continuous", "all-continuous", "all-binary", "gone-binary")
    )
    aligned = models.weights(base)
    for name, tensor in plain.items():
        assert torch.equal(soft[name], tensor), name
        assert torch.equal(hard[name], tensor), name
        assert torch.equal(gone[name].view(torch.int32), aligned[name].view(torch.int32)), name
    if fusion == "task-arithmetic":
        merge(three, None, tmp_path / "ta", base=base, method="task_arithmetic", weights=[0.3] * 3)
        expected = models.weights(tmp_path / "ta")
        assert all(torch.allclose(plain[n], expected[n], atol=1e-6) for n in plain)


@pytest.mark.parametrize("how", ["full", "lora"])
def test_one_fine_tune_is_given_back_bit_for_bit(tuned, tmp_path, how):
    base, (task, *_) = tuned("qwen2", how)
    masks.by_hand(tmp_path / "mask", base, [task], masks.everywhere(base, torch.inf))
    merge(task, None, tmp_path / "out", base=base, method="somf", mask=tmp_path / "mask")
    masks.by_hand(tmp_path / "part", base, [task], {ATTENTION: masks.everywhere(base, -torch.inf)[ATTENTION]})
    merge(task, None, tmp_path / "less", base=base, method="somf", mask=str(tmp_path / "part"))
    if how == "lora":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), task)
            expected = peft.merge_and_unload().state_dict()
    else:
        expected = models.weights(task)
        same = (tmp_path / "out" / "model.safetensors").read_bytes() == (task / "model.safetensors").read_bytes()
        assert same
    found, less = models.weights(tmp_path / "out"), models.weights(tmp_path / "less")
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in found)
    assert torch.equal(less[ATTENTION], models.weights(base)[ATTENTION])
    assert all(torch.equal(less[n], found[n]) for n in found if n != ATTENTION)


@pytest.mark.parametrize(("family", "how"), [("llama-tied", "full"), ("llama", "lora")])
@pytest.mark.parametrize("fusion", ["mean", "ties", "dare"])
def test_permuting_the_tasks_changes_no_bit(tuned, tmp_path, family, how, fusion):
    base, three = tuned(family, how)
    logits = {n: models.noise(n, t.shape, 5) for n, t in models.weights(base).items()}
    masks.by_hand(tmp_path / "mask", base, three, logits, fusion=fusion)
    outs = []
    for order in ((0, 1, 2), (2, 0, 1)):
        outs.append(tmp_path / str(order))
        done = merge([three[i] for i in order], None, outs[-1], base=base, method="somf", mask=str(tmp_path / "mask"))
        assert not [w for w in done.warnings if "mask" in w]
    first, second = (models.weights(out) for out in outs)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_resuming_workers_and_ties_to_the_formula(tuned, tmp_path, monkeypatch):
    """An interrupted fusion goes on to the same bytes, on any number of workers; the bytes are the formula's."""
    base, three = tuned("llama")
    logits = {n: models.noise(n, t.shape, 5) for n, t in models.weights(base).items() if t.dim() == 2}
    masks.by_hand(tmp_path / "mask", base, three, logits, fusion="task-arithmetic", scale=0.2)
    settings = {"base": base, "method": "somf", "mask": str(tmp_path / "mask"), "params": {"kind": "binary"}}
    merge(three, None, tmp_path / "whole", workers=1, **settings)

    real, seen = merging_run.execute, []

    def stops(plan, run, folder, workers, count):
        def stop(name, nbytes):
            seen.append(name)
            if len(seen) == 4:
                raise KeyboardInterrupt

        return real(plan, run, folder, workers, stop)

    monkeypatch.setattr(merging_run, "execute", stops)
    with pytest.raises(KeyboardInterrupt):
        merge(three, None, tmp_path / "out", workers=1, **settings)
    monkeypatch.undo()
    merge(three, None, tmp_path / "out", workers=3, resume=True, **settings)
    models.same_model(tmp_path / "out", tmp_path / "whole")
    assert all(check.passed is not False for check in verify(tmp_path / "out"))
    models.generates(tmp_path / "out")

    found, aligned = models.weights(tmp_path / "out"), models.weights(base)
    own = [models.weights(m) for m in three]
    for name, tensor in found.items():
        change = 0.2 * sum(w[name] - aligned[name] for w in own)
        if name in logits:
            m = (logits[name] > 0).float()
            change = change * m / m.mean()
        assert torch.allclose(tensor, aligned[name] + change, atol=1e-6), name
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["params"] == {
        "kind": "binary", "fusion": "task-arithmetic", "scale": 0.2, "density": 0.2, "drop": 0.2, "seed": None,
        "temperature": 0.5,
    }  # fmt: skip
    assert manifest["inputs"]["mask"]["sha256"]
    assert "matrices have no mask" not in "".join(manifest["result"]["notes"])


def test_one_mask_for_rows_and_blocks(tuned, tmp_path):
    base, three = tuned("llama")
    for grain in (Grain("row"), Grain("block", 6)):
        logits = {n: models.noise(n, grain.shape(tuple(t.shape)), 5) for n, t in models.weights(base).items()}
        masks.by_hand(tmp_path / grain.granularity, base, three[:1], logits, granularity=grain.granularity,
                      block=grain.block)  # fmt: skip
        out = tmp_path / f"{grain.granularity}-out"
        merge(three[0], None, out, base=base, method="somf", mask=str(tmp_path / grain.granularity))
        found, aligned, own = (models.weights(m) for m in (out, base, three[0]))
        for name, tensor in found.items():
            m = grain.expand(torch.sigmoid(logits[name]), tuple(tensor.shape))
            expected = aligned[name] + (own[name] - aligned[name]) * m / m.mean()
            assert torch.allclose(tensor, expected, atol=1e-6), name


def test_a_mask_over_factors_says_what_it_is(tuned, tmp_path):
    base, adapters = tuned("llama", "lora")
    shapes = {n: t.shape for n, t in models.weights(base).items() if "q_proj" in n or "up_proj" in n}
    sides = [(n, side, (shape[i], 2)) for n, shape in shapes.items() for i, side in enumerate(("#left", "#right"))]
    logits = {n + side: models.noise(n + side, shape, 5) for n, side, shape in sides}
    masks.by_hand(tmp_path / "mask", base, adapters, logits, fusion="mean", factors=True)
    done = merge(adapters, None, tmp_path / "out", base=base, method="somf", mask=str(tmp_path / "mask"))
    assert any("not masking the weights" in note for note in done.notes)
    config = MergeConfig(
        model=[str(m) for m in adapters],
        base=str(base),
        mask=str(tmp_path / "mask"),
        method="somf",
        out=str(tmp_path / "o"),
    )
    assert forecast(merging_run.prepare(config)).total > 0
    found, aligned = models.weights(tmp_path / "out"), models.weights(base)
    from safegraft.tensors.adapter import Adapter
    from safegraft.tensors.checkpoint import Checkpoint

    def gate(key):
        m = torch.sigmoid(logits[key])
        return m / m.mean()

    for name in shapes:
        own = [Adapter(a, Checkpoint.open(base)).delta(name, None).low for a in adapters]
        products = [(o.left * gate(f"{name}#left")) @ (o.right * gate(f"{name}#right")).T for o in own]
        assert torch.allclose(found[name], aligned[name] + sum(products) / 3, atol=1e-6), name
    other = masks.adapter(base, tmp_path / "other", rank=3)
    with pytest.raises(MismatchError, match="has rank 3"):
        merge(other, None, tmp_path / "x", base=base, method="somf", mask=str(tmp_path / "mask"))
    with pytest.raises(ConfigError, match="ties takes whole changes"):
        merge(adapters, None, tmp_path / "x", base=base, method="somf", mask=str(tmp_path / "mask"),
              params={"fusion": "ties"})  # fmt: skip


def test_doubts_and_refusals(tuned, tmp_path):
    base, (one, two, three) = tuned("llama")
    mask = str(tmp_path / "mask")
    masks.by_hand(tmp_path / "mask", base, [one, two], {ATTENTION: masks.everywhere(base, 1.0)[ATTENTION]})
    told = {"base": base, "method": "somf", "mask": mask}
    done = merge([one, three], None, tmp_path / "other", params={"fusion": "mean"}, **told)
    assert "other fine-tunes" in done.warnings[0]
    assert "learnt under the fusion sum" in done.warnings[1]
    assert "have no mask and are fused as they are" in done.notes[-1]
    weighed = merge([two, one], None, tmp_path / "weighed", weights=[1.0, 2.0], **told)
    assert "learnt with other weights" in weighed.warnings[0]
    with pytest.raises(LineageError, match="other fine-tunes"):
        merge([one, three], None, tmp_path / "strict", strict=True, **told)
    for settings, why in [
        ({"strength": 0.5}, "has no strength"),
        ({"as_adapter": True}, "no adapter holds"),
        ({"mask": None}, "needs a mask"),
        ({"calibration": "x"}, "uses no calibration"),
        ({"method": "task_arithmetic"}, "uses no mask"),
        ({"params": {"kind": "hard"}}, "kind"),
        ({"params": {"scale": 0}}, "scale"),
    ]:
        with pytest.raises(ConfigError, match=why):
            merge([one, two], None, tmp_path / "x", **(told | settings))
    with pytest.raises(ConfigError, match="uses no safety vector"):
        merge([one, two], str(tmp_path), tmp_path / "x", **told)
    with pytest.raises(CheckpointError, match="somf train"):
        merge([one, two], None, tmp_path / "x", **(told | {"mask": str(one)}))
    other = models.build("llama", tmp_path / "small", hidden_size=8, head_dim=2)
    with pytest.raises(MismatchError, match="learnt on"):
        merge(models.finetuned(other, tmp_path / "t"), None, tmp_path / "x", **(told | {"base": other}))
    assert not list(tmp_path.glob("x*"))


def test_dry_run_and_the_command_line(tuned, tmp_path):
    base, three = tuned("llama-tied")
    logits = {n: models.noise(n, t.shape, 5) for n, t in models.weights(base).items()}
    masks.by_hand(tmp_path / "mask", base, three, logits)
    mask = str(tmp_path / "mask")
    config = MergeConfig(
        model=[str(m) for m in three],
        base=str(base),
        mask=mask,
        method="somf",
        out=str(tmp_path / "o"),
    )
    assert forecast(merging_run.prepare(config)).total > 0

    def safegraft(*arguments):
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    given = ["--aligned", base, *(x for m in three for x in ("--model", m)), "--mask", tmp_path / "mask"]
    assert "Nothing was written" in safegraft("somf", "fuse", *given, "--out", tmp_path / "x", "--dry-run")
    text = safegraft("somf", "fuse", *given, "--out", tmp_path / "out", "--kind", "binary")
    assert "of them under the mask" in text
    for seed in (0, 1):
        merge(three, None, tmp_path / f"s{seed}", base=base, method="somf", mask=mask, params={"seed": seed})
    drawn = [(tmp_path / f"s{seed}" / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without training" not in card
    assert "a mask learnt on safety preferences" in card
