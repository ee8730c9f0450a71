"""What the agent of a host does with networks: the calls ``network.*`` and ``port.*``.

The datapath is chosen per network. There is one so far, :mod:`orchestrator.switch.bridge`; another one has the same
five functions: ``observe``, ``ensure``, ``remove``, ``ensure_port``, ``remove_port``.
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
from orchestrator.spec.resolved import ResolvedNetwork, ResolvedNic
from orchestrator.switch import bridge
from orchestrator.switch.membership import Membership

CONNECT_SECONDS = 10


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
        return [facts.to_json() for facts in bridge.observe(self._uid)]

    def ensure(self, call: Call, network: dict[str, Any], local: str, peers: list[str], forward: str) -> None:
        wanted = Membership(ResolvedNetwork.model_validate(network), local, tuple(peers), forward)
        with self._lock:
            bridge.ensure(self._uid, wanted)

    def remove(self, call: Call, name: str) -> None:
        with self._lock:
            bridge.remove(self._uid, name)

    def ensure_ports(self, call: Call, guest: str, nics: list[dict[str, Any]], bridges: dict[str, str]) -> None:
        """:param bridges: network → name of its bridge here."""
        with self._lock:
            for data in nics:
                nic = ResolvedNic.model_validate(data)
                bridge.ensure_port(self._uid, guest, nic, bridges[nic.network])

    def remove_ports(self, call: Call, guest: str, taps: list[str]) -> None:
        with self._lock:
            for tap in taps:
                bridge.remove_port(self._uid, guest, tap)

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
