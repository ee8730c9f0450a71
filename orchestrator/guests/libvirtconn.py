"""The connection to libvirt, and its events as something that can be waited for."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt

from orchestrator.errors import GuestError, HostError
from orchestrator.patience import Deadline, scaled

log = logging.getLogger(__name__)

STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: "unknown",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_SHUTOFF: "off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
}
OFF_REASONS = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "shut down",
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "stopped",
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "saved",
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "failed",
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: "lost",
}
_LIFECYCLE = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "removed",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shut down",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}


RETURN_SECONDS = 20.0
RETRY_SECONDS = 0.5


class Event(dict[str, Any]):
    """``{"seq", "time", "guest", "event", "detail"}``."""


@contextlib.contextmanager
def libvirt_errors(what: str, hint: str | None = None) -> Iterator[None]:
    """Turn libvirt's errors into ours.

    :raise GuestError: with ``what`` and libvirt's own message.
    """
    try:
        yield
    except libvirt.libvirtError as error:
        raise GuestError(f"{what}: {error.get_error_message()}", hint=hint) from error


def processor_seconds(dom: libvirt.virDomain) -> float:
    """What a guest's QEMU has run since it was started; 0 where it is off."""
    return float(dom.info()[4]) / 1e9


class Libvirt:
    """One connection, an event loop in a thread of its own, and the recent events.

    A daemon that goes away and comes back is connected to again, and its events go on: guests outlive it.

    :param uri: for example ``qemu:///embed?root=DIR``.
    :param name_of: domain's name → guest's name, or None for a domain that is not ours.
    :raise HostError: libvirt cannot be opened.
    """

    def __init__(self, uri: str, name_of: Callable[[libvirt.virDomain], str | None]) -> None:
        libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; printing them too is noise
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._loop, name="libvirt events", daemon=True).start()
        self._name_of = name_of
        self._changed = threading.Condition()
        self._events: collections.deque[Event] = collections.deque(maxlen=2000)
        self._sequence = 0
        self._version = 0  # moves with every event and poke, so that none is missed between a look and a wait
        self._uri = uri
        self._reopening = threading.Lock()
        self._return: Deadline | None = None  # one for all who wait, so that no call waits twice
        try:
            self._conn = self._open()
        except libvirt.libvirtError as error:
            raise HostError(
                f"libvirt cannot be opened at {uri}: {error.get_error_message()}",
                hint="`orchestrator doctor` tells what is missing",
            ) from error

    @property
    def conn(self) -> libvirt.virConnect:
        """The connection. While the daemon is away, waits for its return.

        :raise HostError: it does not come back.
        """
        with self._changed:
            deadline = self._return or Deadline(scaled(RETURN_SECONDS))
            if not self._changed.wait_for(lambda: self.alive, deadline.left):
                raise HostError(
                    f"libvirt at {self._uri} ended and has not come back within {deadline.seconds:.0f} s",
                    hint="start the host's libvirtd; guests run on without it",
                )
            return self._conn

    @property
    def alive(self) -> bool:
        return bool(self._conn.isAlive())

    def _open(self) -> libvirt.virConnect:
        """:raise libvirtError: libvirt does not answer, or ends just now."""
        conn = libvirt.open(self._uri)
        conn.registerCloseCallback(self._on_close, None)
        register = conn.domainEventRegisterAny
        register(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None)
        register(None, libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, self._on_agent, None)
        register(None, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._on_device("device removed"), None)
        register(None, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, self._on_device("device added"), None)
        register(None, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, self._on_device("device kept"), None)
        register(None, libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, self._on_balloon, None)
        register(None, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, lambda _c, dom, _o: self._note(dom, "rebooted", ""), None)
        return conn

    def _on_close(self, _conn: Any, _reason: int, _opaque: Any) -> None:
        threading.Thread(target=self._reopen, name="libvirt returns", daemon=True).start()  # not in the event loop

    def _reopen(self) -> None:
        log.warning("libvirt at %s has gone: waiting for it", self._uri)
        with self._reopening:
            self._return = Deadline(scaled(RETURN_SECONDS))
            while not self.alive:  # the new one may end, too, before it is watched
                try:
                    self._conn = self._open()
                except libvirt.libvirtError:
                    time.sleep(RETRY_SECONDS)  # nothing tells when a daemon listens again
            self._return = None
        self.poke()

    @staticmethod
    def _loop() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    def _note(self, domain: libvirt.virDomain, event: str, detail: str) -> None:
        guest = self._name_of(domain)
        if guest is None:
            return
        with self._changed:
            self._sequence += 1
            self._version += 1
            self._events.append(Event(seq=self._sequence, time=time.time(), guest=guest, event=event, detail=detail))
            self._changed.notify_all()

    def _on_lifecycle(self, _conn: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        name = _LIFECYCLE.get(event, "changed")
        why = {0: "shut down", 1: "destroyed", 2: "crashed", 3: "migrated", 4: "saved", 5: "failed"}
        self._note(domain, name, why.get(detail, "") if name == "stopped" else "")

    def _on_agent(self, _conn: Any, domain: Any, state: int, _reason: int, _opaque: Any) -> None:
        connected = state == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
        self._note(domain, "agent connected" if connected else "agent disconnected", "")

    def _on_device(self, event: str) -> Callable[..., None]:
        return lambda _conn, domain, device, _opaque: self._note(domain, event, device)

    def _on_balloon(self, _conn: Any, domain: Any, actual: int, _opaque: Any) -> None:
        self._note(domain, "memory changed", f"{actual >> 10}M")

    def poke(self) -> None:
        """Make every waiter look at its condition again."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def wait(self, done: Callable[[], bool], deadline: Deadline, every: float = 5.0) -> bool:
        """Wait until ``done()``, looking after each event or poke, and at least each ``every`` seconds in
        case libvirt lost one. False when the deadline passes first."""
        while True:
            seen = self._version
            if done():
                return True
            if deadline.passed:
                return False
            with self._changed:
                self._changed.wait_for(lambda: self._version != seen, min(deadline.left, every))  # noqa: B023

    @property
    def sequence(self) -> int:
        return self._sequence

    def since(self, sequence: int) -> list[Event]:
        with self._changed:
            return [event for event in self._events if event["seq"] > sequence]

    def wait_events(self, sequence: int, timeout: float) -> list[Event]:
        """Events after ``sequence``; waits up to ``timeout`` seconds for the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._sequence > sequence, timeout)
        return self.since(sequence)
