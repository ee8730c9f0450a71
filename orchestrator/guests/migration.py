"""Live migration: a guest goes to another host as it runs, with its memory and its disks.

The command line conducts it. The source's libvirt drives it (a *peer to peer* migration), but its connection to the
target's libvirt is carried by the agents' streams: the hosts need no credentials for each other, and no libvirt
listens on a network. Memory and disks go directly from QEMU to QEMU, over the underlay.

======================  =========  ==================================================================================
call or stream          of host    what it does
======================  =========  ==================================================================================
``migration.able``      any        whether its libvirt can send and receive guests
``migration.describe``  source     tells what the target must know
``migration.receive``   target     stream: makes the files, answers with the guest's XML as it is there; then carries
                                   libvirt's bytes. Its end takes back what has not arrived
``migration.link``      source     stream: the other end of it, for the source's libvirt
``migration.send``      source     migrates; ends when the guest is the target's
``migration.arrive``    target     lets the guest go on
``migration.clear``     source     removes what is left there
``migration.keeps``     source     whether the guest is still the source's, when something failed
``migration.discard``   target     removes a copy that is not wanted
======================  =========  ==================================================================================

*Whose is the guest?* The source's, until its libvirt has read the target's answer to the protocol's last step,
*finish*; the target's from then on. Left to itself libvirt would start the guest on the target within *finish*, and
again on the source should that answer get lost. So the target's copy stays paused (``VIR_MIGRATE_PAUSED``) until
``migration.arrive``: whatever is killed at whatever moment, no two copies run, and one of them is whole. Until then
the target's files carry a mark with the source's name. A later command finds the mark, looks at the source, and
either lets the guest go on (it is not there any more) or discards the copy (it is).
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.guests.domain import GuestImage
from orchestrator.hosts.rpc import Client, Progress, Stream, relay


@dataclass(frozen=True)
class End:
    """One of the two hosts: a connection to its agent, and a way to get more of them for streams."""

    agent: Client
    connect: Callable[[], Client]

    @property
    def host(self) -> str:
        return self.agent.peer


@dataclass(frozen=True)
class Wanted:
    """What is to be done.

    :ivar address: the target's address on the underlay.
    :ivar image: the guest's image as files of the target.
    :ivar bandwidth: MiB/s at most; 0 for no limit.
    :ivar lose: snapshots of the guest that may be lost; they cannot go along.
    """

    guest: str
    address: str
    image: GuestImage
    bandwidth: int = 0
    lose: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """How it went.

    :ivar downtime_seconds: how long the guest's processors stood still.
    :ivar memory_bytes: what was sent of its memory, in ``passes`` passes over it.
    """

    guest: str
    source: str
    target: str
    seconds: float
    downtime_seconds: float
    memory_bytes: int
    disk_bytes: int
    passes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def migrate(wanted: Wanted, source: End, target: End, progress: Progress, cancel: threading.Event) -> Report:
    """Move a running guest.

    :param cancel: given up when it is set, as long as the guest is the source's.
    :raise OrchestratorError: it did not work. The guest goes on where it was, unless the message says otherwise.
    """
    began, guest = time.monotonic(), {"guest": wanted.guest}
    progress("preparing")
    described = source.agent.call("migration.describe", {**guest, "lose": list(wanted.lose)})
    receive = {"source": source.host, "described": described, "image": asdict(wanted.image)}
    try:
        with _linked(source, target, wanted.guest, receive) as (link, there):
            limits = {"address": wanted.address, "bandwidth": wanted.bandwidth}
            params = {**guest, "link": link, "described": there, **limits}
            sent = source.agent.call("migration.send", params, progress=progress, cancel=cancel)
            handed_over = time.monotonic()  # no way back from here
            progress("switching over")
            params = {**guest, "resume": described["running"], "log": sent["log"]}
            arrived = target.agent.call("migration.arrive", params)
            downtime = sent["stopped"] + time.monotonic() - handed_over - arrived["running"]
        with contextlib.suppress(OrchestratorError):  # the guest is there; what it left is swept up later
            source.agent.call("migration.clear", guest)
    except OrchestratorError:
        _take_back(guest, source, target)
        raise
    return Report(
        guest=wanted.guest,
        source=source.host,
        target=target.host,
        seconds=round(time.monotonic() - began, 3),
        downtime_seconds=round(downtime, 3) if described["running"] else 0.0,
        memory_bytes=arrived["memory"],
        disk_bytes=sent["disk"],
        passes=arrived["passes"],
    )


def _take_back(guest: dict[str, str], source: End, target: End) -> None:
    """Remove the target's copy if the guest is certainly still the source's. Where that cannot be told now, the next
    command that looks at both hosts decides."""
    with contextlib.suppress(OrchestratorError):
        if source.agent.call("migration.keeps", guest):
            target.agent.call("migration.discard", guest)


@contextlib.contextmanager
def _linked(source: End, target: End, guest: str, receive: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A connection from the source's libvirt to the target's: the name of the link on the source, and the guest as it
    is described there."""
    there, right = _open(target, "migration.receive", {"guest": guest, **receive})
    streams = [right]
    carrier: threading.Thread | None = None
    try:
        link, left = _open(source, "migration.link", {"guest": guest})
        streams.append(left)
        carrier = threading.Thread(target=_carry, args=(left, right), name=f"migration of {guest}", daemon=True)
        carrier.start()
        yield link, there
    finally:
        for stream in streams:
            _hang_up(stream)
        if carrier:
            carrier.join()
        for stream in streams:
            stream.close()


def _open(end: End, method: str, params: dict[str, Any]) -> tuple[Any, Stream]:
    connection = end.connect()
    try:
        return connection.open(method, params)
    except BaseException:
        connection.close()
        raise


def _carry(left: Stream, right: Stream) -> None:
    with contextlib.suppress(OSError):
        relay(left, right)
    for stream in (left, right):
        _hang_up(stream)


def _hang_up(stream: Stream) -> None:
    """End both directions, and leave its descriptor to whoever still waits for it."""
    with contextlib.suppress(OSError):
        if isinstance(stream, socket.socket):
            stream.shutdown(socket.SHUT_RDWR)
        else:
            stream.close()  # of an SSH channel this wakes readers, and no more
