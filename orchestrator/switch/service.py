"""What the agent of a host does with networks: the calls ``network.*`` and ``port.*``.

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
from typing import Any

from orchestrator.errors import NetworkError
from orchestrator.hosts.rpc import Call, Server, Stream, relay
from orchestrator.spec.resolved import ResolvedNic
from orchestrator.switch import bridge, dispatcher, links
from orchestrator.switch.membership import Membership

CONNECT_SECONDS = 10
LOST = "senders are not checked, and rules, groups, VLANs, rates and mirrors do nothing"


class NetworkService:
    """The networks of one lab on one host."""

    def __init__(self, uid: str) -> None:
        self._uid = uid
        self._lock = threading.Lock()

    def register(self, server: Server) -> None:
        server.register("network.facts", self.facts)
        server.register("network.ensure", self.ensure)
        server.register("network.remove", self.remove)
        server.register("port.ensure", self.ensure_ports)
        server.register("port.remove", self.remove_ports)
        server.register_stream("network.connect", self.connect)

    def facts(self, call: Call) -> list[dict[str, Any]]:
        return [facts.to_json() for facts in dispatcher.observe(self._uid)]

    def ensure(self, call: Call, **membership: Any) -> str | None:
        """What the user has to know of how the network was made, if anything."""
        with self._lock:
            return self._ensure(Membership.from_json(membership))

    def _ensure(self, wanted: Membership) -> str | None:
        if wanted.network.datapath == "bridge":
            bridge.ensure(self._uid, wanted)
        elif lacks := dispatcher.unavailable():
            bridge.ensure(self._uid, wanted)
            return f"networks are bridged, as the switch cannot be had: {lacks}; {LOST}"
        else:
            dispatcher.ensure(self._uid, wanted)
        return None

    def remove(self, call: Call, name: str) -> None:
        with self._lock:
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
