"""Frames as a guest sends them, header by header: the first datagram of a conversation, or a question for a MAC."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from orchestrator.switch.layout import Address, packed_mac

IPV4, ARP, TAG, IPV6 = 0x0800, 0x0806, 0x8100, 0x86DD
BROADCAST = "ff:ff:ff:ff:ff:ff"
FIRST_EPHEMERAL = 49152  # RFC 6335, section 6
_ICMP, _TCP, _UDP, _ICMPV6 = 1, 6, 17, 58
_HOPS = 64
_IDENTIFIER = 0x6F72
_TEXT = b"orchestrator"


class Protocol(StrEnum):
    ICMP = "icmp"
    TCP = "tcp"
    UDP = "udp"
    ARP = "arp"
    ND = "nd"


@dataclass(frozen=True)
class Datagram:
    """What is sent: an echo request, the first segment of a connection, a datagram; or a question for ``target``.

    :ivar target_mac: where the sender takes ``target`` to be; a question goes to everybody instead.
    :ivar source_port: as ``port``, of TCP and UDP.
    :ivar vlan: a tag that the frame carries; None: none.
    """

    protocol: Protocol
    source_mac: str
    target_mac: str
    source: Address
    target: Address
    port: int = 0
    source_port: int = FIRST_EPHEMERAL
    vlan: int | None = None

    def frame(self) -> bytes:
        """:raise ValueError: the addresses are of two families, or of one that the protocol is not for."""
        target_mac = self.target_mac
        match self.protocol, self.source, self.target:
            case Protocol.ARP, IPv4Address() as source, IPv4Address() as target:
                target_mac, kind, packet = BROADCAST, ARP, arp_request(self.source_mac, source, target)
            case Protocol.ND, IPv6Address() as source, IPv6Address() as target:
                group = solicited_node(target)
                question = solicitation(self.source_mac, source, target)
                target_mac, kind, packet = group_mac(group), IPV6, ipv6(source, group, _ICMPV6, question, hops=255)
            case ((Protocol.ICMP | Protocol.TCP | Protocol.UDP), IPv4Address() as source, IPv4Address() as target):
                kind, packet = IPV4, ipv4(source, target, *self._transport(_ICMP))
            case ((Protocol.ICMP | Protocol.TCP | Protocol.UDP), IPv6Address() as source, IPv6Address() as target):
                kind, packet = IPV6, ipv6(source, target, *self._transport(_ICMPV6))
            case _:
                raise ValueError(f"{self.protocol} does not go from {self.source} to {self.target}")
        return ethernet(target_mac, self.source_mac, kind, packet, self.vlan)

    def _transport(self, icmp: int) -> tuple[int, bytes]:
        match self.protocol:
            case Protocol.TCP:
                return _TCP, syn(self.source, self.target, self.source_port, self.port)
            case Protocol.UDP:
                return _UDP, udp(self.source, self.target, self.source_port, self.port, _TEXT)
        return icmp, echo_request(self.source, self.target)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _over(source: Address, target: Address, protocol: int, payload: bytes) -> int:
    """A checksum that covers the addresses too (RFC 9293, section 3.1; RFC 8200, section 8.1)."""
    if source.version == 4:
        size = struct.pack(">HH", protocol, len(payload))
    else:
        size = struct.pack(">II", len(payload), protocol)
    return checksum(source.packed + target.packed + size + payload)


def group_mac(group: Address) -> str:
    """Where frames to a multicast address go (RFC 1112, section 6.4; RFC 2464, section 7)."""
    raw = group.packed
    made = b"\x33\x33" + raw[12:] if group.version == 6 else bytes([1, 0, 0x5E, raw[1] & 0x7F]) + raw[2:]
    return made.hex(":")


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The group that whoever has the address listens to (RFC 4291, section 2.7.1)."""
    return IPv6Address(IPv6Address("ff02::1:ff00:0").packed[:13] + address.packed[13:])


def ethernet(target: str, source: str, kind: int, payload: bytes, vlan: int | None = None) -> bytes:
    return tagged(packed_mac(target) + packed_mac(source) + kind.to_bytes(2, "big") + payload, vlan)


def tagged(frame: bytes, vlan: int | None) -> bytes:
    """A frame with a tag of IEEE 802.1Q behind its addresses."""
    return frame if vlan is None else frame[:12] + struct.pack(">HH", TAG, vlan) + frame[12:]


def tag_of(frame: bytes) -> int | None:
    """The VLAN that a frame's tag names; None where it has no tag."""
    kind, tag = struct.unpack(">HH", frame[12:16].ljust(4, b"\0"))
    return int(tag) & 0xFFF if kind == TAG else None


def ipv4(source: IPv4Address, target: IPv4Address, protocol: int, payload: bytes) -> bytes:
    """RFC 791, section 3.1."""
    head = struct.pack(">BBHHHBB", 0x45, 0, 20 + len(payload), 0, 0, _HOPS, protocol)
    addresses = source.packed + target.packed
    return head + checksum(head + addresses).to_bytes(2, "big") + addresses + payload


def ipv6(source: IPv6Address, target: IPv6Address, protocol: int, payload: bytes, hops: int = _HOPS) -> bytes:
    """RFC 8200, section 3."""
    return struct.pack(">IHBB", 6 << 28, len(payload), protocol, hops) + source.packed + target.packed + payload


def udp(source: Address, target: Address, source_port: int, port: int, text: bytes) -> bytes:
    """RFC 768; a checksum of 0 would say that there is none."""
    head = struct.pack(">HHH", source_port, port, 8 + len(text))
    sum_ = _over(source, target, _UDP, head + bytes(2) + text) or 0xFFFF
    return head + sum_.to_bytes(2, "big") + text


def syn(source: Address, target: Address, source_port: int, port: int) -> bytes:
    """The first segment of a TCP connection (RFC 9293, section 3.1)."""
    head = struct.pack(">HHIIBBH", source_port, port, 1, 0, 5 << 4, 2, 65535)
    return head + _over(source, target, _TCP, head + bytes(4)).to_bytes(2, "big") + bytes(2)


def echo_request(source: Address, target: Address) -> bytes:
    """RFC 792; RFC 4443, section 4.1."""
    kind = 8 if source.version == 4 else 128
    rest = struct.pack(">HH", _IDENTIFIER, 1) + _TEXT
    whole = bytes([kind, 0, 0, 0]) + rest
    sum_ = checksum(whole) if source.version == 4 else _over(source, target, _ICMPV6, whole)
    return bytes([kind, 0]) + sum_.to_bytes(2, "big") + rest


def arp_request(mac: str, source: IPv4Address, target: IPv4Address) -> bytes:
    """RFC 826."""
    return struct.pack(">HHBBH", 1, IPV4, 6, 4, 1) + packed_mac(mac) + source.packed + bytes(6) + target.packed


def solicitation(mac: str, source: IPv6Address, target: IPv6Address) -> bytes:
    """A neighbour solicitation (RFC 4861, section 4.3) with the sender's MAC."""
    rest = bytes(4) + target.packed + bytes([1, 1]) + packed_mac(mac)
    sum_ = _over(source, solicited_node(target), _ICMPV6, bytes([135, 0, 0, 0]) + rest)
    return bytes([135, 0]) + sum_.to_bytes(2, "big") + rest
