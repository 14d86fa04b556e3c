"""The inside of the sandbox: a program of its own, standard library only, started by ``sandbox.run``.

Reads a description from standard input, shuts itself into new Linux namespaces (mounts, processes, network, IPC, host
name), changes into a root that holds the described folders read-only and an empty /tmp in memory, limits its resources,
gives up its privileges and becomes the described program. What prevents that is written to the descriptor ``report``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
SPACES = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
NOSUID, NODEV, BIND, REC, PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
READ_ONLY, RECURSIVE, DETACH = 0x1, 0x8000, 0x2
AT_FDCWD, MOUNT_SETATTR = -100, 442
"""mount_setattr(2): since Linux 5.12, one number on every architecture."""
NO_NEW_PRIVILEGES, DROP_BOUND, PARENT_DEATH = 38, 24, 1
CAPABILITIES = 64
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
FACTS = ("/proc/meminfo", "/proc/cpuinfo", "/proc/stat")
"""What libraries ask about the machine; /proc itself is not there."""
WORK = "/tmp/work"
NOBODY, NOBODIES = 61184, 4000
"""User ids for programs started by root: one of a range that no user has, so that its processes are counted alone."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    described: dict[str, Any] = json.load(sys.stdin)
    report = described["report"]
    os.set_inheritable(report, False)
    try:
        enter()
        inner = os.fork()
        if not inner:
            first(described)
        _, status = os.waitpid(inner, 0)
    except OSError as error:
        os.write(report, f"{error.filename or 'namespaces'}: {error.strerror}".encode())
        os._exit(1)
    os._exit(os.waitstatus_to_exitcode(status) % 256)


def enter() -> None:
    """Into new namespaces: root directly where it may, anybody else (and root in a container) by a user namespace."""
    if os.geteuid() == 0 and libc.unshare(SPACES) == 0:
        return
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(SPACES | NEWUSER), "user namespaces")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def first(described: dict[str, Any]) -> None:
    """The first process of the namespace: with its end the kernel ends every other."""
    report = described["report"]
    try:
        libc.prctl(PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
        build(described)
        program = os.fork()
        if not program:
            become(described)
    except OSError as error:
        os.write(report, f"{error.filename or 'mounts'}: {error.strerror}".encode())
        os._exit(1)
    os.close(report)
    while True:
        found, status = os.wait()
        if found == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def build(described: dict[str, Any]) -> None:
    """The new root: read-only but for /tmp, /dev/shm and the folders that may be written."""
    root = described["root"]
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=4m,mode=755")
    for place in ("/tmp", "/dev/shm"):
        os.makedirs(root + place)
        mount("tmpfs", root + place, "tmpfs", NOSUID | NODEV, f"size={described['scratch']},mode=1777")
    for place in (*SYSTEM, *DEVICES, *FACTS, *described["readable"], *described["writable"]):
        bind(root, place)
    attribute(root, READ_ONLY | NOSUID, 0, RECURSIVE)
    for place in ("/tmp", "/dev/shm", *described["writable"]):
        attribute(root + place, 0, READ_ONLY, 0)
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", DETACH), "umount")
    os.makedirs(WORK)
    os.chmod(WORK, 0o777)
    os.chdir(WORK)


def bind(root: str, place: str) -> None:
    """Show a file or folder of the machine at the same path; links stay links, what is not there is left out."""
    inside = root + place
    if not os.path.lexists(place) or os.path.lexists(inside):
        return
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.islink(place):
        os.symlink(os.readlink(place), inside)
        return
    if os.path.isdir(place):
        os.mkdir(inside)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    mount(place, inside, None, BIND | REC)


def become(described: dict[str, Any]) -> None:
    """Write the program's files, give up privileges, set the limits, and run it. Never returns."""
    for name, text in described["files"].items():
        Path(name).write_text(text, encoding="utf-8", errors="surrogatepass")
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    for capability in range(CAPABILITIES):
        libc.prctl(DROP_BOUND, capability, 0, 0, 0)
    if os.geteuid() == 0 and not mapped():
        nobody = NOBODY + described["salt"] % NOBODIES
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
    for name, most in described["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    os.execve(described["command"][0], described["command"], described["environment"])


def mapped() -> bool:
    """Whether only one user id exists here, as in a user namespace that ``enter`` made."""
    with contextlib.suppress(OSError):
        os.setgroups([])
        return False
    return True


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, kind_, data_ = (None if x is None else x.encode() for x in (source, kind, data))
    check(libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def attribute(place: str, added: int, taken: int, flags: int) -> None:
    """Change what a mount allows."""
    values = (ctypes.c_uint64 * 4)(added, taken, 0, 0)
    done = libc.syscall(MOUNT_SETATTR, AT_FDCWD, place.encode(), flags, values, ctypes.sizeof(values))
    check(done, "read-only mounts (Linux 5.12 or newer)")


def check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()
