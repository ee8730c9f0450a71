"""Reading the switch: what it counts, what it would do, and what goes through a tap.

First in a network namespace with real links and no guests; then with guests, by the command line.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import PcapNgReader, RawPcapNgReader

from orchestrator.errors import NetworkError, NotFoundError
from orchestrator.hosts.rpc import Stream
from orchestrator.spec.resolved import ResolvedParty, ResolvedRule
from orchestrator.switch import bridge, capture, dispatcher, links, stats
from orchestrator.switch import trace as tracing
from orchestrator.switch.frames import Datagram, Protocol
from orchestrator.switch.layout import REASONS, Address, unpacked
from orchestrator.switch.layout import packed as packed_address
from orchestrator.switch.pcapng import STATISTICS, Blocks, Statistics
from tests.conftest import Sandbox
from tests.integration.test_switch_wire import Port, Wire, udp
from tests.switchworld import GATEWAY, HERE, THERE, UID, VXLAN, here, ip, mac, tap, there, world

pytestmark = pytest.mark.privileged

ANN, BOB, EVE, TRUNK, VEE, FAR_VEE, SLOW, SEEN, EAR = range(2, 11)
PLUGGED = (ANN, BOB, TRUNK, VEE, SLOW, SEEN, EAR)
NAMES = {mac(EVE): "eve", mac(FAR_VEE): "far-vee", THERE: "beta", HERE: "alpha"}


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with world(
        here("ann", ANN),
        here("bob", BOB),
        there("eve", EVE),
        here("trunk", TRUNK, trunk=[10, 20]),
        here("vee", VEE, vlan=10, group="web"),
        there("far-vee", FAR_VEE, vlan=10),
        here("slow", SLOW, rate_out=8_000_000, isolated=True),
        here("seen", SEEN, mirror=tap(EAR)),
        here("ear", EAR),
        kind=Wire,
    ) as made:
        made.ports = {number: Port(tap(number)) for number in PLUGGED}
        yield made
        for port in made.ports.values():
            os.close(port.fd)


@pytest.fixture(autouse=True)
def _quiet(request: pytest.FixtureRequest) -> None:
    if "wire" in request.fixturenames:
        for port in request.getfixturevalue("wire").ports.values():
            port.receive_all_at_once()


def stats_of(**how: Any) -> dict[str, Any]:
    return stats.read(UID, NAMES, **how).to_json()


# -- stats -----------------------------------------------------------------------------------------------------------


def network_of() -> dict[str, Any]:
    (found,) = stats_of()["networks"]
    return dict(found)


def port_of(number: int) -> dict[str, Any]:
    (found,) = [port for port in network_of()["ports"] if port["tap"] == tap(number)]
    return dict(found)


def test_network_is_told_with_what_carries_it(wire: Wire) -> None:
    found = network_of()

    assert (found["network"], found["datapath"], found["lacks"]) == ("lan", "ebpf", None)
    assert (found["uplink"], found["multicast"], found["mtu"]) == (True, "drop", 1500)
    assert (found["rules"], found["listed"], found["peers"]) == (0, 9, [THERE])
    assert (found["gateway"], found["gateway_mac"]) == (["10.10.0.1/24", "fd10::1/64"], GATEWAY)
    assert [port["guest"] for port in found["ports"]] == sorted(["ann", "bob", "trunk", "vee", "slow", "seen", "ear"])


def test_ports_are_told_with_identity_and_policy(wire: Wire) -> None:
    vee, slow, seen, trunk = (port_of(number) for number in (VEE, SLOW, SEEN, TRUNK))

    assert (vee["guest"], vee["mac"], vee["network"], vee["plugged"]) == ("vee", mac(VEE), "lan", True)
    assert vee["addresses"] == [f"10.10.0.{VEE}", f"fd10::{VEE}"]
    assert (vee["vlan"], len(vee["group"]), vee["isolated"]) == (10, 8, False)
    assert (slow["rate_out"], slow["rate_in"], slow["isolated"]) == (8_000_000, 0, True)
    assert (seen["mirror"], trunk["trunk"]) == ("ear", [10, 20])


def test_what_goes_through_is_counted_where_it_goes_through(wire: Wire) -> None:
    frame = udp(ANN, BOB)
    before = {number: port_of(number) for number in (ANN, BOB)}

    for _ in range(3):
        wire.ports[ANN].send(frame)
    wire.ports[ANN].send(Ether(src=mac(BOB), dst=mac(BOB)) / IP(src="10.10.0.2", dst="10.10.0.3"))
    wire.ports[ANN].send(
        Ether(src=mac(ANN), dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=mac(ANN), psrc="10.10.0.2", pdst="10.10.0.3")
    )

    ann, bob = (port_of(number) for number in (ANN, BOB))
    assert ann["tx_packets"] - before[ANN]["tx_packets"] == 4, "the ARP request, too"
    assert ann["answered"] - before[ANN]["answered"] == 1
    assert ann["dropped"].get("source_mac", 0) - before[ANN]["dropped"].get("source_mac", 0) == 1
    assert bob["rx_packets"] - before[BOB]["rx_packets"] == 3
    assert bob["rx_bytes"] - before[BOB]["rx_bytes"] == 3 * len(frame)
    assert 0 <= ann["last_seen_seconds_ago"] < 10
    assert set(ann["dropped"]) <= set(REASONS)


def test_other_hosts_and_the_host_itself_are_counted(wire: Wire) -> None:
    before = network_of()
    frame = udp(ANN, EVE)

    wire.ports[ANN].send(frame)
    wire.ports[ANN].send(udp(ANN, 1))
    wire.run(VXLAN, Ether(src=mac(EVE), dst=mac(ANN)) / IP(src="10.10.0.4", dst="10.10.0.2") / UDP())

    after = network_of()
    sent, come = (after["underlay"][key] - before["underlay"][key] for key in ("rx_packets", "tx_packets"))
    assert (sent, come) == (1, 1)
    assert after["underlay"]["rx_bytes"] - before["underlay"]["rx_bytes"] == len(frame)
    assert after["host"]["rx_packets"] - before["host"]["rx_packets"] == 1


def test_pairs_have_names(wire: Wire) -> None:
    wire.ports[ANN].send(udp(ANN, EVE))
    wire.ports[ANN].send(udp(ANN, 1))

    found = stats_of(with_pairs=True)["pairs"]

    named = {(pair["sender"], pair["receiver"]): pair for pair in found}
    assert named["ann", "eve"]["packets"] >= 1
    assert named["ann", "host"]["receiver_mac"] == GATEWAY
    assert named["ann", "eve"]["network"] == "lan"
    assert named["ann", "eve"]["last_seen_seconds_ago"] < 10
    assert stats_of()["pairs"] is None


def test_frames_that_a_guest_does_not_take_are_told(wire: Wire) -> None:
    before = port_of(BOB)["overruns"]

    for _ in range(1500):  # the queue of a tap has 1000 places
        wire.ports[ANN].send(udp(ANN, BOB))

    assert port_of(BOB)["overruns"] - before >= 500


def test_tap_that_the_switch_does_not_know_is_not_plugged_in(wire: Wire) -> None:
    with links.netlink("tap") as netlink:
        links.ensure_tap(netlink, UID, "new", here("new", 40).nic)
    try:
        assert not port_of(40)["plugged"]
    finally:
        ip("link", "del", tap(40))


# -- trace -----------------------------------------------------------------------------------------------------------


def datagram(receiver: int | str, protocol: Protocol = Protocol.UDP, sender: int = ANN, **changes: Any) -> bytes:
    """From ``sender`` to a guest, or to an address; IPv4 unless the address says something else."""
    target = _address(receiver if isinstance(receiver, str) else f"10.10.0.{receiver}")
    own = f"10.10.0.{sender}" if target.version == 4 else f"fd10::{sender:x}"
    to = mac(receiver) if isinstance(receiver, int) else GATEWAY
    made: dict[str, Any] = {"source_mac": mac(sender), "target_mac": to, "source": _address(own), "port": 53}
    return Datagram(protocol=protocol, target=target, **{**made, **changes}).frame()


def _address(text: str) -> Address:
    return unpacked(packed_address(text))


def trace(frame: bytes, sender: int = ANN) -> dict[str, Any]:
    return tracing.run(UID, "lan", tap(sender), frame, NAMES).to_json()


GOES: dict[str, tuple[bytes, str, str | None]] = {
    "udp": (datagram(BOB), "guest", "bob"),
    "tcp": (datagram(BOB, Protocol.TCP), "guest", "bob"),
    "icmp": (datagram(BOB, Protocol.ICMP), "guest", "bob"),
    "icmp of ipv6": (datagram("fd10::3", Protocol.ICMP), "guest", "bob"),
    "to another host": (datagram(EVE), "underlay", "eve"),
    "to the gateway": (datagram("10.10.0.1", Protocol.ICMP), "host", "host"),
    "out": (datagram("198.51.100.9"), "uplink", None),
    "out, ipv6": (datagram("2001:db8:9::9", Protocol.TCP), "uplink", None),
    "arp": (datagram(BOB, Protocol.ARP), "answer", "bob"),
    "arp for a guest of another host": (datagram(EVE, Protocol.ARP), "answer", "eve"),
    "arp for the gateway": (datagram("10.10.0.1", Protocol.ARP), "answer", "host"),
    "arp for itself": (datagram(ANN, Protocol.ARP), "none", None),
    "solicitation": (datagram("fd10::4", Protocol.ND), "answer", "eve"),
}
DROPPED: dict[str, tuple[bytes, str]] = {
    "to nobody": (datagram("10.10.0.200"), "no_destination"),
    "mac of another": (datagram(BOB, source_mac=mac(BOB)), "source_mac"),
    "address of another": (datagram(BOB, source=_address("10.10.0.4")), "source_ipv4"),
    "address of another, ipv6": (datagram("fd10::3", source=_address("fd10::4")), "source_ipv6"),
    "arp for another": (datagram(BOB, Protocol.ARP, source=_address("10.10.0.4")), "arp"),
    "multicast": (datagram("224.0.0.251"), "multicast"),
    "to another vlan": (datagram(VEE), "vlan"),
    "tag of somebody who may use none": (datagram(BOB, vlan=10), "vlan"),
}


@pytest.mark.parametrize("case", GOES)
def test_trace_tells_where_a_datagram_goes(wire: Wire, case: str) -> None:
    frame, fate, receiver = GOES[case]

    told = trace(frame)

    assert (told["fate"], told["receiver"], told["datapath"]) == (fate, receiver, "ebpf")
    assert told["reason"] is None
    assert told["next"]


@pytest.mark.parametrize("case", DROPPED)
def test_trace_tells_why_a_datagram_is_dropped(wire: Wire, case: str) -> None:
    frame, reason = DROPPED[case]

    told = trace(frame)

    assert (told["fate"], told["reason"], told["meaning"]) == ("drop", reason, REASONS[reason])
    assert told["meaning"] in told["next"]


@pytest.mark.parametrize(
    ("vlan", "receiver", "fate"), [(10, VEE, "guest"), (20, VEE, "drop"), (30, VEE, "drop"), (None, ANN, "guest")]
)
def test_trace_of_a_tagged_frame(wire: Wire, vlan: int | None, receiver: int, fate: str) -> None:
    assert trace(datagram(receiver, sender=TRUNK, vlan=vlan), TRUNK)["fate"] == fate


def test_trace_is_neither_counted_nor_sent(wire: Wire) -> None:
    frames = [datagram(BOB), datagram(EVE), datagram(BOB, source_mac=mac(BOB)), datagram(BOB, Protocol.ARP)]
    before = network_of(), stats_of(with_pairs=True)["pairs"]

    for frame in frames:
        trace(frame)

    after = network_of(), stats_of(with_pairs=True)["pairs"]
    assert _counts(after) == _counts(before)
    assert all(not port.receive_all() for port in wire.ports.values())


def _counts(found: Any) -> Any:
    """Without the times since something was seen."""
    if isinstance(found, dict):
        return {key: _counts(value) for key, value in found.items() if key != "last_seen_seconds_ago"}
    return [_counts(each) for each in found] if isinstance(found, list | tuple) else found


@pytest.mark.parametrize(
    ("sender", "receiver", "vlan"), [(ANN, EVE, None), (VEE, FAR_VEE, None), (TRUNK, FAR_VEE, 10)]
)
def test_frame_for_another_host_is_the_one_that_host_gets(
    wire: Wire, sender: int, receiver: int, vlan: int | None
) -> None:
    told = trace(datagram(receiver, sender=sender, vlan=vlan), sender)
    frame = Ether(bytes.fromhex(told["frame"]))

    assert (told["fate"], told["to_host"], told["link"]) == ("underlay", THERE, VXLAN)
    assert "on beta" in told["next"]
    assert (frame.src, frame.dst) == (mac(sender), mac(receiver))
    assert (Dot1Q in frame) == (receiver == FAR_VEE)


COMES: dict[str, tuple[bytes, str, str | None]] = {
    "to a guest": (datagram(ANN, sender=EVE), "guest", "ann"),
    "to a guest of the vlan": (datagram(VEE, sender=FAR_VEE, vlan=10), "guest", "vee"),
    "to a trunk": (datagram(TRUNK, sender=FAR_VEE, vlan=10), "guest", "trunk"),
    "without the tag of its vlan": (datagram(VEE, sender=FAR_VEE), "drop", None),
    "mac of nobody": (datagram(ANN, sender=EVE, source_mac=mac(77)), "drop", None),
}


@pytest.mark.parametrize("case", COMES)
def test_trace_of_what_comes_from_another_host(wire: Wire, case: str) -> None:
    frame, fate, receiver = COMES[case]

    told = tracing.run(UID, "lan", None, frame, NAMES)

    assert (told.fate, told.receiver) == (fate, receiver)


ANY = ResolvedParty(side="any")


def test_trace_tells_the_rule(wire: Wire) -> None:
    def rule(allow: bool, port: int) -> ResolvedRule:
        return ResolvedRule(allow=allow, sender=ANY, receiver=ANY, protocol=17, low=port, high=port, family=0)

    wire.change(rules=[rule(True, 80), rule(False, 53)])
    try:
        denied, allowed, other = (trace(datagram(BOB, port=port)) for port in (53, 80, 99))
    finally:
        wire.change(rules=[])

    assert (denied["fate"], denied["reason"], denied["rule"]) == ("drop", "rule", 2)
    assert "(rule 2 of network lan)" in denied["next"]
    assert (allowed["fate"], allowed["rule"]) == ("guest", 1)
    assert (other["fate"], other["rule"]) == ("guest", None)


def test_trace_of_a_tap_that_is_not_plugged_in(wire: Wire) -> None:
    with links.netlink("tap") as netlink:
        links.ensure_tap(netlink, UID, "new", here("new", 40).nic)
    try:
        with pytest.raises(NetworkError, match="the switch does not sit at"):
            trace(datagram(BOB, sender=40), 40)
    finally:
        ip("link", "del", tap(40))


def test_switch_of_another_version_is_neither_misread_nor_misused(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = dispatcher.MAPS["pairs"]
    monkeypatch.setitem(dispatcher.MAPS, "pairs", (*size[:2], size[2] + 1))

    for ask in (stats_of, lambda: trace(datagram(BOB))):
        with pytest.raises(NetworkError, match="of another version"):
            ask()


def test_trace_of_what_is_not_there(wire: Wire) -> None:
    with pytest.raises(NotFoundError, match="there is no tap"):
        trace(datagram(BOB), 99)
    with pytest.raises(NotFoundError, match="network wan is not on this host"):
        tracing.run(UID, "wan", tap(ANN), datagram(BOB), NAMES)


# -- capture ---------------------------------------------------------------------------------------------------------


LIMITS: dict[str, Any] = {"snap": 1 << 18, "count": None, "seconds": None}


class Recording:
    """A capture under way, and all that has come of it."""

    def __init__(self, guest: str = "ann", number: int = ANN, **limits: Any):
        self.raw = b""
        self.failure: Exception | None = None
        ours, theirs = socket.socketpair()
        self.stream = ours
        opened = threading.Event()

        def open_stream() -> Stream:
            opened.set()
            return theirs

        def serve() -> None:
            try:
                capture.serve(UID, open_stream, guest, tap(number), **{**LIMITS, **limits})
            except OSError as error:
                self.failure = error
            theirs.close()

        self.thread = threading.Thread(target=serve)
        self.thread.start()
        assert opened.wait(20)
        self.until(lambda raw: len(raw) > 100)  # the head: frames are heard from now on

    def until(self, seen: Callable[[bytes], bool]) -> None:
        while not seen(self.raw):
            data = self.stream.recv(1 << 20)
            assert data, "it ended"
            self.raw += data

    def stop(self) -> None:
        self.stream.sendall(b".")

    def end(self) -> tuple[list[Packet], Statistics]:
        self.stream.settimeout(20)
        while data := self.stream.recv(1 << 20):
            self.raw += data
        self.thread.join()
        self.stream.close()
        last = Blocks().feed(self.raw)[-1]
        assert last.kind == STATISTICS
        return list(PcapNgReader(io.BytesIO(self.raw))), Statistics.of(last)


def test_capture_has_both_directions_and_what_the_switch_drops(wire: Wire) -> None:
    sent, got = bytes(udp(ANN, BOB)), bytes(udp(BOB, ANN))
    forged = bytes(Ether(src=mac(BOB), dst=mac(BOB)) / IP(src="10.10.0.9", dst="10.10.0.3") / UDP())
    began = time.time_ns()

    recording = Recording(count=3)
    wire.ports[ANN].send(sent)
    wire.ports[BOB].send(got)
    wire.ports[ANN].send(forged)
    packets, end = recording.end()

    assert [bytes(packet) for packet in packets] == [sent, got, forged]
    assert [meta.direction for _, meta in RawPcapNgReader(io.BytesIO(recording.raw))] == [1, 2, 1]
    assert all(began <= packet.time * 10**9 <= time.time_ns() for packet in packets)
    assert {packet.sniffed_on for packet in packets} == {tap(ANN)}
    assert (end.received, end.dropped, end.comment) == (3, 0, "as many as were asked for")


def test_capture_keeps_as_much_of_a_frame_as_it_is_told_to(wire: Wire) -> None:
    frame = bytes(udp(ANN, BOB, 1000))

    recording = Recording(count=1, snap=64)
    wire.ports[ANN].send(frame)
    (packet,), _ = recording.end()

    assert (bytes(packet), packet.wirelen) == (frame[:64], len(frame))


def test_capture_has_the_tag_that_the_kernel_keeps_elsewhere(wire: Wire) -> None:
    out = Ether(src=mac(TRUNK), dst=mac(VEE)) / Dot1Q(vlan=10, prio=3)
    out /= IP(src=f"10.10.0.{TRUNK}", dst=f"10.10.0.{VEE}") / UDP() / Raw(bytes(40))

    recording = Recording("trunk", TRUNK, count=2)
    wire.ports[TRUNK].send(out)
    wire.ports[VEE].send(udp(VEE, TRUNK))
    (sent, got), _ = recording.end()

    assert bytes(sent) == bytes(out)
    assert sent.wirelen == len(out)
    assert (got[Dot1Q].vlan, got[UDP].dport) == (10, 7)


def test_capture_that_is_not_read_loses_frames_and_says_how_many(wire: Wire) -> None:
    """Memory is bounded: nobody reads while 60 MB are sent."""
    frame = bytes(udp(ANN, BOB, 1400))
    recording = Recording()
    for _ in range(40_000):
        wire.ports[ANN].send(frame)

    recording.stop()
    packets, end = recording.end()

    assert end.received == 40_000
    assert end.dropped > 0
    assert len(packets) == end.received - end.dropped
    assert {bytes(packet) for packet in packets} == {frame}
    assert len(recording.raw) < 40 << 20


def test_capture_ends_when_the_tap_goes(wire: Wire) -> None:
    with links.netlink("tap") as netlink:
        links.ensure_tap(netlink, UID, "new", here("new", 40).nic)
    ip("link", "set", tap(40), "up")
    recording = Recording("new", 40)

    ip("link", "del", tap(40))
    packets, end = recording.end()

    assert (packets, end.comment) == ([], "the tap has gone")


def test_capture_goes_on_while_the_tap_is_down(wire: Wire) -> None:
    recording = Recording()
    ip("link", "set", tap(ANN), "down")
    ip("link", "set", tap(ANN), "up")
    wire.ports[ANN].send(udp(ANN, BOB))
    recording.until(lambda raw: bytes(udp(ANN, BOB)) in raw)

    recording.stop()
    packets, end = recording.end()

    assert (len(packets), end.comment) == (1, "stopped")


def test_capture_of_somebody_elses_tap_is_refused(wire: Wire) -> None:
    for guest, link in (("bob", tap(ANN)), ("ann", "underlay")):
        with pytest.raises(NotFoundError, match=f"guest {guest} has no tap {link}"):
            capture.serve(UID, lambda: pytest.fail("opened"), guest, link, **LIMITS)


# -- a network that is bridged ---------------------------------------------------------------------------------------


@pytest.fixture
def bridged(wire: Wire) -> Iterator[None]:
    wanted = wire.wanted
    changed = wanted.network.model_copy(update={"datapath": "bridge"})
    bridge.ensure(UID, type(wanted)(changed, wanted.local, wanted.peers, wanted.forward, wanted.listed))
    yield
    wire.ensure(wanted)


def test_bridge_counts_at_its_links_and_lets_everything_pass(wire: Wire, bridged: None) -> None:
    before = port_of(ANN)
    wire.ports[ANN].send(Ether(src=mac(ANN), dst=mac(BOB)) / IP(src="10.10.0.2", dst="10.10.0.3") / ICMP())

    found, ann = network_of(), port_of(ANN)
    told = trace(datagram(BOB, source_mac=mac(BOB)))

    assert (found["datapath"], found["lacks"], found["rules"], found["listed"]) == ("bridge", None, None, None)
    assert ann["tx_packets"] - before["tx_packets"] == 1
    assert (ann["plugged"], ann["addresses"], ann["answered"], ann["last_seen_seconds_ago"]) == (True, [], None, None)
    assert (told["datapath"], told["fate"]) == ("bridge", "bridge")
    assert stats_of(with_pairs=True)["pairs"] == []


# -- with guests, by the command line --------------------------------------------------------------------------------

LAB = """\
lab: reading
hosts: {alpha: {}, beta: {}}
networks:
  lan:
    ipv4: 10.83.0.0/24
    ipv6: "fd83::/64"
    rules: [{action: deny, destination: eve, protocol: tcp, ports: 22}]
defaults: {guest: {memory: 192M, nics: [lan]}}
guests:
  ann: {host: alpha}
  bob: {host: alpha, nics: [{network: lan, rate_out: 100M}]}
  eve: {host: beta}
"""


@pytest.fixture(scope="module")
def lab(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    shared_sandbox.file(LAB)
    shared_sandbox.run("up")
    yield shared_sandbox
    shared_sandbox.run("down")


def test_command_line_shows_what_guests_do(lab: Sandbox) -> None:
    lab.exec("ann", "ping", "-c", "3", "-i", "0.2", "10.83.0.4")

    stats = lab.json("switch", "stats", "--pairs")
    shown = lab.json("switch", "show")
    ports = {port["guest"]: port for port in lab.json("switch", "ports")}

    ann, bob, eve = (next(port for port in stats["ports"] if port["guest"] == name) for name in ("ann", "bob", "eve"))
    assert (ann["host"], ann["datapath"], eve["host"]) == ("alpha", "ebpf", "beta")
    assert ann["tx_packets"] >= 3
    assert ann["rx_packets"] >= 3
    assert eve["rx_packets"] >= 3
    assert bob["last_seen_seconds_ago"] is not None
    pairs = {(pair["host"], pair["sender"], pair["receiver"]): pair["packets"] for pair in stats["pairs"]}
    assert all(pairs[host, *way] >= 3 for host in ("alpha", "beta") for way in (("ann", "eve"), ("eve", "ann")))
    assert [(host["host"], host["networks"][0]["ports"], host["networks"][0]["listed"]) for host in shown] == [
        ("alpha", 2, 3),
        ("beta", 1, 3),
    ]
    assert ports["bob"]["rate_out"] == 100_000_000
    assert ports["eve"]["addresses"] == ["10.83.0.4", "fd83::4"]
    assert "10.83.0.4 fd83::4" in lab.run("switch", "ports", "eve").stdout


def test_command_line_traces_across_hosts(lab: Sandbox) -> None:
    there = lab.json("switch", "trace", "ann", "eve", "--ipv6")
    denied = lab.json("switch", "trace", "ann", "eve", "--port", "22")
    forged = lab.json("switch", "trace", "ann", "bob", "--from", "10.83.0.4")
    asked = lab.json("switch", "trace", "ann", "eve", "-p", "nd")

    assert there["reaches"]
    assert [(step["host"], step["fate"], step["receiver"]) for step in there["steps"]] == [
        ("alpha", "underlay", "eve"),
        ("beta", "guest", "eve"),
    ]
    assert (denied["reaches"], denied["steps"][-1]["reason"], denied["steps"][-1]["rule"]) == (False, "rule", 1)
    assert forged["steps"][0]["reason"] == "source_ipv4"
    assert (asked["reaches"], asked["steps"][0]["fate"]) == (True, "answer")
    assert (
        "rule 1 of lan: deny tcp 22 from any to eve"
        in lab.run("switch", "trace", "ann", "eve", "--port", "22").stdout
    )


def test_command_line_captures(lab: Sandbox) -> None:
    file = lab.folder / "eve.pcapng"
    capture = lab.start("switch", "capture", "eve", "-w", file)
    _appears(file)
    lab.exec("ann", "ping", "-c", "2", "-i", "0.2", "10.83.0.4")
    capture.send_signal(signal.SIGINT)
    _, told = capture.communicate(timeout=30)

    pings = [packet[ICMP].type for packet in PcapNgReader(io.BytesIO(file.read_bytes())) if ICMP in packet]
    assert pings == [8, 0, 8, 0]
    assert capture.returncode == 0
    assert "frames: stopped" in told


def _appears(file: Path) -> None:
    """The capture has begun: its head is there."""
    end = time.monotonic() + 30
    while not (file.exists() and file.stat().st_size):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_command_line_captures_into_a_pipe_until_nobody_reads(lab: Sandbox) -> None:
    readable, writable = os.pipe()
    capture = lab.start("switch", "capture", "eve", stdout=writable)
    os.close(writable)
    head = os.read(readable, 1 << 16)
    os.close(readable)
    lab.exec("ann", "ping", "-c", "1", "10.83.0.4")
    _, told = capture.communicate(timeout=30)

    assert head.startswith(b"\x0a\x0d\x0d\x0a")
    assert capture.returncode == 0
    assert "whoever read them has gone" in told
