"""Programs that try to get out of the sandbox, or to take the machine down with them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safegraft.errors import ConfigError
from safegraft.evaluate.utility import sandbox
from safegraft.evaluate.utility.jail import WORK


@pytest.fixture(autouse=True, scope="module")
def granted():
    """Skipped, with the reason, where the machine grants no namespaces: there nothing is ever run."""
    try:
        sandbox.require()
    except ConfigError as error:
        pytest.skip(str(error))


def say(program, **options):
    """What a program prints in the sandbox."""
    return sandbox.run([sys.executable, "-I", "-c", program], **options)


def test_right_and_wrong():
    assert sandbox.passes("def add(a, b): return a + b\nassert add(2, 3) == 5")
    assert not sandbox.passes("def add(a, b): return a * b\nassert add(2, 3) == 5")
    assert not sandbox.passes("def add(a, b) return a")
    assert not sandbox.passes("'''")
    assert not sandbox.passes("s = '\udc80'\nassert s == 1")


@pytest.mark.parametrize("early", ["import sys; sys.exit(0)", "import os; os._exit(0)", "exit()", "quit(0)"])
def test_leaving_before_the_tests_is_no_success(early):
    assert not sandbox.passes(f"{early}\nassert False")


def test_a_main_block_does_not_run():
    """As in the harness's own metric: its programs are not ``__main__``."""
    assert sandbox.passes("if __name__ == '__main__': raise ValueError")


SOCKET = """
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_INET6, ("::1", {port})),
                        (socket.AF_INET, ("1.1.1.1", 53))):
    try:
        with socket.socket(family) as made:
            made.settimeout(2)
            made.connect(address)
        print("connected", address)
    except OSError as error:
        print("refused", error.strerror)
"""


def test_no_network_not_even_the_machine_itself():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        done = say(SOCKET.format(port=server.getsockname()[1]))
    assert done.stdout.count("refused") == 3, done
    assert "connected" not in done.stdout


def test_files_of_the_machine_are_neither_seen_nor_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    program = f"""
import os
for place in ({str(secret)!r}, "/etc/passwd", "/var", "/home", "/proc/1/environ"):
    print(os.path.exists(place))
for place in ({str(tmp_path / "new")!r}, "/new", "/usr/new", os.path.join(os.path.dirname(os.__file__), "new")):
    try:
        open(place, "w")
        print("written", place)
    except OSError as error:
        print("refused")
open("here", "w").write("x")
print(os.getcwd(), os.listdir("."), sorted(os.environ))
"""
    done = say(program)
    lines = done.stdout.splitlines()
    assert lines[:5] == ["False"] * 5, done
    assert lines[5:9] == ["refused"] * 4
    assert lines[9].startswith(f"{WORK} ['here'] ")
    assert "SECRET" not in lines[9]
    assert not (tmp_path / "new").exists()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SAFEGRAFT_TOKEN", "hidden")
    assert "hidden" not in say("import os; print(dict(os.environ))").stdout


def test_privileges_are_gone():
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None), libc.sethostname(b"x", 1), libc.umount2(b"/tmp", 2))
try:
    os.setuid(0)
    print(os.access("/usr", os.W_OK))
except OSError:
    print(False)
"""
    assert say(program).stdout.split() == ["-1", "-1", "-1", "False"]


def test_memory_is_limited():
    started = time.time()
    assert "MemoryError" in say("x = bytearray(4 << 30)").stderr
    assert time.time() - started < 10


def test_forks_are_limited_and_end_with_the_program():
    program = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(300)
    except BlockingIOError:
        break
    made += 1
print(made)
"""
    started = time.time()
    done = say(program, seconds=15)
    assert 0 < int(done.stdout) < sandbox.LIMITS["NPROC"], done
    assert time.time() - started < 10
    assert not [p for p in processes() if "time.sleep(300)" in p]


def test_a_fork_bomb_dies_of_its_limits():
    done = say("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", seconds=3)
    assert done.status is None or done.status >= 128
    time.sleep(0.2)
    assert not [p for p in processes() if "try: os.fork()" in p]


def processes():
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue


def test_loops_and_sleeps_are_ended():
    busy = say("while True: pass", limits={"CPU": 1}, seconds=10)
    assert busy.status is not None
    assert busy.status > 128
    asleep = say("import time; print('hm', flush=True); time.sleep(100)", seconds=1)
    assert (asleep.status, asleep.stdout) == (None, "hm\n")


def test_output_and_files_are_limited():
    done = say("while True: print('x' * 1000)", limits={"FSIZE": 1 << 20}, seconds=10)
    assert done.status not in (0, None)
    assert len(done.stdout) == sandbox.KEPT
    big = say("f = open('f', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20))", seconds=10)
    assert big.status not in (0, None)


def test_one_folder_may_be_given(tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "in.txt").write_text("hello")
    program = f"text = open({str(tmp_path / 'in.txt')!r}).read(); open({str(tmp_path / 'out.txt')!r}, 'w').write(text)"
    done = say(program, writable=[tmp_path])
    assert (done.status, (tmp_path / "out.txt").read_text()) == (0, "hello")
    assert say(program, readable=[tmp_path]).status == 1


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="tests run as an ordinary user anyway")
def test_through_a_user_namespace():
    """Root may make its namespaces directly. Without that right it goes through a user namespace, as everybody does."""
    code = (
        "from safegraft.evaluate.utility import sandbox\n"
        "print(sandbox.passes('assert True'), sandbox.passes('assert False'),"
        " sandbox.passes('import socket; socket.create_connection((\"127.0.0.1\", 1))'),"
        ' sandbox.passes(\'open("/usr/new", "w")\'))'
    )
    weak = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable, "-c", code]
    done = subprocess.run(weak, capture_output=True, text=True, check=False)
    if "user namespaces" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout.split() == ["True", "False", "False", "False"], done.stderr


def test_where_nothing_can_be_shut_in_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="cannot be shut in on darwin") as caught:
        say("print(1)")
    assert "leave the code tasks out" in caught.value.hint
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "_python", lambda: (Path("/dev/null/nowhere"),))
    with pytest.raises(ConfigError, match="cannot be shut in here"):
        sandbox.run([str(tmp_path / "missing")])


def test_pass_at_k_by_hand():
    """Two candidates, one right: pass@1 = 1/2, pass@2 = 1; the second problem has none right."""
    rates, found = sandbox.CodeEval().compute(
        references=["assert f() == 1"] * 2,
        predictions=[["def f(): return 1", "def f(): return 2"], ["f = 1", "def f(): return 0"]], k=[1, 2, 3],
    )  # fmt: skip
    assert found == [[True, False], [False, False]]
    assert rates == {"pass@1": 0.25, "pass@2": 0.5}
