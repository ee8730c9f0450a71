"""A network on one host: what it should be, what it is, and where these differ.

This says nothing about how it is made (:mod:`orchestrator.switch.bridge`), so that who only asks needs no netlink.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.spec.resolved import ResolvedNetwork


@dataclass(frozen=True)
class Membership:
    """How one host takes part in a network: its own underlay address and those of the others."""

    network: ResolvedNetwork
    local: str
    peers: tuple[str, ...]
    forward: str
    """``no``, ``bridge`` (only what comes from the bridge) or ``all`` (the namespace is ours alone)."""


@dataclass
class NetworkFacts:
    """What is observed of one network on one host; addresses in CIDR notation."""

    name: str
    bridge: str
    mtu: int
    up: bool
    mac: str
    addresses: list[str]
    forwards: bool = False
    vxlan: str | None = None
    vni: int | None = None
    peers: list[str] = field(default_factory=list)
    ports: dict[str, str] = field(default_factory=dict)
    """Tap → ``GUEST/MAC``."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NetworkFacts:
        return cls(**data)


def differences(facts: NetworkFacts, wanted: Membership) -> list[str]:
    """What of ``wanted`` is not so, in words; empty when all is."""
    network = wanted.network
    found = []
    if facts.bridge != network.bridge:
        found.append(f"bridge: {facts.bridge} → {network.bridge}")
    if not facts.up:
        found.append("bridge is down")
    if facts.mtu != network.mtu:
        found.append(f"mtu: {facts.mtu} → {network.mtu}")
    if facts.mac != network.gateway_mac:
        found.append(f"gateway MAC: {facts.mac} → {network.gateway_mac}")
    gateways = sorted(cidr for cidr in (network.gateway4, network.gateway6) if cidr)
    if facts.addresses != gateways:
        found.append(f"gateway: {', '.join(facts.addresses) or 'none'} → {', '.join(gateways) or 'none'}")
    if facts.peers != sorted(wanted.peers):
        found.append(f"peers: {', '.join(facts.peers) or 'none'} → {', '.join(wanted.peers) or 'none'}")
    if facts.forwards != (wanted.forward != "no"):
        found.append(f"routed: {'yes' if facts.forwards else 'no'} → {'no' if wanted.forward == 'no' else 'yes'}")
    if wanted.peers and facts.vni != network.vni:
        found.append(f"VNI: {facts.vni} → {network.vni}")
    return found
