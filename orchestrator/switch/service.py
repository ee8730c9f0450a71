"""What the agent of a host does with networks: the calls ``network.*``, ``port.*`` and ``switch.*``.

The datapath is chosen per network: :mod:`orchestrator.switch.dispatcher`, or :mod:`orchestrator.switch.bridge` where
the lab file says so, or where this host cannot have the other one. Each has a function ``ensure``; what is there is
observed and removed by the former, whichever it is.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import NetworkError
from orchestrator.hosts.rpc import Call, Server, Stream, relay
from orchestrator.spec.resolved import ResolvedNic
from orchestrator.switch import bridge, capture, dispatcher, links, stats, trace, vswitch
from orchestrator.switch.membership import Membership
from orchestrator.switch.pcapng import MAX_SNAP
from orchestrator.switch.vswitch import Vswitch

CONNECT_SECONDS = 10
LOST = "senders are not checked, and rules, groups, VLANs, rates and mirrors do nothing"


class NetworkService:
    """The networks of one lab on one host."""

    def __init__(self, uid: str, run_dir: Path, state_dir: Path) -> None:
        self._uid = uid
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._vswitch = Vswitch(run_dir, state_dir)
        self._tracing = threading.Lock()  # there is one place where the program tells its verdict

    def register(self, server: Server) -> None:
        server.register("network.facts", self.facts)
        server.register("network.ensure", self.ensure)
        server.register("network.remove", self.remove)
        server.register("port.ensure", self.ensure_ports)
        server.register("port.remove", self.remove_ports)
        server.register("switch.stats", self.stats)
        server.register("switch.trace", self.trace)
        server.register_stream("network.connect", self.connect)
        server.register_stream("switch.capture", self.capture)

    def facts(self, call: Call) -> list[dict[str, Any]]:
        found = dispatcher.observe(self._uid)
        for facts in found:
            if self._vswitch.serves(facts.name):
                facts.datapath = "vhost-user"
        return [facts.to_json() for facts in found]

    def resume(self) -> None:
        """Take over what an agent before this one has left."""
        self._vswitch.resume()

    def ensure(self, call: Call, **membership: Any) -> str | None:
        """What the user has to know of how the network was made, if anything."""
        with self._lock:
            return self._ensure(Membership.from_json(membership))

    def _ensure(self, wanted: Membership) -> str | None:
        network, said = wanted.network, None
        if network.datapath == "bridge":
            made = bridge.ensure(self._uid, wanted)
        elif lacks := dispatcher.unavailable():
            made = bridge.ensure(self._uid, wanted)
            said = f"networks are bridged, as the switch cannot be had: {lacks}; {LOST}"
        else:
            made = dispatcher.ensure(self._uid, wanted)
        served = network.datapath == "vhost-user"
        ports = vswitch.ports_of(wanted, self._run_dir, made.gateway, made.taps) if served else []
        self._vswitch.serve(network.name, ports)
        return said

    def remove(self, call: Call, name: str) -> None:
        with self._lock:
            self._vswitch.serve(name, [])
            dispatcher.remove(self._uid, name)

    def ensure_ports(
        self, call: Call, guest: str, nics: list[dict[str, Any]], networks: list[dict[str, Any]]
    ) -> None:
        """:param networks: of the NICs, as for :meth:`ensure`."""
        with self._lock:
            with links.netlink(f"taps of guest {guest}") as ip:
                for data in nics:
                    links.ensure_tap(ip, self._uid, guest, ResolvedNic.model_validate(data))
            for membership in networks:
                self._ensure(Membership.from_json(membership))

    def remove_ports(self, call: Call, guest: str, taps: list[str]) -> None:
        with self._lock:
            self._vswitch.drop(taps)
            for tap in taps:
                dispatcher.remove_port(self._uid, guest, tap)

    def connect(self, open_stream: Callable[[], Stream], addresses: list[str], port: int) -> None:
        """Carry bytes to a TCP port of a guest, from this host's own place on the guest's network."""
        failure: OSError | None = None
        for address in addresses:
            try:
                target = socket.create_connection((address, port), CONNECT_SECONDS)
            except OSError as error:
                failure = error
                continue
            target.settimeout(None)
            with contextlib.closing(target):
                relay(open_stream(), target)
            return
        raise NetworkError(f"port {port} of {', '.join(addresses) or 'a guest without address'}: {failure}")

    # -- looking -------------------------------------------------------------------------------------------------

    def stats(self, call: Call, names: dict[str, str], pairs: bool = False) -> dict[str, Any]:
        """:param names: MAC → guest, of all guests of the lab."""
        found = stats.read(self._uid, names, with_pairs=pairs)
        return stats.with_copied(found, self._vswitch.stats()).to_json()

    def trace(self, call: Call, network: str, tap: str | None, frame: str, names: dict[str, str]) -> dict[str, Any]:
        """As :func:`trace.run <orchestrator.switch.trace.run>`, with the frame in hexadecimal."""
        with self._tracing:
            return trace.run(self._uid, network, tap, bytes.fromhex(frame), names).to_json()

    def capture(
        self,
        open_stream: Callable[[], Stream],
        guest: str,
        tap: str,
        snap: int = MAX_SNAP,
        count: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Frames at a tap as pcapng, until the client says something or goes away, or a limit is reached."""
        capture.serve(self._uid, open_stream, guest, tap, snap, count=count, seconds=seconds)
