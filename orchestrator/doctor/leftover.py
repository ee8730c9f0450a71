"""What dead labs left behind, and its removal.

Only what carries our mark is ever looked at, and only what is provably dead is a left-over:

* a thing whose lab was made from this very state folder, which does not hold the lab any more;
* a thing of another state folder or machine, if nothing of that lab is alive here: no agent that has its state
  folder, no QEMU, no process in a namespace;
* a runtime folder whose agent is dead, with neither a QEMU nor a namespace: also of a lab that is known.

A lab that is down and keeps its disks is none; a machine of another state folder never is. A state folder that cannot
be read is reported but never removed.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator import names, paths
from orchestrator.doctor.model import Finding, bad, good, unknown
from orchestrator.errors import OrchestratorError
from orchestrator.hosts import agentproc

Kind = Literal["process", "machine", "network", "link", "namespace", "runtime", "state"]

NETNS = Path("/run/netns")
AGENT = "orchestrator.agent"
"""The module that runs as an agent; its arguments ``--lab``, ``--uid`` and ``--state-dir`` say whose it is."""
PROGRAMS = ("qemu-system-", "qemu-kvm")
"""How the names of the other programs begin that run for a lab, with its runtime folder on their command lines."""

_ORDER: tuple[Kind, ...] = ("process", "machine", "network", "link", "namespace", "runtime", "state")


@dataclass(frozen=True)
class Leftover:
    """One thing that a dead lab left behind.

    :param name: ``PID:START`` of a process, where START is the kernel's start time; name of a machine, network, link
        or namespace; path of a folder.
    :param lab: the lab's name, or "" where it cannot be told.
    """

    kind: Kind
    name: str
    lab: str = field(compare=False)
    uid: str
    why: str = field(compare=False)


@dataclass(frozen=True)
class _Thing:
    """Something with our mark, before it is judged.

    :param alive: it shows that somebody uses the lab.
    :param orphaned: it shows that the lab has lost its state folder, wherever that was.
    :param folder: the runtime folder that it uses.
    """

    kind: Kind
    name: str
    lab: str
    uid: str
    alive: bool = False
    orphaned: bool = False
    folder: Path | None = None


class _Labs:
    """The labs that the state folder holds."""

    def __init__(self) -> None:
        self.uids: set[str] = set()
        self.nameless: set[str] = set()  # no uid can be read: on a remote host, lab.json is elsewhere
        self.unreadable: list[Path] = []
        for folder in sorted(_subfolders(paths.state() / "labs")):
            self.uids.add(names.lab_uid(folder.name))
            try:
                self.uids.add(str(json.loads((folder / "lab.json").read_text())["uid"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.nameless.add(folder.name)
                if not (isinstance(error, FileNotFoundError) and (folder / "hosts").is_dir()):
                    self.unreadable.append(folder)

    def hold(self, uid: str, lab: str) -> bool:
        return uid in self.uids or lab in self.nameless or (not lab and bool(self.nameless))


def leftovers() -> list[Leftover]:
    """All left-overs on this host, in the order in which they can be removed.

    Namespaces cannot be looked into without root and are then not listed.
    """
    owners = {folder: owner for folder in _subfolders(paths.runtime()) if (owner := _owner(folder))}
    things = [*_processes(owners), *_machines(), *_links(), *_namespaces(), *_runtime_folders(owners)]
    labs = _Labs()  # after the things: a lab that is just being made has its state folder first
    orphaned = {thing.uid for thing in things if thing.orphaned}
    alive = {thing.uid for thing in things if thing.alive} - orphaned
    labels = {thing.uid: thing.lab for thing in things if thing.lab}
    found = []
    for thing in things:
        lab = thing.lab or labels.get(thing.uid, "")
        why = None
        if labs.hold(thing.uid, lab):
            if thing.kind == "runtime" and not _used(thing, owners, things):
                why = "its agent is dead, and it has neither a QEMU nor a namespace"
        elif thing.uid in orphaned or (lab and thing.uid == names.lab_uid(lab)):
            why = "its lab has no state folder any more"
        elif thing.uid not in alive:
            why = "nothing of its lab runs, and no state folder here knows it"
        if why:
            found.append(Leftover(thing.kind, thing.name, lab, thing.uid, why))
    for folder in labs.unreadable:
        uid = names.lab_uid(folder.name)
        found.append(Leftover("state", str(folder), folder.name, uid, "its lab.json cannot be read"))
    return sorted(found, key=_order)


def clean(items: Collection[Leftover]) -> list[str]:
    """Remove ``items`` under the locks of their labs, each kind after a new look.

    What is no left-over by then, or belongs to a lab that is being changed, is left alone.

    :return: one line for each of them, saying what became of it.
    """
    from orchestrator.state import LabState  # takes longer to import than most probes run

    lines = []
    busy: dict[str, str] = {}
    with contextlib.ExitStack() as locks:
        for lab in sorted({item.lab for item in items if item.lab}):
            try:
                locks.enter_context(LabState(lab).lock())
            except OrchestratorError as error:
                busy[lab] = error.message
        for kind, group in itertools.groupby(sorted(items, key=_order), key=lambda one: one.kind):
            now = leftovers()
            for item in group:
                if kind == "state":
                    fate = "left alone, because it may hold disks; look at it and remove it yourself"
                elif item.lab in busy:
                    fate = f"left alone: {busy[item.lab]}"
                elif item not in now:
                    fate = "left alone, because it is no left-over any more"
                else:
                    fate = _remove(item)
                lines.append(f"{kind} {item.name}: {fate}")
    return lines


def _order(item: Leftover) -> tuple[int, str]:
    return _ORDER.index(item.kind), item.name


def probe() -> Finding:
    """Left-overs as a finding."""
    found = leftovers()
    if found:
        detail = [f"{one.kind} {one.name} (lab {one.lab or 'unknown'}): {one.why}" for one in found]
        fix = "orchestrator doctor --clean; folders under state are yours to look at"
        return bad(f"{len(found)} things were left by dead labs", fix, *detail)
    if os.geteuid() != 0:
        return unknown("no left-overs of this user; namespaces can be seen by root only", fix="run with sudo")
    return good("dead labs left nothing behind")


def _remove(item: Leftover) -> str:
    """``removed``, or why not."""
    from pyroute2 import IPRoute, netns

    try:
        match item.kind:
            case "process":
                pid, _, start = item.name.partition(":")
                agentproc.end_process(int(pid), start, f"a process of lab {item.lab}")
            case "machine" | "network":
                _erase(item)
            case "link":
                with IPRoute() as ip:
                    for index, name, mark in _marked(ip):
                        if (name, mark[0]) == (item.name, item.uid):
                            ip.link("del", index=index)
            case "namespace":
                netns.remove(item.name)
            case "runtime":
                _remove_folder(Path(item.name))
    except (OSError, OrchestratorError) as error:
        return f"cannot be removed: {error}"
    return "removed"


def _erase(item: Leftover) -> None:
    """Remove a machine or a network of libvirt."""
    from orchestrator.hosts import libvirtd, machines, underlay

    with libvirtd.session() as conn:
        if item.kind == "machine":
            for dom, mark in machines.all_marked(conn):
                if (dom.name(), mark[0]) == (item.name, item.uid):
                    machines.erase(dom)
        else:
            for network, mark in underlay.all_marked(conn):
                if (network.name(), mark[0]) == (item.name, item.uid):
                    underlay.erase(network)


def _remove_folder(folder: Path) -> None:
    """:raise OSError: something is mounted in there, which would be emptied too."""
    if inside := [mount for mount in _mounts() if mount.is_relative_to(folder)]:
        raise OSError(f"{inside[0]} is mounted there")
    shutil.rmtree(folder)


def _mounts() -> list[Path]:
    return [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


# -- what carries our mark -------------------------------------------------------------------------------------------


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return []


def _owner(folder: Path) -> agentproc.Owner | None:
    """Whose runtime folder this is; None where its name is not the one that its owner would give it."""
    owner = agentproc.read_owner(folder)
    return owner if owner and names.runtime_dir(owner.uid, owner.host) == folder else None


def _runtime_folders(owners: Mapping[Path, agentproc.Owner]) -> Iterator[_Thing]:
    for folder, owner in owners.items():
        yield _Thing("runtime", str(folder), owner.lab, owner.uid)


def _used(folder: _Thing, owners: Mapping[Path, agentproc.Owner], things: Collection[_Thing]) -> bool:
    """The runtime folder serves an agent, a QEMU or a namespace."""
    owner = owners[Path(folder.name)]
    served = any(thing.kind == "process" and thing.folder == Path(folder.name) for thing in things)
    return served or owner.alive or (NETNS / names.namespace(owner.lab, owner.host)).exists()


def _processes(owners: Mapping[Path, agentproc.Owner]) -> Iterator[_Thing]:
    """Agents, and QEMUs with a runtime folder on their command line."""
    runtime = re.compile(r"(?<![\w.-])" + re.escape(str(paths.runtime())) + r"/[0-9a-f]{8}(?![0-9a-f])")
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(entry.parent.name)
        start = agentproc.start_time(pid)
        try:
            line = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        words = line.split("\0")
        name = f"{pid}:{start}"
        if AGENT in words[:4]:
            options = {key: value for key, is_option, value in (word.partition("=") for word in words) if is_option}
            lab, uid, state = (options.get(key, "") for key in ("--lab", "--uid", "--state-dir"))
            if lab and uid:
                has_state = not state or _sees(pid, state)
                yield _Thing("process", name, lab, uid, alive=has_state, orphaned=not has_state)
        elif Path(words[0]).name.startswith(PROGRAMS):
            for folder in owners.keys() & set(map(Path, runtime.findall(line))):
                owner = owners[folder]
                yield _Thing("process", name, owner.lab, owner.uid, alive=True, folder=folder)


def _machines() -> Iterator[_Thing]:
    """Virtual machines that are hosts, and their networks, if this machine's libvirtd runs."""
    if os.geteuid() != 0:
        return
    from orchestrator.hosts import libvirtd, machines, underlay

    conn = libvirtd.connect()
    if conn is None:
        return
    with contextlib.closing(conn):
        for dom, mark in machines.all_marked(conn):
            uid, _, host = mark
            lab = machines.lab_of(dom.name(), host)
            yield _Thing("machine", dom.name(), lab, uid, alive=True)  # also one that is off: it has disks
        for network, mark in underlay.all_marked(conn):
            yield _Thing("network", network.name(), underlay.lab_of(network.name()), mark[0])


def _sees(pid: int, path: str) -> bool:
    """Whether ``path`` is there for that process, which may live in a container; yes, where that cannot be told."""
    try:
        Path(f"/proc/{pid}/root{path}").stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _namespaces() -> Iterator[_Thing]:
    """Namespaces with our name and, as the alias of ``lo``, our mark."""
    from pyroute2 import NetNS

    entries = sorted(NETNS.glob("orc.*")) if os.geteuid() == 0 else []
    inhabited = set(_inodes(Path("/proc").glob("[0-9]*/ns/net"))) if entries else set()
    for entry in entries:
        try:
            if entry.stat().st_dev == NETNS.stat().st_dev:
                continue  # a file on which nothing is mounted: the machine went down meanwhile
            with NetNS(str(entry), flags=0) as ip:
                mark = names.parse_mark(ip.link("get", index=1)[0].get("ifalias"))
        except (OSError, RuntimeError):
            continue  # it has gone meanwhile
        if mark:
            alive = not inhabited.isdisjoint(_inodes([entry]))
            yield _Thing("namespace", entry.name, entry.name.split(".")[1], mark[0], alive=alive)


def _inodes(files: Iterable[Path]) -> Iterator[int]:
    for file in files:
        with contextlib.suppress(OSError):  # it has gone meanwhile, or belongs to somebody else
            yield file.stat().st_ino


def _links() -> Iterator[_Thing]:
    """Links of this namespace with our mark; the mark of ``lo`` is that of the namespace itself."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        for index, name, mark in _marked(ip):
            if index != 1:
                yield _Thing("link", name, "", mark[0])


def _marked(ip: Any) -> list[tuple[int, str, tuple[str, str, str]]]:
    """Index, name and mark of each link that has one."""
    return [
        (link["index"], str(link.get("ifname")), mark)
        for link in ip.get_links()
        if (mark := names.parse_mark(link.get("ifalias")))
    ]
