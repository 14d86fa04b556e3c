"""Outputs are whole or visibly not there: in any order, resumed, refused, and when the disk gives out."""

import errno
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import files_of, leftovers
from safegraft.errors import NumericError, OutputError
from safegraft.tensors import shards, writer
from safegraft.tensors.files import ShardFile, build_layout
from safegraft.tensors.shards import sha256
from safegraft.tensors.source import TensorSpec, as_bytes
from safegraft.tensors.writer import JOURNAL, OutputFolder, replace_folder

SHAPES = {"a": (7, 5), "b": (3,), "c": (), "d": (0, 4), "e": (40, 40), "f": (1, 1)}


def tensors(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(s, generator=rng).to(torch.bfloat16 if n in "af" else torch.float32) for n, s in SHAPES.items()
    }


def layouts():
    specs = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors().items()]
    return [build_layout("model-1.safetensors", specs[:3]), build_layout("model-2.safetensors", specs[3:])]


def folder(out, **options):
    return OutputFolder(out, layouts(), **({"identity": "one"} | options))


def put(opened, name, values=None):
    data = as_bytes((values or tensors())[name])
    opened.write(name, data)
    opened.done(name, sha256(data))


def write_all(out, values=None, **options):
    with folder(out, **options) as opened:
        for name in SHAPES:
            if name not in opened.finished:
                put(opened, name, values)
        opened.finish({"kind": "test"})
    return out


def interrupted(out, names=("a", "e"), **options):
    """A run that wrote some tensors and stopped without a word."""
    with folder(out, **options) as opened:
        for name in names:
            put(opened, name)
        opened.note("survey", {"x": 1.5})
    return out.with_name(out.name + ".partial")


def broken(out, error, names, **options):
    """A run that noted its survey, wrote ``names``, and then met ``error``."""

    def run():
        with folder(out, **options) as opened:
            opened.note("survey", {"x": 1})
            for name in names:
                put(opened, name, tensors(1))
            raise error

    with pytest.raises(type(error)):
        run()


def holds(out, values=None):
    found = load_file(out / "model-1.safetensors") | load_file(out / "model-2.safetensors")
    return all(torch.equal(found[n], t) for n, t in (values or tensors()).items())


@pytest.mark.parametrize("seed", range(5))
def test_any_order_by_several_threads_in_pieces(tmp_path, seed):
    order = list(SHAPES)
    random.Random(seed).shuffle(order)
    values = tensors()

    def write(name):
        data = as_bytes(values[name])
        cut = len(data) // 3
        opened.write(name, data[cut:], cut)
        opened.write(name, data[:cut])
        opened.done(name, sha256(data))

    with folder(tmp_path / "out") as opened, ThreadPoolExecutor(4) as pool:
        list(pool.map(write, order))
        opened.finish({"kind": "test"})
    assert holds(tmp_path / "out")
    write_all(tmp_path / "plain")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert leftovers(tmp_path) == ["out", "plain"]


def test_copying_from_another_file(tmp_path):
    save_file(tensors(), tmp_path / "source.safetensors")
    source = ShardFile(tmp_path / "source.safetensors")
    with folder(tmp_path / "out") as opened:
        for name, entry in source.layout.entries.items():
            opened.copy(name, source.fd, entry.offset)
            opened.done(name, "not looked at here")
        opened.finish({})
    assert holds(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_copying_where_the_kernel_cannot(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    test_copying_from_another_file(tmp_path)


def test_copying_from_a_source_that_ends(tmp_path):
    (tmp_path / "short").write_bytes(b"12")
    with (
        (tmp_path / "short").open("rb") as short,
        folder(tmp_path / "out") as opened,
        pytest.raises(OutputError, match="its source ended"),
    ):
        opened.copy("a", short.fileno(), 0)
    assert not (tmp_path / "out").exists()


def test_nothing_is_there_before_finish(tmp_path):
    with folder(tmp_path / "out") as opened:
        for name in SHAPES:
            put(opened, name)
        assert leftovers(tmp_path) == ["out.partial"]
        assert "manifest.json" not in leftovers(tmp_path / "out.partial")
        opened.finish({"kind": "test"})
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(tmp_path / "out") == ["manifest.json", "model-1.safetensors", "model-2.safetensors"]


def test_the_manifest_is_the_last_file(tmp_path, monkeypatch):
    seen = []
    whole, replace = writer.write_whole, writer.replace_folder
    monkeypatch.setattr(writer, "write_whole", lambda path, data: (seen.append(path.name), whole(path, data)))
    monkeypatch.setattr(writer, "replace_folder", lambda new, out: (seen.append("renamed"), replace(new, out)))
    with folder(tmp_path / "out") as opened:
        for name in SHAPES:
            put(opened, name)
        opened.finish({}, index={"weight_map": {}}, texts={"README.md": "x"})
    assert seen[-2:] == ["manifest.json", "renamed"]
    assert set(seen[:-2]) == {"identity.state.json", "README.md", "model.safetensors.index.json"}


def test_finish_before_every_tensor_is_a_bug_that_is_noticed(tmp_path):
    with folder(tmp_path / "out") as opened:
        put(opened, "a")
        with pytest.raises(RuntimeError, match="5 tensors were never written"):
            opened.finish({})
    assert not (tmp_path / "out").exists()


def test_manifest_holds_every_digest(tmp_path):
    (tmp_path / "side.txt").write_text("beside")
    with folder(tmp_path / "out") as opened:
        for name in SHAPES:
            put(opened, name)
        opened.finish({"kind": "test"}, sidecars=[(tmp_path / "side.txt", "deep/side.txt")], texts={"README.md": "é"})
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["kind"] == "test"
    assert told["outputs"]["tensors"] == {n: sha256(as_bytes(t)) for n, t in tensors().items()}
    assert told["outputs"]["headers"] == {lay.filename: sha256(lay.header) for lay in layouts()}
    assert told["outputs"]["files"] == {"deep/side.txt": sha256(b"beside"), "README.md": sha256("é".encode())}
    assert (tmp_path / "out" / "deep" / "side.txt").read_bytes() == b"beside"


class TestExistingOutput:
    def test_is_not_touched_without_force(self, tmp_path):
        write_all(tmp_path / "out")
        before = files_of(tmp_path)
        for options in ({}, {"resume": True}, {"identity": "two"}):
            with pytest.raises(OutputError, match="exists already") as told:
                folder(tmp_path / "out", **options).__enter__()
            assert "--force" in told.value.hint
        assert files_of(tmp_path) == before

    @pytest.mark.parametrize("kind", ["file", "folder", "link"])
    def test_whatever_it_is(self, tmp_path, kind):
        out = tmp_path / "out"
        if kind == "file":
            out.write_text("mine")
        elif kind == "folder":
            out.mkdir()
        else:
            out.symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputError, match="exists already"):
            folder(out).__enter__()
        assert leftovers(tmp_path) == ["out"]

    def test_force_replaces_only_once_the_new_one_is_whole(self, tmp_path):
        write_all(tmp_path / "out")
        before = files_of(tmp_path / "out")
        new = tensors(1)
        with folder(tmp_path / "out", force=True) as opened:
            for name in SHAPES:
                put(opened, name, new)
                assert files_of(tmp_path / "out") == before
            opened.finish({})
        assert holds(tmp_path / "out", new)
        assert leftovers(tmp_path) == ["out"]

    def test_force_that_fails_leaves_the_old_one(self, tmp_path):
        write_all(tmp_path / "out")
        before = files_of(tmp_path / "out")
        broken(tmp_path / "out", KeyError(), ["a"], force=True)
        assert files_of(tmp_path / "out") == before

    def test_force_on_a_file(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        write_all(tmp_path / "out", force=True)
        assert holds(tmp_path / "out")
        assert leftovers(tmp_path) == ["out"]

    def test_a_neighbour_of_ours_in_name_only_is_left_alone(self, tmp_path):
        """OUT.replaced may be the user's own folder."""
        (tmp_path / "out.replaced").mkdir()
        (tmp_path / "out.replaced" / "mine.txt").write_text("mine")
        write_all(tmp_path / "out")
        write_all(tmp_path / "out", tensors(1), force=True)
        assert (tmp_path / "out.replaced" / "mine.txt").read_text() == "mine"
        assert leftovers(tmp_path) == ["out", "out.replaced"]

    def test_a_rename_that_fails_puts_the_old_one_back(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        with pytest.raises(OSError, match="No such file"):
            replace_folder(tmp_path / "never-made", tmp_path / "out")
        assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


class TestUnfinished:
    def test_needs_a_word(self, tmp_path):
        interrupted(tmp_path / "out")
        before = files_of(tmp_path)
        with pytest.raises(OutputError, match="did not finish") as told:
            folder(tmp_path / "out").__enter__()
        assert "--resume" in told.value.hint
        assert "--force" in told.value.hint
        assert files_of(tmp_path) == before

    def test_resume_goes_on(self, tmp_path):
        interrupted(tmp_path / "out")
        with folder(tmp_path / "out", resume=True) as opened:
            assert set(opened.finished) == {"a", "e"}
            assert opened.noted("survey") == {"x": 1.5}
        write_all(tmp_path / "out", resume=True)
        write_all(tmp_path / "plain")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
        assert leftovers(tmp_path) == ["out", "plain"]

    def test_resume_with_nothing_to_resume_begins(self, tmp_path):
        assert holds(write_all(tmp_path / "out", resume=True))

    def test_resume_refuses_another_run(self, tmp_path):
        interrupted(tmp_path / "out")
        before = files_of(tmp_path)
        with pytest.raises(OutputError, match="other inputs or settings"):
            folder(tmp_path / "out", resume=True, identity="two").__enter__()
        assert files_of(tmp_path) == before

    def test_force_begins_anew(self, tmp_path):
        partial = interrupted(tmp_path / "out")
        (partial / "stray").write_text("x")
        with folder(tmp_path / "out", force=True, identity="two") as opened:
            assert opened.finished == {}
            assert opened.noted("survey") is None
            assert "stray" not in leftovers(partial)

    @pytest.mark.parametrize("broken", ["first byte", "last byte", "zeros"])
    def test_a_journalled_tensor_with_other_bytes_is_written_again(self, tmp_path, broken):
        partial = interrupted(tmp_path / "out")
        entry = layouts()[0].entries["a"]
        with (partial / "model-1.safetensors").open("r+b") as file:
            raw = os.pread(file.fileno(), entry.spec.nbytes, entry.offset)
            if broken == "zeros":
                raw = bytes(len(raw))
            else:
                at = 0 if broken == "first byte" else len(raw) - 1
                raw = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
            os.pwrite(file.fileno(), raw, entry.offset)
        with folder(tmp_path / "out", resume=True) as opened:
            assert set(opened.finished) == {"e"}
        assert holds(write_all(tmp_path / "out", resume=True))

    def test_a_torn_journal_line_is_passed_over(self, tmp_path):
        partial = interrupted(tmp_path / "out")
        with (partial / JOURNAL).open("a") as file:
            file.write('{"tensor": "b", "sha')
        write_all(tmp_path / "out", resume=True)
        assert holds(tmp_path / "out")

    @pytest.mark.parametrize("line", ["7", "{}", '{"tensor": "zz", "sha256": "0"}', '{"tensor": ["a"], "sha256": 1}'])
    def test_a_strange_journal_line_is_passed_over(self, tmp_path, line):
        partial = interrupted(tmp_path / "out")
        (partial / JOURNAL).write_text(line + "\n" + (partial / JOURNAL).read_text())
        with folder(tmp_path / "out", resume=True) as opened:
            assert set(opened.finished) == {"a", "e"}

    def test_a_tensor_finished_after_a_torn_line_is_remembered(self, tmp_path):
        """The line that follows a torn one must not be glued to it."""
        partial = interrupted(tmp_path / "out")
        with (partial / JOURNAL).open("a") as file:
            file.write('{"tensor": "b", "sha')
        with folder(tmp_path / "out", resume=True) as opened:
            put(opened, "b")
        with folder(tmp_path / "out", resume=True) as opened:
            assert set(opened.finished) == {"a", "b", "e"}

    def test_a_folder_without_an_identity_is_begun_anew(self, tmp_path):
        partial = interrupted(tmp_path / "out")
        (partial / "identity.state.json").unlink()
        with folder(tmp_path / "out", resume=True) as opened:
            assert opened.finished == {}
            assert opened.noted("survey") is None

    def test_a_torn_state_file_is_begun_anew(self, tmp_path):
        partial = interrupted(tmp_path / "out")
        (partial / "survey.state.json").write_text('{"x": 1')
        assert holds(write_all(tmp_path / "out", resume=True))

    def test_wrong_length_of_a_shard_is_mended(self, tmp_path):
        partial = interrupted(tmp_path / "out")
        os.truncate(partial / "model-2.safetensors", 10)
        with folder(tmp_path / "out", resume=True) as opened:
            assert set(opened.finished) == {"a"}
        assert holds(write_all(tmp_path / "out", resume=True))


class TestDisk:
    def test_too_small_is_said_before_anything_is_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=1000))
        with pytest.raises(OutputError, match=r"needs .* GB and its disk has .* GB free") as told:
            folder(tmp_path / "out").__enter__()
        assert "Free some space" in told.value.hint
        assert leftovers(tmp_path) == []

    def test_what_a_resumed_run_holds_already_counts(self, tmp_path, monkeypatch):
        partial = interrupted(tmp_path / "out")
        held = sum(f.stat().st_blocks * 512 for f in partial.iterdir())
        needed = sum(lay.nbytes for lay in layouts()) + (64 << 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - held))
        folder(tmp_path / "out", resume=True).check()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - held - 1))
        with pytest.raises(OutputError, match="its disk has"):
            folder(tmp_path / "out", resume=True).check()

    def test_full_while_writing(self, tmp_path, monkeypatch):
        real = os.pwrite

        def full(fd, data, at):
            if at > 3000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data[:1000], at)

        with folder(tmp_path / "out") as opened:
            put(opened, "a")
            monkeypatch.setattr(os, "pwrite", full)
            with pytest.raises(OutputError, match="is full") as told:
                put(opened, "e")
            assert "--resume" in told.value.hint
        assert leftovers(tmp_path) == ["out.partial"]
        monkeypatch.undo()
        with folder(tmp_path / "out", resume=True) as opened:
            assert set(opened.finished) == {"a"}
        assert holds(write_all(tmp_path / "out", resume=True))

    def test_full_while_copying(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        (tmp_path / "source").write_bytes(bytes(1000))
        monkeypatch.setattr(os, "copy_file_range", full, raising=False)
        with (
            (tmp_path / "source").open("rb") as source,
            folder(tmp_path / "out") as opened,
            pytest.raises(OutputError, match="is full"),
        ):
            opened.copy("a", source.fileno(), 0)

    def test_full_while_journalling(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with folder(tmp_path / "out") as opened:
            monkeypatch.setattr(os, "write", full)
            with pytest.raises(OutputError, match="is full"):
                opened.done("a", "0")
            monkeypatch.undo()
            assert "a" not in opened.finished

    def test_full_while_noting(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with folder(tmp_path / "out") as opened:
            monkeypatch.setattr(writer, "write_whole", full)
            with pytest.raises(OutputError, match="is full"):
                opened.note("survey", {})

    def test_full_at_the_end(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with folder(tmp_path / "out") as opened:
            for name in SHAPES:
                put(opened, name)
            monkeypatch.setattr(writer, "write_whole", full)
            with pytest.raises(OutputError, match="is full"):
                opened.finish({}, texts={"README.md": "x"})
        assert leftovers(tmp_path) == ["out.partial"]

    def test_full_when_the_disk_is_set_to_work_early(self, tmp_path, monkeypatch):
        """The other thread's refusal is told by the next write, or by the flush."""
        monkeypatch.setattr(shards, "SYNC_EVERY", 1)
        real, broken = os.fsync, []

        def refuses_once(fd):
            if not broken:
                broken.append(fd)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        for name in ("a", None):
            broken.clear()
            with folder(tmp_path / "out", force=True) as opened:
                monkeypatch.setattr(os, "fsync", refuses_once)
                put(opened, "e")
                with suppress(OSError):
                    opened._syncing.result()
                with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
                    put(opened, name) if name else opened.flush()
                monkeypatch.setattr(os, "fsync", real)

    def test_setting_the_disk_to_work_early_changes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "SYNC_EVERY", 1)
        assert holds(write_all(tmp_path / "out"))

    def test_a_real_full_disk(self, tmp_path):
        """/dev/full refuses every write with ENOSPC."""
        if not os.path.exists("/dev/full"):  # noqa: PTH110
            pytest.skip("no /dev/full here")
        with folder(tmp_path / "out") as opened:
            held = opened._files["model-1.safetensors"]
            opened._files["model-1.safetensors"] = os.open("/dev/full", os.O_WRONLY)
            os.close(held)
            with pytest.raises(OutputError, match="is full"):
                put(opened, "a")


class TestPlace:
    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError):
            folder(tmp_path / "file" / "out").__enter__()
        assert files_of(tmp_path) == {"file": b"mine"}

    def test_missing_parents_are_made(self, tmp_path):
        assert holds(write_all(tmp_path / "deep" / "er" / "out"))

    def test_a_name_too_long(self, tmp_path):
        with pytest.raises(OutputError, match="cannot write"):
            folder(tmp_path / ("x" * 300)).__enter__()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_parent(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="is not writable"):
            folder(tmp_path / "locked" / "out").__enter__()

    def test_a_read_only_parent_as_the_system_tells_it(self, tmp_path, monkeypatch):
        """For runs as root, whom permissions do not stop: only the answer of access() is made up."""
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(OutputError, match="is not writable"):
            folder(tmp_path / "out").__enter__()
        assert leftovers(tmp_path) == []

    @pytest.mark.skipif(not os.access("/proc/self", os.R_OK), reason="needs Linux")
    def test_a_place_where_no_one_may_make_folders(self):
        """/proc takes no folders from anyone, root included."""
        with pytest.raises(OutputError):
            folder(writer.Path("/proc/self/out")).__enter__()


def test_an_input_error_before_the_first_tensor_leaves_nothing(tmp_path):
    """There is nothing to resume, so the next attempt with the input mended must not ask for --force."""
    broken(tmp_path / "out", NumericError("NaN"), [])
    assert leftovers(tmp_path) == []
    assert holds(write_all(tmp_path / "out"))


def test_an_input_error_later_leaves_what_can_be_resumed(tmp_path):
    broken(tmp_path / "out", NumericError("NaN"), ["a"])
    assert leftovers(tmp_path) == ["out.partial"]


def test_resuming_a_run_that_finished_no_tensor_begins_anew(tmp_path):
    broken(tmp_path / "out", KeyboardInterrupt(), [])
    assert holds(write_all(tmp_path / "out", resume=True))


def test_figures_survive_a_resume(tmp_path):
    with folder(tmp_path / "out") as opened:
        opened.write("a", as_bytes(tensors()["a"]))
        opened.done("a", sha256(as_bytes(tensors()["a"])), {"weight": 0.1 + 0.2})
    with folder(tmp_path / "out", resume=True) as opened:
        assert opened.figures == {"a": {"weight": 0.1 + 0.2}}


@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_force_on_a_link_replaces_the_link_not_what_it_points_to(tmp_path, target):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / target)
    write_all(tmp_path / "out", force=True)
    assert holds(tmp_path / "out")
    assert not (tmp_path / "out").is_symlink()
    assert files_of(tmp_path / "folder") == {"mine.txt": b"mine"}
    assert leftovers(tmp_path) == ["folder", "out"]


def test_files_are_closed_however_it_ends(tmp_path):
    if not os.path.isdir("/proc/self/fd"):  # noqa: PTH112
        pytest.skip("needs Linux")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    interrupted(tmp_path / "one")
    write_all(tmp_path / "two")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        folder(tmp_path / "file" / "out").__enter__()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
