"""Frames that are made by hand, byte for byte as another implementation makes them."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6, in6_getnsma
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from orchestrator.switch import frames
from orchestrator.switch.frames import Datagram, Protocol

MAC, OTHER_MAC = "02:00:00:00:00:02", "02:00:00:00:00:03"
FOUR, OTHER_FOUR = IPv4Address("10.10.0.2"), IPv4Address("10.10.0.3")
SIX, OTHER_SIX = IPv6Address("fd10::2"), IPv6Address("fd10::aa:bb3")
TEXT = Raw(b"orchestrator")


def datagram(protocol: Protocol, family: int = 4, **changes: object) -> Datagram:
    source, target = (FOUR, OTHER_FOUR) if family == 4 else (SIX, OTHER_SIX)
    made = Datagram(protocol, MAC, OTHER_MAC, source, target, port=80, source_port=5000)
    return replace(made, **changes)  # type: ignore[arg-type]


def ether(family: int = 4, kind: int | None = None) -> Packet:
    if family == 4:
        return Ether(src=MAC, dst=OTHER_MAC) / IP(src=str(FOUR), dst=str(OTHER_FOUR), id=0, ttl=64)
    return Ether(src=MAC, dst=OTHER_MAC) / IPv6(src=str(SIX), dst=str(OTHER_SIX), hlim=64)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (datagram(Protocol.ICMP), ether() / ICMP(id=0x6F72, seq=1) / TEXT),
        (datagram(Protocol.ICMP, 6), ether(6) / ICMPv6EchoRequest(id=0x6F72, seq=1, data=b"orchestrator")),
        (datagram(Protocol.UDP), ether() / UDP(sport=5000, dport=80) / TEXT),
        (datagram(Protocol.UDP, 6), ether(6) / UDP(sport=5000, dport=80) / TEXT),
        (datagram(Protocol.TCP), ether() / TCP(sport=5000, dport=80, seq=1, flags="S", window=65535)),
        (datagram(Protocol.TCP, 6), ether(6) / TCP(sport=5000, dport=80, seq=1, flags="S", window=65535)),
        (
            datagram(Protocol.ARP),
            Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff")
            / ARP(op=1, hwsrc=MAC, psrc=str(FOUR), hwdst="00:00:00:00:00:00", pdst=str(OTHER_FOUR)),
        ),
        (
            datagram(Protocol.ND, 6),
            Ether(src=MAC, dst="33:33:ff:aa:0b:b3")
            / IPv6(src=str(SIX), dst="ff02::1:ffaa:bb3", hlim=255)
            / ICMPv6ND_NS(tgt=str(OTHER_SIX))
            / ICMPv6NDOptSrcLLAddr(lladdr=MAC),
        ),
    ],
    ids=["icmp", "icmp6", "udp", "udp6", "tcp", "tcp6", "arp", "nd"],
)
def test_frame_is_as_scapy_makes_it(made: Datagram, wanted: Packet) -> None:
    assert made.frame().hex() == bytes(wanted).hex()


def test_frame_carries_a_tag() -> None:
    frame = datagram(Protocol.UDP, vlan=10).frame()

    assert frame == bytes(
        Ether(src=MAC, dst=OTHER_MAC)
        / Dot1Q(vlan=10)
        / IP(src=str(FOUR), dst=str(OTHER_FOUR), id=0)
        / UDP(sport=5000, dport=80)
        / TEXT
    )
    assert frames.tag_of(frame) == 10
    assert frames.tag_of(datagram(Protocol.UDP).frame()) is None
    assert frames.tag_of(bytes(12) + b"\x81\x00") == 0, "cut short"


@pytest.mark.parametrize(
    "wrong",
    [
        datagram(Protocol.ARP, 6),
        datagram(Protocol.ND, 4),
        datagram(Protocol.UDP, source=SIX),
        datagram(Protocol.TCP, target=OTHER_SIX),
    ],
)
def test_addresses_of_the_wrong_family_are_refused(wrong: Datagram) -> None:
    with pytest.raises(ValueError, match="does not go from"):
        wrong.frame()


@pytest.mark.parametrize(
    ("group", "mac"),
    [
        ("224.0.0.251", "01:00:5e:00:00:fb"),
        ("239.129.2.3", "01:00:5e:01:02:03"),
        ("ff02::fb", "33:33:00:00:00:fb"),
    ],
)
def test_mac_of_a_group(group: str, mac: str) -> None:
    address = IPv6Address(group) if ":" in group else IPv4Address(group)

    assert frames.group_mac(address) == mac


@given(st.ip_addresses(v=6))
def test_solicited_node_is_the_one_of_the_address(address: IPv6Address) -> None:
    assert frames.solicited_node(address).packed == in6_getnsma(address.packed)


ports = st.integers(0, 65535)


@given(st.ip_addresses(v=4), st.ip_addresses(v=4), ports, ports, st.binary(max_size=40))
def test_checksums_over_ipv4(source: IPv4Address, target: IPv4Address, port: int, other: int, text: bytes) -> None:
    made = frames.ipv4(source, target, 17, frames.udp(source, target, port, other, text))

    wanted = IP(src=str(source), dst=str(target), id=0) / UDP(sport=port, dport=other) / Raw(text)
    assert made == bytes(wanted)


@given(st.ip_addresses(v=6), st.ip_addresses(v=6), ports, ports, st.binary(max_size=40))
def test_checksums_over_ipv6(source: IPv6Address, target: IPv6Address, port: int, other: int, text: bytes) -> None:
    made = frames.ipv6(source, target, 17, frames.udp(source, target, port, other, text))

    wanted = IPv6(src=str(source), dst=str(target)) / UDP(sport=port, dport=other) / Raw(text)
    assert made == bytes(wanted)


def test_checksum_of_zero_is_sent_as_all_ones() -> None:
    """RFC 768: a field of 0 would say that there is no checksum."""
    sums = [frames.udp(FOUR, OTHER_FOUR, port, 0, b"")[6:8] for port in range(65536)]

    assert sums.count(b"\xff\xff") == 1
    assert b"\0\0" not in sums
