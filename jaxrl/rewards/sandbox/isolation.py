"""Namespaces, a file system of its own, limits and lost privileges, through libc.

The zygote takes user, mount, network and IPC namespaces and a root of read-only libraries once; each
run takes a process namespace and a temporary folder. Layout of the root: the standard library, shared
libraries and /dev/null, read-only; /tmp, writable, in memory, gone with the run. There is no /proc.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from . import filters
from .limits import Limits

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_NOSUID, _NODEV, _NOEXEC, _RDONLY, _REMOUNT = 2, 4, 8, 1, 32
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_CAPABILITY_VERSION_3 = 0x20080522
_VISIBLE = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/nix/store", "/dev/null",
)  # fmt: skip
_MOUNT_POINT = "/proc"
"""Where the new root is put together: a folder that exists everywhere and holds no library."""


def _checked(result: int, what: str) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), flags, options.encode())
    _checked(_LIBC.mount(*arguments), f"mount {target}")


def take_namespaces() -> None:
    """New user, mount, network, IPC and host name namespaces. Raises: OSError where forbidden."""
    flags = _NEW_USER | _NEW_NS | _NEW_NET | _NEW_IPC | _NEW_UTS
    _checked(_LIBC.unshare(flags), "unshare")


def take_root() -> None:
    """Replace the file system by one of read-only libraries. Raises: OSError where forbidden.

    Needs `take_namespaces` and a user map, without which nothing may be mounted.
    """
    standard_library = str(Path(os.__file__).parent.parent)
    _mount("none", "/", "none", _REC | _PRIVATE)
    _mount("tmpfs", _MOUNT_POINT, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    for path in (standard_library, *(name for name in _VISIBLE if os.path.exists(name))):
        _show(path, _MOUNT_POINT + path)
    os.mkdir(f"{_MOUNT_POINT}/tmp")
    os.chdir(_MOUNT_POINT)
    machine = os.uname().machine
    _checked(_LIBC.syscall(_PIVOT_ROOT[machine], b".", b"."), "pivot_root")
    _checked(_LIBC.umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    _mount("none", "/", "none", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _show(path: str, target: str) -> None:
    """Bind a folder or file of the old root, read-only; flags it has may not be taken away."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    kept = os.statvfs(path).f_flag & (_NOSUID | _NODEV | _NOEXEC)
    _mount(path, target, "none", _BIND | _REC)
    _mount("none", target, "none", _REMOUNT | _BIND | _RDONLY | _NOSUID | kept)


def take_run(limits: Limits, user: int) -> None:
    """The supervisor's part: a process namespace for its children and an empty /tmp that `user` owns."""
    _checked(_LIBC.unshare(_NEW_PID | _NEW_NS), "unshare")
    options = f"mode=700,size={limits.disk_bytes},nr_inodes=1024,uid={user},gid={user}"
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, options)


def die_with_parent() -> None:
    """Be killed when the parent ends. Undone by a change of user, so it comes after that."""
    _checked(_LIBC.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)), "prctl")


def confine(limits: Limits, user: int | None, parent: int) -> None:
    """Give up what a program must not have: in namespaces as `user`, or None for the filter alone.

    parent: a pipe's write end whose read end the parent alone holds.
    """
    if user:  # 0 is already an ordinary user outside of the namespace, and has no other to become
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _set_limits(limits, count_tasks=user is not None)
    os.chdir("/" if user is None else "/tmp")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked(_LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    die_with_parent()
    try:
        os.write(parent, b"\0")
    except BrokenPipeError:  # it ended before it could take us with it
        sys.exit(1)
    os.close(parent)
    _checked(_LIBC.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0)), "prctl")  # its memory is its own
    filters.install(_LIBC, read_only=user is None)


def _set_limits(limits: Limits, count_tasks: bool) -> None:
    """count_tasks: without a user namespace the kernel counts all tasks of the user, so it is left out."""
    bounds = {
        resource.RLIMIT_CPU: int(limits.wall_s) + 2,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.output_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if count_tasks:
        bounds[resource.RLIMIT_NPROC] = limits.threads
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))
