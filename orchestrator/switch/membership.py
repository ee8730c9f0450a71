"""A network on one host: what it should be, what it is, and where these differ.

This says nothing about how it is made (:mod:`orchestrator.switch.bridge`), so that who only asks needs no netlink.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.spec.resolved import ResolvedNetwork, ResolvedNic
from orchestrator.switch import rules


@dataclass(frozen=True)
class Listed:
    """A NIC on the list of its network: what the switch of every host knows of it.

    :param at: underlay address of the host that it is on.
    """

    guest: str
    at: str
    nic: ResolvedNic

    def describe(self, local: str, taps: Container[str]) -> str:
        """The line that the host with the underlay address ``local`` and these ``taps`` should have of it."""
        nic, here = self.nic, self.at == local
        return describe(
            at=None if here else self.at,
            addresses=nic.addresses,
            vlan=nic.vlan,
            trunk=nic.trunk,
            group=rules.group_id(nic.group),
            isolated=nic.isolated,
            rates=(nic.rate_out // 8, nic.rate_in // 8) if here else (0, 0),
            mirror=nic.mirror if here and nic.mirror and nic.mirror in taps else None,
        )

    def to_json(self) -> dict[str, Any]:
        return {"guest": self.guest, "at": self.at, "nic": self.nic.model_dump(mode="json")}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Listed:
        return cls(data["guest"], data["at"], ResolvedNic.model_validate(data["nic"]))


def describe(
    *,
    at: str | None,
    addresses: Iterable[str],
    vlan: int,
    trunk: Iterable[int],
    group: int,
    isolated: bool,
    rates: tuple[int, int],
    mirror: str | None,
) -> str:
    """What a switch knows of a NIC, as one line.

    :param at: underlay address of the host that it is on; None: this one.
    :param rates: bytes per second from and to the guest; 0: no limit.
    """
    words = [f"at {at}" if at else "here", *addresses]
    words += [f"vlan {vlan}"] if vlan else []
    words += [f"trunk {','.join(map(str, sorted(trunk)))}"] if trunk else []
    words += [f"group {group:08x}"] if group else []
    words += ["isolated"] if isolated else []
    words += [f"{word} {rate} B/s" for word, rate in zip(("out", "in"), rates, strict=True) if rate]
    words += [f"mirror {mirror}"] if mirror else []
    return " ".join(words)


@dataclass(frozen=True)
class Membership:
    """How one host takes part in a network: its own underlay address and those of the others, and the list of the
    network's NICs."""

    network: ResolvedNetwork
    local: str
    peers: tuple[str, ...]
    forward: str
    """``no``, ``bridge`` (only what comes from the bridge) or ``all`` (the namespace is ours alone)."""
    listed: tuple[Listed, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The parameters of ``network.ensure``."""
        return {
            "network": self.network.model_dump(mode="json"),
            "local": self.local,
            "peers": list(self.peers),
            "forward": self.forward,
            "listed": [listed.to_json() for listed in self.listed],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Membership:
        return cls(
            network=ResolvedNetwork.model_validate(data["network"]),
            local=data["local"],
            peers=tuple(data["peers"]),
            forward=data["forward"],
            listed=tuple(map(Listed.from_json, data["listed"])),
        )


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
    datapath: str = "bridge"
    lacks: str | None = None
    """Why the network is bridged although it should not be."""
    listed: dict[str, str] = field(default_factory=dict)
    """MAC → :func:`describe`, as the switch has it."""
    rules: str = ""
    """What tells the rules in force from others."""
    multicast: str = "flood"

    def where(self, mac: str) -> str | None:
        """Underlay address of the host that the switch here takes a NIC to be on: "" for this one, None: unknown."""
        match self.listed.get(mac, "").split():
            case ["here", *_]:
                return ""
            case ["at", address, *_]:
                return address
        return None

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
    if facts.datapath != network.datapath and not facts.lacks:
        found.append(f"datapath: {facts.datapath} → {network.datapath}")
    elif facts.datapath != "bridge":
        found += _differences_of_switch(facts, wanted)
    return found


def _differences_of_switch(facts: NetworkFacts, wanted: Membership) -> list[str]:
    network, found = wanted.network, []
    if facts.multicast != network.multicast:
        found.append(f"multicast: {facts.multicast} → {network.multicast}")
    if facts.rules != rules.digest(rules.packed(network.rules)):
        found.append("rules")
    listed = {each.nic.mac: each for each in wanted.listed}
    for mac, each in listed.items():
        line, seen = each.describe(wanted.local, facts.ports), facts.listed.get(mac)
        awaited = each.at == wanted.local and each.nic.tap not in facts.ports  # its tap is made with its guest
        if seen != line and not (awaited and seen is None):
            found.append(f"list: {each.guest} {f'{seen} → ' if seen else ''}{line}")
    plugged = {port.rpartition("/")[2] for port in facts.ports.values()}  # these leave the list with their taps
    found += [f"list: {mac} {line} → nobody" for mac, line in facts.listed.items() if mac not in {*listed, *plugged}]
    return found
