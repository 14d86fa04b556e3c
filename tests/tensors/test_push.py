"""What is sent to the Hub, with the Hub played by a stand-in."""

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from safegraft import merge
from safegraft.errors import CheckpointError, OutputError
from safegraft.tensors.push import push


class Hub:
    def __init__(self, held=None):
        self.held, self.sent, self.private = held, {}, None

    def repo_exists(self, repo):
        return self.held is not None

    def list_repo_files(self, repo):
        return self.held

    def create_repo(self, repo, *, private, exist_ok):
        self.private = private
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        self.sent |= {p.name: p.read_bytes() for p in folder_path.iterdir() if p.name not in ignore_patterns}

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.sent[path_in_repo] = path_or_fileobj


@pytest.fixture
def hub(monkeypatch):
    def play(held=None):
        found = Hub(held)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        return found

    return play


@pytest.fixture(scope="module")
def merged(trio, tmp_path_factory):
    made = trio("llama")
    out = tmp_path_factory.mktemp("push") / "out"
    merge(made.task, made.vector, out, base=made.base)
    return out, made


def test_a_merged_model_goes_up_without_this_machines_paths(hub, merged):
    out, made = merged
    api = hub()
    assert push(out, "me/model") == "https://hub/me/model"
    assert api.private is True
    assert set(api.sent) == {p.name for p in out.iterdir()}
    assert api.sent["model.safetensors"] == (out / "model.safetensors").read_bytes()
    manifest = json.loads(api.sent["manifest.json"])
    assert str(made.base.parent) not in api.sent["manifest.json"].decode()
    assert manifest["inputs"]["base"]["name"] == made.base.name
    assert manifest["outputs"] == json.loads((out / "manifest.json").read_text())["outputs"]


def test_a_vector_goes_up_too(hub, merged):
    api = hub(held=[".gitattributes"])
    push(merged[1].vector, "me/vector", private=False)
    assert "vector.safetensors" in api.sent
    assert api.private is False


def test_files_are_only_added_to_with_force(hub, merged):
    api = hub(held=["model.safetensors"])
    with pytest.raises(OutputError, match="has 1 file"):
        push(merged[0], "me/model")
    assert not api.sent
    push(merged[0], "me/model", force=True)
    assert api.sent


@pytest.mark.parametrize("part", ["model.safetensors", "config.json"])
def test_what_was_changed_is_refused(hub, merged, tmp_path, part):
    shutil.copytree(merged[0], tmp_path / "out")
    file = tmp_path / "out" / part
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    api = hub()
    with pytest.raises(CheckpointError, match="was changed"):
        push(tmp_path / "out", "me/model")
    with pytest.raises(CheckpointError, match="not something Safegraft finished"):
        push(merged[1].base, "me/model")
    assert not api.sent


def test_a_hub_that_refuses_is_one_clear_error(hub, merged, monkeypatch):
    api = hub()
    monkeypatch.setattr(api, "repo_exists", lambda repo: (_ for _ in ()).throw(OfflineModeIsEnabled("offline")))
    with pytest.raises(OutputError, match="offline"):
        push(merged[0], "me/model")
