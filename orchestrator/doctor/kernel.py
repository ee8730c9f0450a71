"""Probes of what the kernel can do: shared memory, page faults in user space, BPF.

The layouts and numbers are those of ``linux/userfaultfd.h`` and ``linux/bpf.h``.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from orchestrator.doctor.model import Finding, bad, good, unknown

LIBC = ctypes.CDLL(None, use_errno=True)
FAULT_SECONDS = 5.0

_SYSCALLS = {"x86_64": {"bpf": 321, "userfaultfd": 323}, "aarch64": {"bpf": 280, "userfaultfd": 282}}
_PAGE = mmap.PAGESIZE

_UFFD_NEW, _UFFD_API, _UFFD_REGISTER = 0xAA00, 0xC018AA3F, 0xC020AA00
_UFFD_COPY, _UFFD_PROTECT = 0xC028AA03, 0xC018AA06
_UFFD_DEVICE = Path("/dev/userfaultfd")
_UFFD_EVENT_PAGEFAULT = 0x12
_UFFD_FAULT_PROTECTED = 2
_UFFD_MISSING_AND_PROTECTED = 3
_UFFD_COPY_PROTECTED = 2
_UFFD_FEATURES = [  # in the order of their bits
    "pagefault-flag-wp",
    "event-fork",
    "event-remap",
    "event-remove",
    "missing-hugetlbfs",
    "missing-shmem",
    "event-unmap",
    "sigbus",
    "thread-id",
    "minor-hugetlbfs",
    "minor-shmem",
    "exact-address",
    "wp-hugetlbfs-shmem",
    "wp-unpopulated",
    "poison",
    "wp-async",
    "move",
]
_UFFD_NEEDED = {"pagefault-flag-wp", "event-remove", "missing-shmem", "thread-id", "wp-hugetlbfs-shmem"}

_BPF_PROG_LOAD, _BPF_PROG_TEST_RUN = 5, 10
_BPF_SCHED_CLS = 3
_BPF_RETURN_7 = bytes.fromhex("b700000007000000 9500000000000000")  # r0 = 7; exit


def syscall(name: str, *args: int | ctypes.c_void_p | ctypes.Array[ctypes.c_char]) -> int:
    """:raise OSError: the kernel refuses, or the number is not known on this architecture (ENOSYS)."""
    number = _SYSCALLS.get(os.uname().machine, {}).get(name)
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of {name} on {os.uname().machine} is not known")
    result = int(LIBC.syscall(number, *args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def memfd() -> Finding:
    """Guests' memory is a sealed memfd that several processes map."""
    try:
        fd = os.memfd_create("orchestrator-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return bad(f"no memfd can be made: {error.strerror}", "use a kernel with CONFIG_MEMFD_CREATE=y")
    try:
        os.ftruncate(fd, _PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with mmap.mmap(fd, _PAGE) as one, mmap.mmap(fd, _PAGE) as two:
            one[0] = 0x5A
            if two[0] != 0x5A:
                return bad("two mappings of one memfd differ", "use another kernel: this one is broken")
        try:
            os.ftruncate(fd, 0)
        except PermissionError:
            return good("a memfd can be made, sealed and shared")
        return bad("a sealed memfd can be truncated", "use another kernel: this one is broken")
    finally:
        os.close(fd)


def userfaultfd() -> Finding:
    """Remote memory: a missing page of a shared mapping is filled in, and a write to a protected one is caught."""
    try:
        fd = _open_userfaultfd()
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return bad("the kernel has no userfaultfd", "use a kernel with CONFIG_USERFAULTFD=y")
        fix = "run as root, or: sysctl vm.unprivileged_userfaultfd=1"
        return bad(f"userfaultfd is refused: {error.strerror}", fix)
    with os.fdopen(fd, "rb"):
        have = _handshake(fd, 0)
    named = [name for bit, name in enumerate(_UFFD_FEATURES) if have >> bit & 1]
    detail = f"features {have:#x}: {' '.join(named)}"
    if lacking := sorted(_UFFD_NEEDED - set(named)):
        return bad(f"userfaultfd lacks {', '.join(lacking)}", "use Linux 5.19 or newer", detail)
    fd = _open_userfaultfd()
    with os.fdopen(fd, "rb"):
        _handshake(fd, sum(1 << bit for bit, name in enumerate(_UFFD_FEATURES) if name in _UFFD_NEEDED))
        problem = _take_two_faults(fd)
    if problem:
        return bad(problem, "use another kernel: remote memory does not work on this one", detail)
    return good("a missing page was served and a write to a protected page was caught", detail)


def _open_userfaultfd() -> int:
    """One that also takes the kernel's own faults, such as KVM's, hence without ``UFFD_USER_MODE_ONLY``."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return syscall("userfaultfd", flags)
    except PermissionError:
        if not _UFFD_DEVICE.exists():
            raise
        with open(_UFFD_DEVICE, "rb") as device:
            return fcntl.ioctl(device, _UFFD_NEW, flags)


def _handshake(fd: int, features: int) -> int:
    """Agree on the API; the mask of all features that the kernel has."""
    api = bytearray(struct.pack("=QQQ", 0xAA, features, 0))
    fcntl.ioctl(fd, _UFFD_API, api)
    return int(struct.unpack("=QQQ", api)[1])


def _take_two_faults(fd: int) -> str | None:
    """Serve a missing page, then catch a write to it; what went wrong, or None."""
    memory = os.memfd_create("orchestrator-doctor", os.MFD_CLOEXEC)
    os.ftruncate(memory, _PAGE)
    mapping = mmap.mmap(memory, _PAGE)
    os.close(memory)
    first = ctypes.c_char.from_buffer(mapping)  # kept alive: the mapping cannot go while a fault is held
    address = ctypes.addressof(first)
    source = ctypes.create_string_buffer(b"\x5a" * _PAGE, _PAGE)
    seen = ctypes.create_string_buffer(1)
    here = ctypes.c_void_p(address)

    def serve() -> None:
        copy = struct.pack("=QQQQq", address, ctypes.addressof(source), _PAGE, _UFFD_COPY_PROTECTED, 0)
        fcntl.ioctl(fd, _UFFD_COPY, bytearray(copy))

    def permit() -> None:
        fcntl.ioctl(fd, _UFFD_PROTECT, bytearray(struct.pack("=QQQ", address, _PAGE, 0)))

    fcntl.ioctl(fd, _UFFD_REGISTER, bytearray(struct.pack("=QQQQ", address, _PAGE, _UFFD_MISSING_AND_PROTECTED, 0)))
    if problem := _fault(fd, lambda: LIBC.memcpy(seen, here, 1), serve, 0, "a missing page"):
        return problem
    if seen.raw != b"\x5a":
        return "a page that was filled in reads as something else"
    return _fault(fd, lambda: LIBC.memset(here, 1, 1), permit, _UFFD_FAULT_PROTECTED, "a write to a protected page")


def _fault(fd: int, touch: Callable[[], object], resolve: Callable[[], None], flag: int, what: str) -> str | None:
    """Let a thread run into a fault, resolve it, and see the thread go on. A foreign call does not hold the GIL."""
    toucher = threading.Thread(target=touch, daemon=True)
    toucher.start()
    if not select.select([fd], [], [], FAULT_SECONDS)[0]:
        return f"{what} makes no event"
    event, flags = struct.unpack_from("=B7xQ", os.read(fd, 32))
    if event != _UFFD_EVENT_PAGEFAULT or flags & _UFFD_FAULT_PROTECTED != flag:
        return f"{what} makes event {event:#x} with flags {flags:#x}"
    resolve()
    toucher.join(FAULT_SECONDS)
    return f"{what} is not resumed" if toucher.is_alive() else None


def bpf() -> Finding:
    """The IP switch is a BPF classifier: load one of two instructions and run it on a packet."""
    btf = "there" if Path("/sys/kernel/btf/vmlinux").exists() else "missing"
    detail = f"kernel type information (BTF): {btf}"
    code = ctypes.create_string_buffer(_BPF_RETURN_7)
    license_name = ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(code), ctypes.addressof(license_name)
    program = struct.pack("=IIQQ", _BPF_SCHED_CLS, len(_BPF_RETURN_7) // 8, *addresses).ljust(64, b"\0")
    try:
        fd = _bpf(_BPF_PROG_LOAD, program)[0]
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return unknown(f"BPF cannot be tried: {error.strerror}")
        fix = "run as root; in a container also give it CAP_BPF and CAP_NET_ADMIN; check kernel lockdown"
        return bad(f"no BPF program can be loaded: {error.strerror}", fix, detail)
    with os.fdopen(fd, "rb"):
        packet = ctypes.create_string_buffer(64)
        test = struct.pack("=IIIIQQII", fd, 0, len(packet), 0, ctypes.addressof(packet), 0, 1, 0)
        returned = struct.unpack_from("=II", _bpf(_BPF_PROG_TEST_RUN, test)[1])[1]
    if returned != 7:
        return bad(f"a BPF program gave {returned} and not 7", "use another kernel: this one is broken", detail)
    return good("a BPF classifier was loaded and run", detail)


def _bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """The result and what the kernel made of ``attributes``."""
    union = ctypes.create_string_buffer(attributes, len(attributes))
    return syscall("bpf", command, union, len(attributes)), union.raw
