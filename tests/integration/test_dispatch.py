"""The dispatcher, frame by frame: what its program would do with each, without any guest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv6Address

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from orchestrator.spec.resolved import ResolvedParty, ResolvedRule
from orchestrator.switch import bpf
from orchestrator.switch.layout import TRACE_MARK, Fate, Verdict, index, link_local, packed, packed_mac
from tests.switchworld import GATEWAY, VXLAN, World, here, mac, tap, there, world

pytestmark = pytest.mark.privileged

ANN, BOB, EVE, LONELY, RED, ROSE, BLUE, VEE, WEE, TRUNK = range(2, 12)
STRANGER = "02:de:ad:be:ef:01"
TO_ANN, TO_BOB, TO_UPLINK, TO_HOST = f"guest {tap(ANN)}", f"guest {tap(BOB)}", "uplink uplink", "host lan"


@pytest.fixture(scope="module")
def switch() -> Iterator[World]:
    with world(
        here("ann", ANN),
        here("bob", BOB),
        there("eve", EVE),
        here("lonely", LONELY, isolated=True),
        here("red", RED, group="red"),
        here("rose", ROSE, group="red"),
        here("blue", BLUE, group="blue"),
        here("vee", VEE, vlan=10),
        here("wee", WEE, vlan=10),
        here("trunk", TRUNK, trunk=[10, 20]),
    ) as made:
        yield made


def v4(sender: int = ANN, receiver: int | str = BOB, **fields: object) -> Packet:
    to = receiver if isinstance(receiver, str) else f"10.10.0.{receiver}"
    ether = Ether(src=mac(sender), dst=GATEWAY if isinstance(receiver, str) else mac(receiver))
    return ether / IP(src=f"10.10.0.{sender}", dst=to, **fields)


def v6(sender: int = ANN, receiver: int | str = BOB, **fields: object) -> Packet:
    to = receiver if isinstance(receiver, str) else f"fd10::{receiver:x}"
    ether = Ether(src=mac(sender), dst=GATEWAY if isinstance(receiver, str) else mac(receiver))
    return ether / IPv6(src=f"fd10::{sender:x}", dst=to, **fields)


def arp(sender: int = ANN, target: int | str = BOB, **fields: object) -> Packet:
    to = target if isinstance(target, str) else f"10.10.0.{target}"
    given = {"op": 1, "hwsrc": mac(sender), "psrc": f"10.10.0.{sender}", "pdst": to}
    return Ether(src=mac(sender), dst="ff:ff:ff:ff:ff:ff") / ARP(**{**given, **fields})


def ns(
    sender: int = ANN, target: str = f"fd10::{BOB:x}", source: str | None = None, option: str | None = ""
) -> Packet:
    made = Ether(src=mac(sender), dst="33:33:ff:00:00:03")
    made /= IPv6(src=source or f"fd10::{sender:x}", dst="ff02::1:ff00:3", hlim=255) / ICMPv6ND_NS(tgt=target)
    return made if option is None else made / ICMPv6NDOptSrcLLAddr(lladdr=option or mac(sender))


LL_ANN, LL_BOB = str(link_local(mac(ANN))), str(link_local(mac(BOB)))

OUT_OF_GUESTS: dict[str, tuple[Packet | bytes, str]] = {
    # the list
    "ipv4 to a guest here": (v4() / UDP(), TO_BOB),
    "ipv6 to a guest here": (v6() / UDP(), TO_BOB),
    "ipv4 to a guest of another host": (v4(receiver=EVE) / UDP(), f"underlay {VXLAN}"),
    "ipv6 to a guest of another host": (v6(receiver=EVE) / UDP(), f"underlay {VXLAN}"),
    "ipv4 to the gateway": (v4(receiver="10.10.0.1") / ICMP(), TO_HOST),
    "ipv6 to the gateway": (v6(receiver="fd10::1") / ICMPv6EchoRequest(), TO_HOST),
    "link-local to link-local": (
        Ether(src=mac(ANN), dst=mac(BOB)) / IPv6(src=LL_ANN, dst=LL_BOB) / ICMPv6EchoRequest(),
        TO_BOB,
    ),
    "ipv4 on no list": (v4(receiver="198.51.100.9") / UDP(), TO_UPLINK),
    "ipv6 on no list": (v6(receiver="2001:db8:9::9") / UDP(), TO_UPLINK),
    "inside the network, on no list": (v4(receiver="10.10.0.200") / UDP(), "drop no_destination"),
    "inside the network, on no list, ipv6": (v6(receiver="fd10::200") / UDP(), "drop no_destination"),
    "link-local on no list": (v6(receiver="fe80::1234") / UDP(), "drop no_destination"),
    "address of the host itself": (v4(receiver="192.0.2.2") / UDP(), TO_HOST),
    "last hop to the uplink": (v4(receiver="198.51.100.9", ttl=1) / UDP(), TO_HOST),
    "last hop to a guest": (v4(ttl=1) / UDP(), TO_BOB),
    "too large for the uplink": (v4(receiver="198.51.100.9") / UDP() / Raw(bytes(1472)), TO_UPLINK),
    "fragment": (v4(flags="MF", frag=0) / UDP() / Raw(bytes(64)), TO_BOB),
    "later fragment": (v4(frag=100, proto=17) / Raw(bytes(64)), TO_BOB),
    "fragment, ipv6": (v6() / IPv6ExtHdrFragment(offset=100, nh=17) / Raw(bytes(64)), TO_BOB),
    "options, ipv4": (v4(options=[IPOption_Router_Alert()]) / UDP(), TO_BOB),
    "extension headers": (v6() / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(), TO_BOB),
    # the sender
    "source mac": (Ether(src=STRANGER, dst=mac(BOB)) / IP(src="10.10.0.2", dst="10.10.0.3"), "drop source_mac"),
    "source mac of another guest": (v4(sender=BOB, receiver=EVE) / UDP(), "drop source_mac"),
    "source ipv4": (v4() / UDP(), TO_BOB),
    "source ipv4 of another guest": (
        Ether(src=mac(ANN), dst=mac(EVE)) / IP(src="10.10.0.3", dst="10.10.0.4"),
        "drop source_ipv4",
    ),
    "source ipv4 of the gateway": (
        Ether(src=mac(ANN), dst=mac(BOB)) / IP(src="10.10.0.1", dst="10.10.0.3"),
        "drop source_ipv4",
    ),
    "source ipv4 of nobody": (
        Ether(src=mac(ANN), dst=mac(BOB)) / IP(src="0.0.0.0", dst="10.10.0.3"),
        "drop source_ipv4",
    ),
    "source ipv6 of another guest": (
        Ether(src=mac(ANN), dst=mac(EVE)) / IPv6(src="fd10::3", dst="fd10::4") / UDP(),
        "drop source_ipv6",
    ),
    "source ipv6 unspecified": (
        Ether(src=mac(ANN), dst=mac(BOB)) / IPv6(src="::", dst="fd10::3"),
        "drop source_ipv6",
    ),
    "source link-local of another guest": (
        Ether(src=mac(ANN), dst=mac(BOB)) / IPv6(src=LL_BOB, dst="fd10::3") / UDP(),
        "drop link_local",
    ),
    "source that is an ipv4 address as ipv6": (
        Ether(src=mac(ANN), dst=mac(BOB)) / IPv6(src="::ffff:10.10.0.2", dst="fd10::3") / UDP(),
        "drop source_ipv6",
    ),
    # ARP
    "arp for a guest here": (arp(), f"answer {tap(ANN)}"),
    "arp for a guest of another host": (arp(target=EVE), f"answer {tap(ANN)}"),
    "arp for the gateway": (arp(target="10.10.0.1"), f"answer {tap(ANN)}"),
    "arp for nobody": (arp(target="10.10.0.200"), "drop no_destination"),
    "arp for itself": (arp(target=ANN), "none"),
    "arp probe": (arp(psrc="0.0.0.0", target=ANN), "none"),
    "arp probe for another guest's address": (arp(psrc="0.0.0.0"), f"answer {tap(ANN)}"),
    "arp with another sender mac": (arp(hwsrc=mac(BOB)), "drop arp"),
    "arp with another sender address": (arp(psrc="10.10.0.3", pdst="10.10.0.4"), "drop arp"),
    "arp answer that nobody asked for": (arp(op=2), "drop arp"),
    "arp of another kind": (arp(hwtype=6), "drop malformed"),
    "arp cut short": (bytes(arp())[:30], "drop malformed"),
    "reverse arp": (Ether(src=mac(ANN), dst="ff:ff:ff:ff:ff:ff", type=0x8035) / Raw(bytes(46)), f"underlay {VXLAN}"),
    # neighbour discovery
    "solicitation for a guest here": (ns(), f"answer {tap(ANN)}"),
    "solicitation for a link-local address": (ns(target=LL_BOB, source=LL_ANN), f"answer {tap(ANN)}"),
    "solicitation without option": (ns(option=None), f"answer {tap(ANN)}"),
    "solicitation for the gateway": (ns(target="fd10::1"), f"answer {tap(ANN)}"),
    "solicitation for nobody": (ns(target="fd10::200"), "drop no_destination"),
    "solicitation with another mac": (ns(option=mac(BOB)), "drop nd"),
    "solicitation with another source": (ns(source="fd10::3"), "drop source_ipv6"),
    "solicitation from afar": (
        Ether(src=mac(ANN), dst=mac(BOB)) / IPv6(src="fd10::2", dst="fd10::3", hlim=64) / ICMPv6ND_NS(tgt="fd10::3"),
        "drop nd",
    ),
    "solicitation in fragments": (
        v6(hlim=255) / IPv6ExtHdrFragment(nh=58, m=1) / ICMPv6ND_NS(tgt="fd10::3"),
        "drop nd",
    ),
    "detection of its own address": (ns(source="::", target="fd10::2", option=None), "none"),
    "detection of another's address": (ns(source="::", option=None), "drop nd"),
    "advertisement": (
        v6(hlim=255) / ICMPv6ND_NA(tgt="fd10::4") / ICMPv6NDOptDstLLAddr(lladdr=mac(ANN)),
        "drop nd",
    ),
    "router advertisement": (v6(hlim=255) / ICMPv6ND_RA(), "drop router"),
    "router advertisement behind an extension": (
        v6(hlim=255) / IPv6ExtHdrDestOpt() / ICMPv6ND_RA(),
        "drop router",
    ),
    "redirect": (v6(hlim=255) / ICMPv6ND_Redirect(tgt="fd10::4", dst="fd10::4"), "drop router"),
    "router solicitation": (
        Ether(src=mac(ANN), dst="33:33:00:00:00:02") / IPv6(src=LL_ANN, dst="ff02::2", hlim=255) / ICMPv6ND_RS(),
        "drop multicast",
    ),
    # multicast
    "broadcast": (v4(receiver="255.255.255.255") / UDP(), "drop multicast"),
    "broadcast of the network": (v4(receiver="10.10.0.255") / UDP(), "drop multicast"),
    "multicast": (v4(receiver="224.0.0.251") / UDP(), "drop multicast"),
    "multicast, ipv6": (v6(receiver="ff02::fb") / UDP(), "drop multicast"),
    "unicast in a broadcast frame": (
        Ether(src=mac(ANN), dst="ff:ff:ff:ff:ff:ff") / IP(src="10.10.0.2", dst="10.10.0.3") / UDP(),
        "drop multicast",
    ),
    # headers
    "another protocol": (Ether(src=mac(ANN), dst=mac(BOB), type=0x88CC) / Raw(bytes(50)), "drop ethertype"),
    "tag inside the frame": (
        Ether(src=mac(ANN), dst=mac(BOB)) / Dot1Q(vlan=5) / IP(src="10.10.0.2", dst="10.10.0.3"),
        "drop vlan",
    ),
    "ipv4 longer than the frame": (v4(len=1000) / UDP(), "drop malformed"),
    "ipv4 shorter than its header": (v4(len=10) / UDP(), "drop malformed"),
    "ipv4 with a header of 16 bytes": (v4(ihl=4) / UDP(), "drop malformed"),
    "ipv4 of version 5": (v4(version=5) / UDP(), "drop malformed"),
    "ipv4 in a padded frame": (bytes(v4() / UDP()) + bytes(30), TO_BOB),
    "ipv6 longer than the frame": (v6(plen=1000) / UDP(), "drop malformed"),
    "ipv6 without anything": (v6(nh=59), TO_BOB),
    "ipv6 of version 4": (v6(version=4) / UDP(), "drop malformed"),
    "extension headers cut short": (bytes(v6() / IPv6ExtHdrHopByHop())[:56], "drop malformed"),
    "endless extension headers": (v6(nh=0) / Raw(b"\0\0\0\0\0\0\0\0" * 20), "drop malformed"),
    "larger than the network carries": (v4() / UDP() / Raw(bytes(1473)), "drop too_big"),
    "as large as the network carries": (v4() / UDP() / Raw(bytes(1472)), TO_BOB),
    # isolation
    "to an isolated guest": (v4(receiver=LONELY) / UDP(), f"guest {tap(LONELY)}"),
    "to a guest in a group": (v4(receiver=RED) / UDP(), f"guest {tap(RED)}"),
    "to another vlan": (v4(receiver=VEE) / UDP(), "drop vlan"),
    "arp for another vlan": (arp(target=VEE), "drop vlan"),
}


@pytest.mark.parametrize("case", OUT_OF_GUESTS)
def test_frame_of_a_guest(switch: World, case: str) -> None:
    frame, wanted = OUT_OF_GUESTS[case]

    assert str(switch.give(tap(ANN), frame)) == wanted


@pytest.mark.parametrize(
    ("sender", "receiver", "wanted"),
    [
        (LONELY, ANN, TO_ANN),
        (LONELY, RED, "drop isolated"),
        (RED, LONELY, "drop isolated"),
        (RED, ROSE, f"guest {tap(ROSE)}"),
        (RED, BLUE, "drop isolated"),
        (BLUE, ANN, TO_ANN),
        (VEE, WEE, f"guest {tap(WEE)}"),
        (VEE, TRUNK, f"guest {tap(TRUNK)}"),
        (VEE, ANN, "drop vlan"),
        (VEE, EVE, "drop vlan"),
        (TRUNK, ANN, TO_ANN),
    ],
)
def test_who_may_talk_to_whom(switch: World, sender: int, receiver: int, wanted: str) -> None:
    four = switch.give(tap(sender), v4(sender, receiver) / UDP())
    six = switch.give(tap(sender), v6(sender, receiver) / UDP())

    assert (str(four), str(six)) == (wanted, wanted)


@pytest.mark.parametrize("sender", [LONELY, RED, VEE])
def test_everybody_may_talk_to_the_gateway_and_beyond(switch: World, sender: int) -> None:
    assert str(switch.give(tap(sender), v4(sender, "10.10.0.1") / ICMP())) == TO_HOST
    assert str(switch.give(tap(sender), v4(sender, "198.51.100.9") / UDP())) == TO_UPLINK
    assert str(switch.give(tap(sender), arp(sender, "10.10.0.1"))) == f"answer {tap(sender)}"


def test_nothing_but_the_mac_changes_on_the_way(switch: World) -> None:
    for frame in (v4() / TCP() / Raw(b"text"), v6() / UDP() / Raw(b"text"), v4(receiver="198.51.100.9") / UDP()):
        frame = Ether(bytes(frame))
        seen = switch.give(tap(ANN), frame)
        assert seen.frame[14:] == bytes(frame)[14:]
        assert seen.frame[6:12] == bytes(frame)[6:12]


def test_wrong_destination_mac_is_set_right(switch: World) -> None:
    frame = Ether(src=mac(ANN), dst=mac(EVE)) / IP(src="10.10.0.2", dst="10.10.0.3") / UDP()

    assert switch.give(tap(ANN), frame).frame[:6] == packed_mac(mac(BOB))


def test_arp_answer_is_well_formed(switch: World) -> None:
    answer = Ether(switch.give(tap(ANN), arp()).frame)

    assert (answer.dst, answer.src, answer[ARP].op) == (mac(ANN), mac(BOB), 2)
    assert (answer[ARP].hwsrc, answer[ARP].psrc) == (mac(BOB), "10.10.0.3")
    assert (answer[ARP].hwdst, answer[ARP].pdst) == (mac(ANN), "10.10.0.2")


@pytest.mark.parametrize("question", [ns(), ns(option=None), ns(target="fd10::1")])
def test_advertisement_is_well_formed(switch: World, question: Packet) -> None:
    answer = Ether(switch.give(tap(ANN), question).frame)
    target = question[ICMPv6ND_NS].tgt
    owner = GATEWAY if target == "fd10::1" else mac(BOB)

    assert (answer.dst, answer.src) == (mac(ANN), owner)
    assert (answer[IPv6].src, answer[IPv6].dst, answer[IPv6].hlim) == (target, "fd10::2", 255)
    assert (answer[ICMPv6ND_NA].tgt, answer[ICMPv6ND_NA].S, answer[ICMPv6ND_NA].O) == (target, 1, 1)
    assert (owner == GATEWAY) == answer[ICMPv6ND_NA].R, "who routes says so"
    assert answer[ICMPv6NDOptDstLLAddr].lladdr == owner
    sent = answer[ICMPv6ND_NA].cksum
    del answer[ICMPv6ND_NA].cksum
    assert Ether(bytes(answer))[ICMPv6ND_NA].cksum == sent


# -- what comes in elsewhere -----------------------------------------------------------------------------------------


def from_eve(frame: Packet, **changes: str) -> Packet:
    return Ether(src=mac(EVE), dst=mac(ANN)) / frame


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        (v4(EVE, ANN) / UDP(), TO_ANN),
        (v6(EVE, ANN) / UDP(), TO_ANN),
        (v4(EVE, EVE) / UDP(), "drop no_destination"),
        (v4(BOB, ANN) / UDP(), TO_ANN),
        (Ether(src=STRANGER, dst=mac(ANN)) / IP(src="10.10.0.4", dst="10.10.0.2"), "drop underlay"),
        (Ether(src=STRANGER, dst=mac(ANN)) / IP(src="198.51.100.9", dst="10.10.0.2"), "drop underlay"),
        (Ether(src=GATEWAY, dst=mac(ANN)) / IP(src="198.51.100.9", dst="10.10.0.2"), TO_ANN),
        (v4(EVE, "198.51.100.9") / UDP(), "drop no_destination"),
        (v4(EVE, "10.10.0.1") / UDP(), "drop no_destination"),
        (v4(EVE, VEE) / UDP(), "drop vlan"),
        (arp(EVE, ANN), f"answer {VXLAN}"),
        (arp(EVE, 200), "drop multicast"),
        (arp(EVE, ANN, op=2), "drop arp"),
        (ns(EVE, "fd10::2"), f"answer {VXLAN}"),
        (v6(EVE, ANN, hlim=255) / ICMPv6ND_NA(tgt="fd10::4"), "drop nd"),
        (v4(EVE, "255.255.255.255") / UDP(), "drop multicast"),
        (Ether(src=STRANGER, dst="ff:ff:ff:ff:ff:ff", type=0x8035) / Raw(bytes(46)), "drop underlay"),
        (Ether(src=mac(EVE), dst="ff:ff:ff:ff:ff:ff", type=0x8035) / Raw(bytes(46)), "none"),
        (v4(EVE, ANN, len=1000) / UDP(), "drop malformed"),
    ],
)
def test_frame_of_another_host(switch: World, frame: Packet | bytes, wanted: str) -> None:
    assert str(switch.give(VXLAN, frame)) == wanted


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        (Ether(src=GATEWAY, dst=mac(ANN)) / IP(src="10.10.0.1", dst="10.10.0.2") / UDP(), TO_ANN),
        (Ether(src=GATEWAY, dst=mac(ANN)) / IP(src="198.51.100.9", dst="10.10.0.2") / UDP(), TO_ANN),
        (Ether(src=GATEWAY, dst=mac(ANN)) / IPv6(src="fd10::1", dst="fd10::4") / UDP(), f"underlay {VXLAN}"),
        (Ether(src=GATEWAY, dst=mac(ANN)) / IP(src="10.10.0.1", dst=f"10.10.0.{VEE}") / UDP(), f"guest {tap(VEE)}"),
        (Ether(src=GATEWAY, dst=mac(ANN)) / IP(src="10.10.0.1", dst="10.10.0.200") / UDP(), "drop no_destination"),
        (Ether(src=GATEWAY, dst=mac(ANN)) / IP(src="10.10.0.1", dst="198.51.100.9") / UDP(), "drop no_destination"),
        (Ether(src=GATEWAY, dst=mac(ANN)) / IPv6(src="fe80::1", dst="ff02::16") / UDP(), "drop multicast"),
        (Ether(src=GATEWAY) / ARP(), "drop ethertype"),
    ],
)
def test_frame_of_the_host(switch: World, frame: Packet, wanted: str) -> None:
    seen = switch.give("lan", frame)

    assert str(seen) == wanted
    if seen.fate == Fate.GUEST:
        assert seen.frame[6:12] == packed_mac(GATEWAY)


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        (IP(src="198.51.100.9", dst="10.10.0.2") / UDP(), TO_ANN),
        (IPv6(src="2001:db8:9::9", dst="fd10::2") / UDP(), TO_ANN),
        (IP(src="198.51.100.9", dst="10.10.0.4") / UDP(), f"underlay {VXLAN}"),
        (IP(src="198.51.100.9", dst="192.0.2.2") / UDP(), "pass"),
        (IP(src="198.51.100.9", dst="10.10.0.1") / UDP(), "pass"),
        (IPv6(src="2001:db8:9::9", dst=LL_ANN) / UDP(), "pass"),
        (IP(src="198.51.100.9", dst="10.10.0.2") / UDP() / Raw(bytes(1473)), "pass"),
    ],
)
def test_frame_from_an_uplink(switch: World, frame: Packet, wanted: str) -> None:
    assert str(switch.give("uplink", Ether(dst=switch.addresses["uplink"], src=STRANGER) / frame)) == wanted


def test_what_is_not_ip_or_not_for_this_host_passes_the_uplink(switch: World) -> None:
    for frame in (
        Ether(dst=STRANGER) / IP(dst="10.10.0.2") / UDP(),
        Ether(type=0x88CC) / Raw(bytes(50)),
        Ether() / ARP(),
    ):
        verdict, after = switch.run("uplink", frame)
        assert verdict == -1, "TC_ACT_UNSPEC: as if the program were not there"
        assert after == bytes(frame)


def test_link_that_is_in_no_table_gets_nothing_through(switch: World) -> None:
    verdict, _ = switch.run("underlay", v4() / UDP())

    assert verdict == 2  # TC_ACT_SHOT


# -- rules -----------------------------------------------------------------------------------------------------------


def rule(
    allow: bool, sender: str = "", receiver: str = "", protocol: int = 0, ports: str = "", family: int = 0
) -> ResolvedRule:
    def party(text: str) -> ResolvedParty:
        side, _, value = text.partition(" ")
        return ResolvedParty.model_validate({"side": side or "any", "value": value})

    low, _, high = (ports or "0-65535").partition("-")
    return ResolvedRule.model_validate(
        {
            "allow": allow,
            "sender": party(sender),
            "receiver": party(receiver),
            "protocol": protocol,
            "low": int(low),
            "high": int(high or low),
            "family": family,
        }
    )


@pytest.fixture
def ruled(switch: World) -> Iterator[Callable[..., World]]:
    def with_rules(*rules: ResolvedRule) -> World:
        switch.change(rules=list(rules))
        return switch

    yield with_rules
    switch.change(rules=[])


def test_first_rule_that_matches_decides(ruled: Callable[..., World]) -> None:
    switch = ruled(
        rule(True, f"nic {mac(ANN)}", f"nic {mac(BOB)}", 6, "80"),
        rule(True, "", "prefix 10.10.0.3/32", 17, "1000-2000"),
        rule(False, "group red", "", 1),
        rule(False, "", f"nic {mac(BOB)}"),
        rule(False, "", "prefix fd10::4/127", 0, "", 6),
    )

    def fate(sender: int, frame: Packet) -> tuple[str, int]:
        seen = switch.give(tap(sender), frame)
        return str(seen), seen.rule

    assert fate(ANN, v4() / TCP(dport=80)) == (TO_BOB, 1)
    assert fate(ANN, v6() / TCP(dport=80)) == (TO_BOB, 1)
    assert fate(ANN, v4() / TCP(dport=81)) == ("drop rule", 4)
    assert fate(ANN, v4() / UDP(dport=1500)) == (TO_BOB, 2)
    assert fate(ANN, v6() / UDP(dport=1500)) == ("drop rule", 4)
    assert fate(ANN, v4() / UDP(dport=2001)) == ("drop rule", 4)
    assert fate(RED, v4(RED, ANN) / ICMP()) == ("drop rule", 3)
    assert fate(ANN, v4(ANN, RED) / ICMP()) == (f"guest {tap(RED)}", 0)
    assert fate(ANN, v4(receiver=EVE) / UDP()) == (f"underlay {VXLAN}", 0)
    assert fate(ANN, v6(receiver=EVE) / UDP()) == ("drop rule", 5)
    assert fate(ANN, v4(receiver="198.51.100.9") / UDP()) == (TO_UPLINK, 0)


def test_answers_to_what_was_allowed_pass_and_nothing_else(ruled: Callable[..., World]) -> None:
    switch = ruled(rule(True, f"nic {mac(ANN)}", "", 6, "80"), rule(False))
    question, answer = v4() / TCP(sport=5000, dport=80), v4(BOB, ANN) / TCP(sport=80, dport=5000)

    before = str(switch.give(tap(BOB), answer))
    switch.run(tap(ANN), question)
    after = str(switch.give(tap(BOB), answer))
    other = str(switch.give(tap(BOB), v4(BOB, ANN) / TCP(sport=80, dport=5001)))
    error = str(switch.give(tap(BOB), v4(BOB, ANN) / ICMP(type=3, code=4)))
    switch = ruled(rule(False))
    changed = str(switch.give(tap(BOB), answer))

    assert (before, after, other, error) == ("drop rule", TO_ANN, "drop rule", TO_ANN)
    assert changed == "drop rule", "what earlier rules allowed is looked at again"


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        (v4() / ICMP(type=8, id=5), v4(BOB, ANN) / ICMP(type=0, id=5)),
        (v6() / ICMPv6EchoRequest(id=5), v6(BOB, ANN) / ICMPv6EchoReply(id=5)),
    ],
    ids=["ipv4", "ipv6"],
)
def test_echo_reply_answers_a_request_and_a_request_never_does(
    ruled: Callable[..., World], question: Packet, reply: Packet
) -> None:
    switch = ruled(rule(True, f"nic {mac(ANN)}", f"nic {mac(BOB)}"), rule(False))
    asked = v4(BOB, ANN) / ICMP(type=8, id=5) if IP in question else v6(BOB, ANN) / ICMPv6EchoRequest(id=5)

    switch.run(tap(ANN), question)

    assert str(switch.give(tap(BOB), reply)) == TO_ANN
    assert str(switch.give(tap(BOB), asked)) == "drop rule"


def test_later_fragments_pass_when_their_first_did(ruled: Callable[..., World]) -> None:
    switch = ruled(rule(True, "", "", 17, "53"), rule(False))
    first = v4(id=77, flags="MF") / UDP(dport=53) / Raw(bytes(64))
    later, other = v4(id=77, frag=9, proto=17) / Raw(bytes(64)), v4(id=78, frag=9, proto=17) / Raw(bytes(64))

    before = str(switch.give(tap(ANN), later))
    switch.run(tap(ANN), first)

    assert before == "drop fragment"
    assert str(switch.give(tap(ANN), later)) == TO_BOB
    assert str(switch.give(tap(ANN), other)) == "drop fragment"


def test_transport_header_that_is_cut_short_is_malformed_where_there_are_rules(ruled: Callable[..., World]) -> None:
    switch = ruled(rule(True, "", "", 6, "80"))

    assert str(switch.give(tap(ANN), v4(proto=6) / Raw(b"xx"))) == "drop malformed"


def test_rules_are_kept_apart_and_their_places_used_again(switch: World) -> None:
    one, two = [rule(True, protocol=17)], [rule(False, protocol=6), rule(True)]
    for rules in (one, two, one, [], two) * 3:
        switch.change(rules=rules)
        (entry,) = switch.switch.networks().values()
        assert len(switch.switch.rules_of(entry)) == len(rules)
        assert entry.first_rule < 8
    switch.change(rules=[])


# -- multicast -------------------------------------------------------------------------------------------------------


def test_multicast_goes_to_everybody_where_the_network_floods(switch: World) -> None:
    switch.change(multicast="flood")
    try:
        seen = str(switch.give(tap(ANN), v4(receiver="224.0.0.251") / UDP()))
    finally:
        switch.change(multicast="drop")

    assert seen == "flood"


# -- whatever comes --------------------------------------------------------------------------------------------------

INPUTS = 1_000_000


def is_spoofed(frame: bytes) -> bool:
    """Whether a frame that ann has sent says that it is somebody else's; written without looking at the program."""
    if frame[6:12] != packed_mac(mac(ANN)):
        return True
    kind = struct.unpack(">H", frame[12:14])[0]
    if kind == 0x0800:
        return frame[26:30] != packed("10.10.0.2")[12:]
    if kind == 0x86DD:
        return frame[22:38] not in (packed("fd10::2"), IPv6Address(LL_ANN).packed)
    return True


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Each CPU tells the verdicts of what ran there."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("one_cpu")
def test_a_million_frames_of_any_kind_are_never_taken_for_somebody_elses(switch: World) -> None:
    """Frames that were well-formed and had bytes changed, cut or added; each is run once."""
    seeds = [bytes(frame) for frame, _ in OUT_OF_GUESTS.values()]
    chance = random.Random(20261126)
    number, forwarded, fates = switch.indexes[tap(ANN)], 0, set()
    program, verdicts, zero = switch.switch.program("dispatch"), switch.switch.maps["verdicts"], index(0)
    size = 16
    for count in range(INPUTS):
        frame = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((0, 1, 1, 2, 4, 16))):
            at = chance.randrange(len(frame))
            frame[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        if chance.random() < 0.2:
            frame = frame[: chance.randrange(14, len(frame) + 1)]
        if chance.random() < 0.05:
            frame += bytes(chance.randrange(64))
        given = bytes(frame) if len(frame) >= 14 else bytes(14)
        try:
            verdict, after = bpf.run(program, given, ifindex=number, mark=TRACE_MARK)
        except bpf.BpfError as error:
            if error.number == errno.EINVAL and len(given) < 14 + 40:
                continue  # what is shorter than the header that it announces the kernel gives to no program
            raise
        assert verdict in (2, 7), given.hex()  # dropped, or redirected
        if verdict == 7:
            raw = next(one for one in verdicts.each(zero) if one != bytes(size))
            fate = Verdict.unpack(raw).fate
            fates.add(fate)
            if fate in (Fate.GUEST, Fate.UNDERLAY, Fate.HOST, Fate.UPLINK) and given[12:14] != b"\x80\x35":
                forwarded += 1
                assert not is_spoofed(given), given.hex()
                assert after[14:] == given[14:], given.hex()
        if count % 4096 == 0:
            verdicts.set(zero, bytes(size))

    assert fates >= {Fate.GUEST, Fate.UNDERLAY, Fate.HOST, Fate.UPLINK, Fate.ANSWER}
    assert forwarded > INPUTS / 100
