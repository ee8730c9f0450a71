"""Probes of the machine: rights, memory, disk, clock, limits, and what security modules refused."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import os
import re
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator import paths
from orchestrator.doctor.kernel import LIBC
from orchestrator.doctor.model import Finding, bad, good, unknown

MEMORY_WANTED = 1 << 30
DISK_WANTED = 2 << 30
SHM_WANTED = 64 << 20
FILES_WANTED = 4096
FIRST_YEAR = 2025
RECENT_SECONDS = 3600.0
"""Older refusals in the kernel's log are history."""

_CAPABILITIES = {  # numbers of linux/capability.h
    "cap_chown": 0,
    "cap_dac_override": 1,
    "cap_kill": 5,
    "cap_setgid": 6,
    "cap_setuid": 7,
    "cap_net_admin": 12,
    "cap_net_raw": 13,
    "cap_sys_ptrace": 19,
    "cap_sys_admin": 21,
}
_STA_UNSYNC = 0x0040
_TIMEX_STATUS = 40  # offset of struct timex.status where long has 64 bits
_DENIAL = re.compile(r'apparmor="DENIED"|avc:\s+denied')


def rights() -> Finding:
    """Links, namespaces and other users' processes need root or these capabilities."""
    effective = int(_status("/proc/self/status")["CapEff"], 16)
    lacking = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    if not lacking:
        return good(f"runs as {who} with all capabilities that are needed")
    fix = "run with sudo; without these, only hosts of kind ssh can be used"
    return bad(f"runs as {who} without {', '.join(lacking)}", fix)


def memory() -> Finding:
    """Memory that guests can have without swapping."""
    facts = _status("/proc/meminfo")
    available, total = (int(facts[key].split()[0]) << 10 for key in ("MemAvailable", "MemTotal"))
    huge = f"huge pages: {facts.get('HugePages_Free', '0')} free of {facts.get('HugePages_Total', '0')}"
    detail = f"{huge}, {facts.get('Hugepagesize', 'none')} each"
    summary = f"{_size(available)} of {_size(total)} are available"
    if available < MEMORY_WANTED:
        return bad(summary, f"free memory: a lab wants {_size(MEMORY_WANTED)} or more", detail)
    return good(summary, detail)


def disk() -> Finding:
    """Room for images and for the disks of guests, in folders that can be written to."""
    facts, problems = [], []
    for name, folder in (("ORCHESTRATOR_CACHE", paths.cache()), ("ORCHESTRATOR_STATE", paths.state())):
        there = existing(folder)
        room = os.statvfs(there)
        free = room.f_bavail * room.f_frsize
        facts.append(f"{folder}: {_size(free)} free")
        if room.f_flag & os.ST_RDONLY or not os.access(there, os.W_OK):
            problems.append((f"{there} cannot be written to", f"set {name} to another folder"))
        elif free < DISK_WANTED:
            fix = f"make room: {_size(DISK_WANTED)} are wanted; or set {name} to another folder"
            problems.append((f"{folder} has {_size(free)} free", fix))
    if problems:
        summaries, fixes = zip(*problems, strict=True)
        return bad("; ".join(summaries), "; ".join(dict.fromkeys(fixes)), *facts)
    return good("there is room for images and disks", *facts)


def clock() -> Finding:
    """Certificates want the right time, and a clock that does not jump."""
    year = time.gmtime().tm_year
    if year < FIRST_YEAR:
        return bad(f"the clock says it is {year}", "set it: timedatectl set-ntp true, or date -s")
    before = time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    time.sleep(0.2)  # not a wait for something: the span over which the two clocks are compared
    jump = time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_MONOTONIC_RAW) - before
    if abs(jump) > 0.05:
        return bad(f"the clock jumped by {jump:.2f} s within 0.2 s", "let one program only set the clock")
    timex = ctypes.create_string_buffer(256)
    if LIBC.adjtimex(timex) < 0:
        return unknown(f"whether the clock is kept in time cannot be told: {os.strerror(ctypes.get_errno())}")
    if struct.unpack_from("i", timex, _TIMEX_STATUS)[0] & _STA_UNSYNC:
        why = "no program keeps the clock in time, which matters only among several machines"
        return unknown(why, fix="run chrony or systemd-timesyncd")
    return good("the clock is kept in time")


def limits() -> Finding:
    """Files that one process may have open, and the size of /dev/shm."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    facts = [
        f"open files: {_limit(soft)}, at most {_limit(hard)}",
        f"locked memory: {'unlimited' if locked == resource.RLIM_INFINITY else _size(locked)}",
    ]
    problem = None
    if hard != resource.RLIM_INFINITY and hard < FILES_WANTED:
        problem = f"a process may open only {hard} files", f"ulimit -Hn {FILES_WANTED}, or LimitNOFILE= in the unit"
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        facts.append("/dev/shm: missing")
    else:
        size = shm.f_blocks * shm.f_frsize
        facts.append(f"/dev/shm: {_size(size)}")
        if size < SHM_WANTED:
            problem = f"/dev/shm has only {_size(size)}", f"mount -o remount,size={SHM_WANTED} /dev/shm"
    return bad(*problem, *facts) if problem else good("limits are high enough", *facts)


def confinement() -> Finding:
    """What AppArmor or SELinux refused to QEMU or libvirt within the last hour."""
    apparmor = _read("/sys/module/apparmor/parameters/enabled") == "Y"
    selinux = _read("/sys/fs/selinux/enforce") == "1"
    modules = [name for name, on in (("AppArmor", apparmor), ("SELinux, enforcing", selinux)) if on]
    if not modules:
        return good("neither AppArmor nor SELinux confines QEMU")
    active = " and ".join(modules)
    try:
        refused = denials(_kernel_log())
    except OSError as error:
        return unknown(f"{active} is active; the kernel's log cannot be read: {error.strerror}", fix="run as root")
    if refused:
        fix = "aa-complain the profile that is named (AppArmor), or ausearch -m avc | audit2allow (SELinux)"
        return bad(f"{active} refused something to QEMU or libvirt", fix, *refused[-5:])
    return good(f"{active} is active and refused nothing to QEMU or libvirt within the last hour")


def denials(records: Iterator[str]) -> list[str]:
    """Messages about QEMU and libvirt among records of ``/dev/kmsg`` that are not older than an hour."""
    found = []
    oldest = time.clock_gettime(time.CLOCK_MONOTONIC) - RECENT_SECONDS
    for record in records:
        head, _, message = record.partition(";")
        fields = head.split(",")
        recent = len(fields) > 2 and fields[2].isdigit() and int(fields[2]) / 1e6 >= oldest
        if recent and _DENIAL.search(message) and re.search("qemu|virt", message, re.IGNORECASE):
            found.append(message.splitlines()[0])
    return found


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _kernel_log() -> Iterator[str]:
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            try:
                yield os.read(fd, 8192).decode(errors="replace")
            except BrokenPipeError:
                continue  # a record was overwritten before it was read
            except BlockingIOError:
                return
    finally:
        os.close(fd)


def _status(file: str) -> dict[str, str]:
    """``Key: value`` lines of a file under /proc."""
    pairs = (line.partition(":") for line in Path(file).read_text().splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _read(file: str) -> str | None:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return None


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _size(value: int) -> str:
    """Bytes for the eye: one digit after the point."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value >> 10} KiB"
