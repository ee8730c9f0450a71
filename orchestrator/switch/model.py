"""The ``networks`` part of the lab file, and the NICs of a guest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo, field_validator

from orchestrator.spec.base import (
    WHOLE,
    Ipv4,
    Ipv4Net,
    Ipv6,
    Ipv6Net,
    Mac,
    Name,
    Part,
    Pattern,
    room_for_two,
)

MIN_IPV6_MTU = 1280  # RFC 8200, section 5

Mtu = Annotated[int, Field(ge=576, le=65535), WHOLE]
LinkName = Annotated[
    str,
    Pattern(
        r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$",
        "the name of a link: letters, digits, '_', '.' and '-', at most 15 characters",
    ),
]


RATE_PATTERN = r"^\s*([0-9]{1,9})\s*([kMG])(?:bit/s|bps)?\s*$"
LEAST_RATE, MOST_RATE = 64_000, 100_000_000_000
_BITS = {"k": 1000, "M": 1000**2, "G": 1000**3}


def parse_rate(value: Any) -> int:
    """``100M`` → bits per second.

    :raise ValueError: it is not a whole number with a unit of k, M or G (powers of 1000), or out of range.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= LEAST_RATE:
        return value  # already bits per second: a rate that was resolved before
    match = re.match(RATE_PATTERN, value) if isinstance(value, str) else None
    if not match:
        raise ValueError("a rate in bits per second with a unit, such as 64k, 100M or 2G")
    rate = int(match[1]) * _BITS[match[2]]
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise ValueError("a rate from 64k to 100G")
    return rate


def _format_rate(rate: int | None) -> str | None:
    """Bits per second → the shortest exact form that :func:`parse_rate` reads."""
    if rate is None:
        return None
    unit = next(unit for unit in "GMk" if rate % _BITS[unit] == 0)
    return f"{rate // _BITS[unit]}{unit}"


Rate = Annotated[
    int,
    BeforeValidator(parse_rate, json_schema_input_type=Annotated[str, Field(pattern=RATE_PATTERN)]),
    PlainSerializer(_format_rate, return_type=str, when_used="json"),
]
Vlan = Annotated[int, Field(ge=1, le=4094), WHOLE]

PROTOCOLS = {"any": 0, "tcp": 6, "udp": 17, "icmp": 1, "sctp": 132}
WITH_PORTS = ("tcp", "udp", "sctp")
ANYONE, GROUP = "any", "group:"
_PORTS = re.compile(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?")


def parse_ports(value: Any) -> tuple[int, int]:
    """``80`` or ``8000-8100`` → the first and the last.

    :raise ValueError: it is neither.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    match = _PORTS.fullmatch(text) if isinstance(text, str) else None
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise ValueError("a port or a range of ports, such as 80 or 8000-8100")
    return low, high


def prefix_of(party: str) -> IPv4Network | IPv6Network | None:
    """The addresses that a side of a rule names, if that is how it names its own."""
    try:
        return ip_network(party)
    except ValueError:
        return None


Party = Annotated[
    str,
    Pattern(
        r"^(any|group:[a-z][a-z0-9-]{0,31}|[a-z][a-z0-9-]{0,31}|[0-9a-fA-F.:]+(/[0-9]{1,3})?)$",
        "any, the name of a guest, group:NAME, or an address or network such as 10.10.0.0/28",
    ),
]


class RuleSpec(Part):
    """Who may send what to whom; the answers to what is allowed are allowed too."""

    action: Literal["allow", "deny"] = Field(description="what becomes of what matches")
    source: Party = Field("any", description="a guest, group:NAME, an address or network, or any")
    destination: Party = Field("any", description="a guest, group:NAME, an address or network, or any")
    protocol: Literal["any", "tcp", "udp", "icmp", "sctp"] = Field("any", description="icmp: ICMPv6, too")
    ports: str | int | None = Field(None, description="ports of the destination: 80, or 8000-8100")

    @field_validator("ports")
    @classmethod
    def _are_ports(cls, ports: str | int | None, info: ValidationInfo) -> str | int | None:
        if ports is not None:
            parse_ports(ports)
            if info.data.get("protocol", "tcp") not in WITH_PORTS:
                raise ValueError(f"for this protocol: {', '.join(WITH_PORTS)} have ports")
        return ports


class NetworkSpec(Part):
    """One layer-2 network that spans the hosts of the lab."""

    ipv4: Ipv4Net | None = Field(None, description="addresses of the guests, for example 10.10.0.0/24")
    ipv6: Ipv6Net | None = Field(None, description="addresses of the guests, for example fd10::/64")
    mtu: Mtu | None = Field(None, description="default: 1500, or less where the underlay cannot carry that")
    uplink: bool = Field(
        False, description="route between this network and the machine's other networks (never translated)"
    )
    bridge: LinkName | None = Field(None, description="name of the bridge on each host; default: generated")
    datapath: Literal["ebpf", "bridge", "vhost-user"] = Field(
        "ebpf",
        description="what carries the datagrams: the switch in the kernel; that, and a process that copies from "
        "virtqueue to virtqueue; or a Linux bridge that checks nothing",
    )
    multicast: Literal["drop", "flood"] = Field("drop", description="multicast and broadcast of the guests")
    rules: list[RuleSpec] = Field([], description="the first that matches decides; what none matches is allowed")

    _room = field_validator("ipv4", "ipv6")(room_for_two)

    @field_validator("mtu")
    @classmethod
    def _carries_ipv6(cls, mtu: int | None, info: ValidationInfo) -> int | None:
        if mtu is not None and mtu < MIN_IPV6_MTU and info.data.get("ipv6"):
            raise ValueError(f"at least {MIN_IPV6_MTU}, which IPv6 needs")
        return mtu


class NicSpec(Part):
    """One virtual NIC of a guest."""

    network: Name = Field(description="the network it is plugged into")
    ipv4: Ipv4 | None = Field(None, description="assigned if the network has IPv4 and this is absent")
    ipv6: Ipv6 | None = Field(None, description="assigned if the network has IPv6 and this is absent")
    mac: Mac | None = Field(None, description="assigned if absent")
    model: Literal["virtio", "e1000e"] = Field("virtio", description="the device that the guest sees")
    queues: Annotated[int, Field(ge=1, le=8), WHOLE] = Field(
        1, description="pairs of queues; more than one where the datapath is vhost-user"
    )
    group: Name | None = Field(None, description="talks only to NICs of its group, and to those of none")
    isolated: bool = Field(False, description="talks only to NICs that are in no group and not isolated")
    vlan: Vlan | None = Field(None, description="the VLAN of its untagged frames")
    trunk: list[Vlan] = Field([], description="VLANs that it is in by tagged frames")
    rate_out: Rate | None = Field(None, description="bits per second that the guest may send")
    rate_in: Rate | None = Field(None, description="bits per second that the guest may get")
    mirror_to: Name | None = Field(None, description="guest on the same host that gets copies of all frames")
    takes_mirror: bool = Field(False, description="may get copies of what others send and get")

    @field_validator("isolated")
    @classmethod
    def _in_a_group_or_alone(cls, isolated: bool, info: ValidationInfo) -> bool:
        if isolated and info.data.get("group"):
            raise ValueError("for a NIC in a group: that one is bound to its group already")
        return isolated
