"""The switch with real taps in a network namespace: frames are written as QEMU writes them; who gets them is seen."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from orchestrator.errors import NetworkError
from orchestrator.hosts.rpc import Call
from orchestrator.spec.resolved import ResolvedParty, ResolvedRule
from orchestrator.switch import dispatcher, links
from orchestrator.switch.layout import Counters, Flag, Pair, Place, Traffic, Where, index, packed, packed_mac
from orchestrator.switch.membership import Listed
from orchestrator.switch.service import NetworkService
from tests.switchworld import HERE, UID, VXLAN, World, here, ip, mac, nic, tap, there, total, world

pytestmark = pytest.mark.privileged

ANN, BOB, CID, EVE, TRUNK, VEE, OTHER_VEE, SLOW, SEEN, EAR, ZOE, MAX = range(2, 14)
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PI, _VNET_HDR = 0x0002, 0x1000, 0x4000
_CSUM, _TSO4, _TSO6 = 1, 2, 4
HEADER = 10  # struct virtio_net_hdr
TAGGED = 0x8100


class Port:
    """The guest's end of a tap, as QEMU has it."""

    def __init__(self, name: str) -> None:
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_PI | _VNET_HDR))
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, _CSUM | _TSO4 | _TSO6)

    def send(self, frame: Packet | bytes, header: bytes = bytes(HEADER)) -> None:
        os.write(self.fd, header + bytes(frame))

    def receive(self, seconds: float = 2.0) -> bytes:
        """The next frame, b"" if none comes."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return b""
        return os.read(self.fd, 1 << 17)[HEADER:]

    def receive_all_at_once(self) -> list[bytes]:
        """What is there now."""
        found = []
        while frame := self.receive(0):
            found.append(frame)
        return found

    def receive_all(self) -> list[bytes]:
        """What has come; whoever sends does it before the write returns."""
        found = []
        while frame := self.receive(0.05):
            found.append(frame)
        return found


class Wire(World):
    ports: dict[int, Port]

    def counters(self, link: str) -> Counters:
        return total(self.switch, self.indexes[link])

    def dropped(self, link: str) -> dict[str, int]:
        return {reason: count for reason, count in self.counters(link).dropped.items() if count}

    def pair(self, sender: str, receiver: str) -> int:
        key = Pair(packed_mac(sender), packed_mac(receiver)).pack()
        return sum(Traffic.unpack(raw).packets for raw in self.switch.maps["pairs"].each(key))

    def place(self, address: str) -> Place:
        raw = self.switch.maps["list"].get(Where(packed(address), self.indexes["lan"]).pack())
        assert raw is not None
        return Place.unpack(raw)


ANY = ResolvedParty(side="any")
ALLOW = ResolvedRule(allow=True, sender=ANY, receiver=ANY, protocol=0, low=0, high=65535, family=0)

LISTED = (
    here("ann", ANN),
    here("bob", BOB),
    here("cid", CID),
    there("eve", EVE),
    here("trunk", TRUNK, trunk=[10, 20]),
    here("vee", VEE, vlan=10),
    here("other-vee", OTHER_VEE, vlan=20),
    here("slow", SLOW, rate_out=8_000_000, rate_in=16_000_000),
    here("seen", SEEN, mirror=tap(EAR)),
    here("ear", EAR),
)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with world(*LISTED, kind=Wire) as made:
        made.ports = {number: Port(tap(number)) for number in (ANN, BOB, CID, TRUNK, VEE, OTHER_VEE, SLOW, SEEN, EAR)}
        yield made
        for port in made.ports.values():
            os.close(port.fd)


@pytest.fixture(autouse=True)
def _quiet(wire: Wire) -> None:
    for port in wire.ports.values():
        port.receive_all()


def udp(sender: int, receiver: int, size: int = 20, **fields: object) -> Packet:
    frame = Ether(src=mac(sender), dst=mac(receiver)) / IP(
        src=f"10.10.0.{sender}", dst=f"10.10.0.{receiver}", **fields
    )
    return frame / UDP(sport=7, dport=7) / Raw(bytes(size))


def test_datagram_goes_to_its_receiver_alone_and_both_are_counted(wire: Wire) -> None:
    before = wire.counters(tap(ANN)), wire.counters(tap(BOB)), wire.pair(mac(ANN), mac(BOB))
    frame = bytes(udp(ANN, BOB))

    wire.ports[ANN].send(frame)

    assert wire.ports[BOB].receive() == frame
    assert [port.receive_all() for number, port in wire.ports.items() if number != BOB] == [[]] * 8
    sent, received = wire.counters(tap(ANN)), wire.counters(tap(BOB))
    assert (sent.tx_packets - before[0].tx_packets, sent.tx_bytes - before[0].tx_bytes) == (1, len(frame))
    assert (received.rx_packets - before[1].rx_packets, received.rx_bytes - before[1].rx_bytes) == (1, len(frame))
    assert wire.pair(mac(ANN), mac(BOB)) == before[2] + 1
    assert 0 < time.clock_gettime_ns(time.CLOCK_MONOTONIC) - sent.last_seen < 10_000_000_000


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (Ether(src=mac(BOB), dst=mac(CID)) / IP(src="10.10.0.2", dst="10.10.0.4") / UDP(), "source_mac"),
        (Ether(src=mac(ANN), dst=mac(CID)) / IP(src="10.10.0.3", dst="10.10.0.4") / UDP(), "source_ipv4"),
        (Ether(src=mac(ANN), dst=mac(CID)) / IPv6(src="fd10::3", dst="fd10::4") / UDP(), "source_ipv6"),
        (Ether(src=mac(ANN), dst=mac(CID)) / IPv6(src="fe80::3", dst="fd10::4") / UDP(), "link_local"),
        (Ether(src=mac(ANN), dst=mac(CID)) / ARP(op=2, hwsrc=mac(ANN), psrc="10.10.0.3", pdst="10.10.0.4"), "arp"),
        (Ether(src=mac(ANN), dst=mac(BOB), type=0x0800) / Raw(b"\x45" + bytes(12)), "malformed"),
        (Ether(src=mac(ANN), dst=mac(BOB), type=0x86DD) / Raw(b"\x60" + bytes(12)), "malformed"),
        (Ether(src=mac(ANN), dst=mac(BOB)) / Dot1Q(vlan=10) / IP(src="10.10.0.2", dst="10.10.0.3"), "vlan"),
    ],
)
def test_forged_frame_is_dropped_and_counted_by_reason(wire: Wire, frame: Packet, reason: str) -> None:
    before = wire.dropped(tap(ANN)).get(reason, 0)

    wire.ports[ANN].send(frame)

    assert wire.dropped(tap(ANN)).get(reason, 0) == before + 1
    assert all(not port.receive_all() for port in wire.ports.values())


def test_arp_and_answer(wire: Wire) -> None:
    wire.ports[ANN].send(
        Ether(src=mac(ANN), dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=mac(ANN), psrc="10.10.0.2", pdst="10.10.0.3")
    )

    answer = Ether(wire.ports[ANN].receive())

    assert (answer[ARP].op, answer[ARP].hwsrc) == (2, mac(BOB))
    assert not wire.ports[BOB].receive_all(), "nobody hears what another one asks"


def test_large_frame_that_is_to_be_segmented_stays_whole(wire: Wire) -> None:
    segment = 1448
    text = bytes(20 * segment)
    frame = Ether(src=mac(ANN), dst=mac(BOB)) / IP(src="10.10.0.2", dst="10.10.0.3") / TCP(flags="A") / Raw(text)
    header = struct.pack("<BBHHHH", 1, 1, 54, segment, 34, 16)  # NEEDS_CSUM, TCPV4

    wire.ports[ANN].send(frame, header)

    got = wire.ports[BOB].receive()
    assert len(got) == len(frame)
    assert got[54:] == text


@pytest.mark.parametrize("vlan", [10, 20])
def test_trunk_is_in_several_vlans_by_tags(wire: Wire, vlan: int) -> None:
    member, other = (VEE, OTHER_VEE) if vlan == 10 else (OTHER_VEE, VEE)
    datagram = IP(src=f"10.10.0.{TRUNK}", dst=f"10.10.0.{member}") / UDP() / Raw(b"there")

    wire.ports[TRUNK].send(Ether(src=mac(TRUNK), dst=mac(member)) / Dot1Q(vlan=vlan) / datagram)
    there = wire.ports[member].receive()
    wire.ports[member].send(udp(member, TRUNK))
    back = wire.ports[TRUNK].receive()
    wire.ports[TRUNK].send(
        Ether(src=mac(TRUNK), dst=mac(other)) / Dot1Q(vlan=vlan) / IP(src=f"10.10.0.{TRUNK}", dst=f"10.10.0.{other}")
    )

    assert there[12:14] == b"\x08\x00", "without a tag for who is in the VLAN by its port"
    assert there[14:] == bytes(datagram)
    assert struct.unpack(">HH", back[12:16]) == (TAGGED, vlan)
    assert not wire.ports[other].receive_all()


def test_tag_that_a_trunk_may_not_use_is_dropped(wire: Wire) -> None:
    before = wire.dropped(tap(TRUNK)).get("vlan", 0)

    wire.ports[TRUNK].send(
        Ether(src=mac(TRUNK), dst=mac(VEE)) / Dot1Q(vlan=30) / IP(src=f"10.10.0.{TRUNK}", dst=f"10.10.0.{VEE}")
    )
    wire.ports[TRUNK].send(
        Ether(src=mac(TRUNK), dst=mac(VEE))
        / Dot1Q(vlan=10)
        / Dot1Q(vlan=10)
        / IP(src=f"10.10.0.{TRUNK}", dst=f"10.10.0.{VEE}")
    )

    assert wire.dropped(tap(TRUNK))["vlan"] == before + 2


def test_mirror_gets_what_is_sent_and_received_and_the_others_nothing(wire: Wire) -> None:
    out, back = bytes(udp(SEEN, ANN)), bytes(udp(ANN, SEEN))

    wire.ports[SEEN].send(out)
    wire.ports[ANN].send(back)

    assert wire.ports[EAR].receive_all() == [out, back]
    assert wire.ports[ANN].receive() == out
    assert wire.ports[SEEN].receive() == back
    assert not wire.ports[CID].receive_all()


@pytest.mark.parametrize(("sender", "receiver", "rate"), [(SLOW, ANN, 1_000_000), (ANN, SLOW, 2_000_000)])
def test_rate_is_kept_and_what_is_above_it_counted(wire: Wire, sender: int, receiver: int, rate: int) -> None:
    frame, got, began = bytes(udp(sender, receiver, 1400)), 0, time.monotonic()
    time.sleep(0.5)  # the bucket is full
    began = time.monotonic()
    while (spent := time.monotonic() - began) < 1.0:
        for _ in range(20):
            wire.ports[sender].send(frame)
        got += sum(map(len, wire.ports[receiver].receive_all_at_once()))

    assert got <= 1.05 * (rate * spent + (256 << 10))
    assert got >= 0.5 * rate
    assert wire.dropped(tap(sender))["rate"] > 0


def test_multicast_is_flooded_where_the_network_says_so(wire: Wire) -> None:
    frame = (
        Ether(src=mac(ANN), dst="01:00:5e:00:00:fb") / IP(src="10.10.0.2", dst="224.0.0.251") / UDP() / Raw(b"who")
    )
    tagged = (
        Ether(src=mac(TRUNK), dst="01:00:5e:00:00:fb")
        / Dot1Q(vlan=10)
        / IP(src=f"10.10.0.{TRUNK}", dst="224.0.0.251")
        / UDP()
    )
    wire.change(multicast="flood")
    try:
        wire.ports[ANN].send(frame)
        plain = {number for number, port in wire.ports.items() if port.receive_all() == [bytes(frame)]}
        wire.ports[TRUNK].send(tagged)
        in_vlan = {number for number, port in wire.ports.items() if port.receive_all()}
    finally:
        wire.change(multicast="drop")
    wire.ports[ANN].send(frame)

    assert plain == {BOB, CID, TRUNK, SLOW, SEEN, EAR}
    assert in_vlan == {VEE}
    assert all(not port.receive_all() for port in wire.ports.values())


# -- changes ---------------------------------------------------------------------------------------------------------


def with_guest(wire: Wire, listed: Listed) -> tuple[Listed, ...]:
    return (*(each for each in wire.wanted.listed if each.guest != listed.guest), listed)


def test_guest_that_migrates_is_followed_by_its_announcement(wire: Wire) -> None:
    """eve moves here: her tap is there before she is, and QEMU announces her when she is."""
    announcement = Ether(src=mac(EVE), dst="ff:ff:ff:ff:ff:ff", type=0x8035) / Raw(bytes(46))
    with contextlib.ExitStack() as stack:
        with_tap = there("eve", EVE)
        with links.netlink("tap") as netlink:
            links.ensure_tap(netlink, UID, "eve", with_tap.nic)
        wire.ensure(wire.wanted)
        port = Port(tap(EVE))
        stack.callback(os.close, port.fd)
        before = wire.place("10.10.0.5").flags
        port.send(announcement)
        place, place6 = wire.place("10.10.0.5"), wire.place("fd10::5")
        wire.ports[ANN].send(udp(ANN, EVE))
        got = port.receive()
        wire.run(VXLAN, announcement)  # she has left again, says another host
        after = wire.place("10.10.0.5")

    assert before & Flag.REMOTE
    assert place.flags & Flag.LOCAL
    assert place6.ifindex == place.ifindex == wire.indexes[tap(EVE)]
    assert got == bytes(udp(ANN, EVE))
    assert after.flags & Flag.REMOTE
    assert after.ifindex == wire.indexes[VXLAN]
    ip("link", "del", tap(EVE))
    wire.ensure(wire.wanted)


def test_announcement_of_somebody_elses_mac_moves_nobody(wire: Wire) -> None:
    wire.ports[ANN].send(Ether(src=mac(BOB), dst="ff:ff:ff:ff:ff:ff", type=0x8035) / Raw(bytes(46)))

    assert wire.place("10.10.0.3").ifindex == wire.indexes[tap(BOB)]


def test_address_that_changes_is_the_one_that_counts_at_once(wire: Wire) -> None:
    before = wire.wanted
    changed = replace(before, listed=with_guest(wire, Listed("cid", HERE, nic(CID, ipv4="10.10.0.40/24"))))
    wire.ensure(changed)
    try:
        wire.ports[ANN].send(Ether(src=mac(ANN), dst=mac(CID)) / IP(src="10.10.0.2", dst="10.10.0.40") / UDP())
        new = wire.ports[CID].receive()
        wire.ports[ANN].send(udp(ANN, CID))
        old = wire.ports[CID].receive_all()
    finally:
        wire.ensure(before)

    assert new
    assert not old


def test_tap_that_vanishes_leaves_no_trace_in_the_tables(wire: Wire) -> None:
    ip("link", "del", tap(CID))
    wire.dropped(tap(ANN))
    with contextlib.suppress(OSError):
        os.close(wire.ports[CID].fd)
    gone = wire.indexes[tap(CID)]

    seen = wire.facts()
    wire.ports[ANN].send(udp(ANN, CID))
    wire.ensure(wire.wanted)

    assert tap(CID) not in seen.ports
    assert wire.switch.maps["ports"].get(index(gone)) is None
    assert wire.indexes[tap(CID)] != gone
    wire.ports[CID] = Port(tap(CID))
    wire.ports[ANN].send(udp(ANN, CID))
    assert wire.ports[CID].receive() == bytes(udp(ANN, CID))


def test_counters_stay_with_their_link_and_who_comes_next_counts_from_zero(wire: Wire) -> None:
    wire.ports[ANN].send(udp(ANN, BOB))
    wire.ensure(replace(wire.wanted, listed=(*LISTED, here("zoe", ZOE))))
    before = {name: wire.counters(name) for name in (tap(ANN), tap(BOB), VXLAN, "lan")}
    zoe = Port(tap(ZOE))
    zoe.send(udp(ZOE, BOB))
    counted = wire.counters(tap(ZOE))
    (slot,) = wire.switch.slots_of([wire.indexes[tap(ZOE)]]).values()

    os.close(zoe.fd)
    dispatcher.remove_port(UID, "zoe", tap(ZOE))
    wire.ensure(replace(wire.wanted, listed=(*LISTED, here("max", MAX))))

    assert (counted.tx_packets, counted.dropped["no_port"]) == (1, 0)
    assert wire.switch.slots_of([wire.indexes[tap(MAX)]]) == {wire.indexes[tap(MAX)]: slot}, "the lowest that is free"
    assert wire.counters(tap(MAX)).tx_packets == 0
    assert {name: wire.counters(name) for name in (tap(ANN), VXLAN, "lan")} == {
        name: before[name] for name in (tap(ANN), VXLAN, "lan")
    }
    assert wire.counters(tap(BOB)).rx_packets == before[tap(BOB)].rx_packets + 1
    dispatcher.remove_port(UID, "max", tap(MAX))
    wire.ensure(replace(wire.wanted, listed=LISTED))


def test_200_ports_come_and_go_and_nothing_of_a_stream_is_lost(wire: Wire) -> None:
    """A stream runs from ann to bob all the while; every datagram has a number."""
    before, ended = wire.wanted, threading.Event()
    more = [here(f"more{count}", 300 + count, ipv4=f"10.10.0.{count + 50}/24") for count in range(200)]
    numbers: list[int] = []
    sent = 0

    def stream() -> None:
        nonlocal sent
        head = bytes(udp(ANN, BOB, 18))
        while not ended.is_set():
            wire.ports[ANN].send(head[:-8] + struct.pack("<Q", sent))
            sent += 1
            numbers.extend(struct.unpack("<Q", frame[-8:])[0] for frame in wire.ports[BOB].receive_all_at_once())
            time.sleep(0.0005)

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        for count in (*range(0, 201, 50), *range(150, -1, -50)):
            wire.ensure(replace(before, listed=(*before.listed, *more[:count])))
            for each in more[count:]:
                if each.nic.tap in wire.indexes:
                    ip("link", "del", each.nic.tap)
    finally:
        ended.set()
        thread.join()
        wire.ensure(before)
    numbers += [struct.unpack("<Q", frame[-8:])[0] for frame in wire.ports[BOB].receive_all()]

    assert sent > 1000
    assert numbers == list(range(sent))


def test_full_table_is_said(wire: Wire) -> None:
    with pytest.raises(NetworkError, match="'rules' is full"):
        wire.change(rules=[ALLOW] * 4097)
    wire.change(rules=[])


# -- hosts that cannot have it ---------------------------------------------------------------------------------------


def test_host_without_ebpf_bridges_and_says_what_is_lost_and_is_switched_when_it_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call = Call(lambda text: None)
    with (
        world(here("ann", ANN), here("bob", BOB), there("eve", EVE), kind=Wire) as made,
        contextlib.ExitStack() as stack,
    ):
        ann, bob = Port(tap(ANN)), Port(tap(BOB))
        stack.callback(os.close, ann.fd)
        stack.callback(os.close, bob.fd)
        service = NetworkService(UID, tmp_path, tmp_path)
        forged = Ether(src=mac(ANN), dst=mac(BOB)) / IP(src="10.10.0.9", dst="10.10.0.3") / UDP()
        with monkeypatch.context() as patch:
            patch.setattr(dispatcher, "unavailable", lambda: "Operation not permitted")
            said = service.ensure(call, **made.wanted.to_json())
            bridged = made.facts()
            bob.send(Ether(src=mac(BOB), dst=mac(ANN)) / IP(src="10.10.0.3", dst="10.10.0.2") / UDP())
            ann.receive()
            ann.send(forged)
            through = bob.receive_all()
        again = service.ensure(call, **made.wanted.to_json())
        switched = made.facts()
        ann.send(forged)
        stopped = bob.receive_all()

    assert said is not None
    assert "Operation not permitted; senders are not checked" in said
    assert (bridged.datapath, bridged.lacks) == ("bridge", "Operation not permitted")
    assert bytes(forged) in through
    assert again is None
    assert switched.datapath == "ebpf"
    assert switched.listed.keys() == {mac(ANN), mac(BOB), mac(EVE)}
    assert bytes(forged) not in stopped
