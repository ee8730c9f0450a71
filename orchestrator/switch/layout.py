"""Keys and values of the dispatcher's maps: what ``bpf/layout.h`` says, in Python.

A test (``tests/unit/test_switch_layout.py``) compares both. Addresses are 16 bytes, IPv4 ones as ``::ffff:a.b.c.d``.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import ClassVar, Self

LAYOUT = 2
TRACE_MARK = 0x6F726374
NOWHERE = bytes(16)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Flag(IntFlag):
    LOCAL = 1
    REMOTE = 2
    HOST = 4
    ISOLATED = 8
    TRUNK = 16
    LIMITED = 32
    UPLINK = 64
    FLOOD = 128
    RULES = 256


class Fate(IntEnum):
    NONE = 0
    DROP = 1
    GUEST = 2
    UNDERLAY = 3
    HOST = 4
    UPLINK = 5
    ANSWER = 6
    PASS = 7
    FLOOD = 8


class Kind(IntEnum):
    GATEWAY = 1
    VXLAN = 2
    PHYSICAL = 3


class Side(IntEnum):
    ANYONE = 0
    PREFIX = 1
    NIC = 2
    GROUP = 3


FROM_GUEST, TO_GUEST = 0, 1

REASONS = {
    "source_mac": "the frame's source MAC is not the NIC's",
    "source_ipv4": "the source IPv4 address is not the NIC's",
    "source_ipv6": "the source IPv6 address is not the NIC's",
    "link_local": "the link-local source address is not the one of the NIC's MAC",
    "arp": "ARP that speaks for somebody else, or tells what nobody asked",
    "nd": "neighbour discovery that speaks for somebody else, or tells what nobody asked",
    "router": "a router advertisement or redirect",
    "ethertype": "neither IP nor ARP",
    "malformed": "headers that contradict themselves or the frame's length",
    "too_big": "larger than the network's MTU",
    "vlan": "a VLAN tag that the NIC may not use, or a destination in another VLAN",
    "multicast": "multicast or broadcast, which the network does not carry",
    "no_destination": "the destination is on no list and no uplink leads to it",
    "isolated": "sender and receiver may not talk to each other",
    "rule": "a rule denies it",
    "fragment": "a fragment whose first one was not let pass",
    "rate": "above the rate of sender or receiver",
    "underlay": "from another host, of a sender that is not on the list",
    "no_port": "the link is not known as a port",
}
"""Why a frame is dropped: the names in the order of ``enum reason``, and what they mean."""


def packed(address: str | Address | None) -> bytes:
    """An address as 16 bytes; none as ``::``."""
    if address is None:
        return NOWHERE
    known = ip_address(address) if isinstance(address, str) else address
    return known.packed if known.version == 6 else bytes(10) + b"\xff\xff" + known.packed


def unpacked(raw: bytes) -> Address:
    address = IPv6Address(raw)
    return address.ipv4_mapped or address


def packed_mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_of(raw: bytes) -> str:
    return raw.hex(":")


def link_local(mac: str) -> IPv6Address:
    """The link-local address of the modified EUI-64 of a MAC (RFC 4291, appendix A)."""
    raw = packed_mac(mac)
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])


def index(number: int) -> bytes:
    """A link's index as a key."""
    return number.to_bytes(4, "little")


class _Packed:
    """A struct; its fields are those of the dataclass, in order."""

    FORMAT: ClassVar[struct.Struct]

    def pack(self) -> bytes:
        return self.FORMAT.pack(*vars(self).values())

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(raw))


@dataclass(frozen=True)
class Nic(_Packed):
    """What the guest behind a tap may send. ``ip4`` has 4 bytes, ``mac`` 6, the others 16."""

    FORMAT = struct.Struct("<IIII4sH6sI16s16s")
    net: int
    flags: int
    group: int
    mirror: int
    ip4: bytes
    vlan: int
    mac: bytes
    slot: int
    ip6: bytes
    link_local: bytes


@dataclass(frozen=True)
class Where(_Packed):
    FORMAT = struct.Struct("<16sI4x")
    address: bytes
    net: int


@dataclass(frozen=True)
class Place(_Packed):
    FORMAT = struct.Struct("<IIIIIIH6s")
    net: int
    ifindex: int
    flags: int
    group: int
    mirror: int
    slot: int
    vlan: int
    mac: bytes


@dataclass(frozen=True)
class NetworkEntry(_Packed):
    FORMAT = struct.Struct("<IIIIII4s4s16s16s6sH")
    flags: int
    vxlan: int
    mtu: int
    generation: int
    first_rule: int
    rules: int
    net4: bytes
    mask4: bytes
    net6: bytes
    mask6: bytes
    gateway: bytes
    slot: int


@dataclass(frozen=True)
class Attachment(_Packed):
    FORMAT = struct.Struct("<III")
    kind: int
    net: int
    slot: int


@dataclass(frozen=True)
class Owner(_Packed):
    FORMAT = struct.Struct("<I6s2x")
    net: int
    mac: bytes


@dataclass(frozen=True)
class Addresses(_Packed):
    FORMAT = struct.Struct("<16s16s4s4x")
    ip6: bytes
    link_local: bytes
    ip4: bytes


@dataclass(frozen=True)
class Counters(_Packed):
    """Sums since the port was made; ``last_seen`` in nanoseconds since boot."""

    FORMAT = struct.Struct(f"<6Q{8 * len(REASONS)}s")
    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int
    answered: int
    last_seen: int
    reasons: bytes

    @property
    def dropped(self) -> dict[str, int]:
        return dict(zip(REASONS, struct.unpack(f"<{len(REASONS)}Q", self.reasons), strict=True))


@dataclass(frozen=True)
class Pair(_Packed):
    FORMAT = struct.Struct("<6s6s")
    sender: bytes
    receiver: bytes


@dataclass(frozen=True)
class Traffic(_Packed):
    FORMAT = struct.Struct("<QQQ")
    packets: int
    bytes: int
    last_seen: int


@dataclass(frozen=True)
class Member(_Packed):
    FORMAT = struct.Struct("<6sH")
    mac: bytes
    vlan: int


@dataclass(frozen=True)
class Limited(_Packed):
    FORMAT = struct.Struct("<II")
    ifindex: int
    direction: int


@dataclass(frozen=True)
class Bucket(_Packed):
    """``rate`` in bytes per second, ``burst`` and ``tokens`` in bytes."""

    FORMAT = struct.Struct("<QQQQII")
    rate: int
    burst: int
    tokens: int
    filled: int = 0
    lock: int = 0
    unused: int = 0


@dataclass(frozen=True)
class Party(_Packed):
    FORMAT = struct.Struct("<II16s16s6s2x")
    side: int = Side.ANYONE
    group: int = 0
    address: bytes = NOWHERE
    mask: bytes = NOWHERE
    mac: bytes = bytes(6)


@dataclass(frozen=True)
class Rule(_Packed):
    FORMAT = struct.Struct("<48s48sHHBBH")
    sender: bytes
    receiver: bytes
    low: int
    high: int
    protocol: int
    allow: int
    family: int


@dataclass(frozen=True)
class Verdict(_Packed):
    FORMAT = struct.Struct("<IIII")
    fate: int
    reason: int
    ifindex: int
    rule: int


MAPS: dict[str, tuple[int, int, int]] = {
    "ports": (4, Nic.FORMAT.size, 4096),
    "list": (Where.FORMAT.size, Place.FORMAT.size, 65536),
    "known": (Owner.FORMAT.size, Addresses.FORMAT.size, 65536),
    "networks": (4, NetworkEntry.FORMAT.size, 256),
    "links": (4, Attachment.FORMAT.size, 512),
    "trunks": (Member.FORMAT.size, 1, 65536),
    "buckets": (Limited.FORMAT.size, Bucket.FORMAT.size, 8192),
    "counters_of": (4, Counters.FORMAT.size, 5120),
    "pairs": (Pair.FORMAT.size, Traffic.FORMAT.size, 16384),
    "rules": (4, Rule.FORMAT.size, 4096),
    "flows": (48, 16, 65536),
    "verdicts": (4, Verdict.FORMAT.size, 1),
}
"""Size of key and value in bytes, and the most entries, of each map."""
DISPATCH, UPLINK = "dispatch", "uplink"
"""The programs: of the switch's own links, and of physical NICs."""
