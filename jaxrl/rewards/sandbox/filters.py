"""System calls that a program may not make: a seccomp filter, which needs no privilege.

It forbids further processes and programs, signals to and changes of others, sockets, kernel objects
that outlive the process, namespaces, and every call newer than the table. `read_only` also forbids
every change of the file system, for where the program cannot be given a file system of its own.
Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (Linux 6.18).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import NamedTuple


class _Calls(NamedTuple):
    """Numbers of one architecture."""

    arch: int
    clone: int
    prctl: int
    prlimit64: int
    tgkill: int
    opens: dict[int, int]
    """open, openat: the argument that holds the flags."""
    denied: tuple[int, ...]
    writes: tuple[int, ...]


_X86_64 = _Calls(
    arch=0xC000003E, clone=56, prctl=157, prlimit64=302, tgkill=234, opens={2: 1, 257: 2},
    denied=(
        # fork vfork execve execveat kill tkill rt_sigqueueinfo rt_tgsigqueueinfo
        57, 58, 59, 322, 62, 200, 129, 297,
        # ptrace process_vm_readv process_vm_writev kcmp setpriority sched_setaffinity
        # sched_setscheduler sched_setparam sched_setattr ioprio_set migrate_pages move_pages
        101, 310, 311, 312, 141, 203, 144, 142, 314, 251, 256, 279,
        # unshare setns mount umount2 pivot_root chroot bpf perf_event_open keyctl add_key request_key
        # userfaultfd
        272, 308, 165, 166, 155, 161, 321, 298, 250, 248, 249, 323,
        # memfd_create shmget shmat msgget semget mq_open socket
        319, 29, 30, 68, 64, 240, 41,
    ),
        # creat truncate mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink
        # symlinkat chmod fchmod fchmodat chown lchown fchown fchownat mknod mknodat utime utimes utimensat
        # futimesat setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
    writes=(
        85, 76, 83, 258, 84, 87, 263, 82, 264, 316, 86, 265, 88,
        266, 90, 91, 268, 92, 94, 93, 260, 133, 259, 132, 235, 280,
        261, 188, 189, 190, 197, 198, 199,
    ),
)  # fmt: skip
_AARCH64 = _Calls(  # the same calls; those that only x86_64 has are left out
    arch=0xC00000B7, clone=220, prctl=167, prlimit64=261, tgkill=131, opens={56: 2},
    denied=(
        221, 281, 129, 130, 138, 240,
        117, 270, 271, 272, 140, 122, 119, 118, 274, 30, 238, 239,
        97, 268, 40, 39, 41, 51, 280, 241, 219, 217, 218, 282,
        279, 194, 196, 186, 190, 180, 198,
    ),
    writes=(45, 34, 35, 38, 276, 37, 36, 52, 53, 55, 54, 33, 88, 5, 6, 7, 14, 15, 16),
)  # fmt: skip
_EVERYWHERE = (
    424, 425, 428, 429, 430, 431, 432, 433, 434, 438, 440, 442, 447, 448, 452,
)  # fmt: skip
"""pidfd_send_signal io_uring_setup open_tree move_mount fsopen fsconfig fsmount fspick pidfd_open
pidfd_getfd process_madvise mount_setattr memfd_secret process_mrelease fchmodat2"""
_CLONE3, _OPENAT2 = 435, 437
"""Their flags lie in memory, where a filter cannot look: "not implemented" makes libc use the old calls."""
_NEWER = 463
"""First number that the table does not know; 2^30 and above is the x32 interface."""

_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16


def supported() -> bool:
    """Whether this machine's system calls are in the table: Linux on x86_64 or aarch64."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One instruction of classic BPF; yes, no: instructions to skip after a comparison."""
    return struct.pack("HBBI", code, yes, no, value)


def _deny(number: int, error: int = errno.EPERM) -> bytes:
    return _op(_EQUAL, number, 0, 1) + _op(_RETURN, _ERRNO | error)


def _deny_if(number: int, argument: int, test: int, value: int, allowed: bool) -> bytes:
    """Deny the call where its argument passes the test; with `allowed`, where it does not."""
    body = (
        _op(_LOAD, _ARGUMENTS_AT + 8 * argument)
        + _op(test, value, *((0, 1) if allowed else (1, 0)))
        + _op(_RETURN, _ALLOW)
        + _op(_RETURN, _ERRNO | errno.EPERM)
    )
    return _op(_EQUAL, number, 0, 4) + body


def _program(read_only: bool) -> bytes:
    table = _X86_64 if platform.machine() == "x86_64" else _AARCH64
    code = _op(_LOAD, _ARCH_AT) + _op(_EQUAL, table.arch, 1, 0) + _op(_RETURN, _KILL)
    code += _op(_LOAD, _NUMBER_AT)
    code += _op(_AT_LEAST, _NEWER, 0, 1) + _op(_RETURN, _ERRNO | errno.ENOSYS)
    for number in (*_EVERYWHERE, *table.denied, *(table.writes if read_only else ())):
        code += _deny(number)
    code += _deny(_CLONE3, errno.ENOSYS) + _deny(_OPENAT2, errno.ENOSYS)
    code += _deny_if(table.clone, 0, _ANY_BIT, _CLONE_THREAD, allowed=True)
    code += _deny_if(table.prctl, 0, _EQUAL, _PR_SET_PDEATHSIG, allowed=False)
    code += _deny_if(table.prlimit64, 0, _EQUAL, 0, allowed=True)
    code += _deny_if(table.tgkill, 0, _EQUAL, os.getpid(), allowed=True)
    if read_only:
        for number, argument in table.opens.items():
            code += _deny_if(number, argument, _ANY_BIT, _WRITING, allowed=False)
    return code + _op(_RETURN, _ALLOW)


def install(libc: ctypes.CDLL, read_only: bool) -> None:
    """Filter this process's system calls from now on. Raises: OSError if the kernel refuses."""
    code = _program(read_only)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    )
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, 2, program, 0, 0)):
        if libc.prctl(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)):
            raise OSError(ctypes.get_errno(), "the kernel refuses a system call filter")
