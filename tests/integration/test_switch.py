"""The switch under real guests: who hears whom, what a lying guest gets through, and what happens meanwhile."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyroute2 import netns
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from orchestrator import names
from orchestrator.spec.resolved import ResolvedLab, ResolvedNic
from orchestrator.switch import control, dispatcher, filters, links
from orchestrator.switch.layout import Counters
from orchestrator.switch.membership import Listed
from tests.conftest import Sandbox
from tests.guest_use import wait_until
from tests.switchworld import total

pytestmark = pytest.mark.privileged

ALPHA = "orc.switched.alpha"
OUTSIDE = ("192.0.2.81", "192.0.2.82", "192.0.2.83")

LAB = """\
lab: switched
hosts: {alpha: {}, beta: {}}
networks:
  lan: {ipv4: 10.81.0.0/24, ipv6: "fd81::/64", uplink: true}
defaults: {guest: {memory: 192M, nics: [lan]}}
guests:
  ann: {host: alpha}
  bob: {host: alpha}
  cid: {host: alpha}
  eve: {host: beta}
"""


@pytest.fixture(scope="module")
def lab(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    shared_sandbox.file(LAB)
    shared_sandbox.run("up")
    with contextlib.ExitStack() as stack:
        for address in OUTSIDE:
            subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
            stack.callback(subprocess.run, ["ip", "addr", "del", f"{address}/32", "dev", "lo"], check=True)
        yield shared_sandbox
    shared_sandbox.run("down")


def resolved(lab: Sandbox) -> ResolvedLab:
    return ResolvedLab.model_validate_json((lab.folder / "state/labs/switched/lab.json").read_text())


def nic_of(lab: Sandbox, guest: str) -> ResolvedNic:
    return resolved(lab).guests[guest].nics[0]


@contextlib.contextmanager
def inside(namespace: str = ALPHA) -> Iterator[None]:
    netns.pushns(namespace)
    try:
        yield
    finally:
        netns.popns()


def counters(lab: Sandbox, guest: str) -> Counters:
    """Of a guest on alpha."""
    with inside(), links.netlink("counters") as ip, dispatcher.opened(ip, resolved(lab).uid, ip.get_links()) as made:
        assert made is not None
        return total(made, int(ip.link_lookup(ifname=nic_of(lab, guest).tap)[0]))


@contextlib.contextmanager
def listening(link: str) -> Iterator[list[bytes]]:
    """Every frame at a link of alpha, in both directions, until the block ends."""
    with inside():
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sniffer.bind((link, 3))
    sniffer.settimeout(0.2)
    ended, frames = threading.Event(), []

    def listen() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                frames.append(sniffer.recv(1 << 16))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield frames
        time.sleep(0.3)
    finally:
        ended.set()
        thread.join()
        sniffer.close()


def ping(lab: Sandbox, guest: str, to: str, *options: str, count: int = 3) -> int:
    """How many of ``count`` were answered."""
    said = lab.exec(guest, "ping", "-c", str(count), "-i", "0.2", "-W", "3", "-q", *options, to, status=None)
    match = re.search(r"(\d+) packets received", said)
    return int(match[1]) if match else 0


def address(lab: Sandbox, guest: str, version: int = 4) -> str:
    return next(each for each in nic_of(lab, guest).addresses if (":" in each) == (version == 6))


# -- who hears whom --------------------------------------------------------------------------------------------------


def test_datagrams_reach_the_other_guest_and_a_third_one_hears_nothing(lab: Sandbox) -> None:
    before = counters(lab, "cid").rx_packets
    with listening(nic_of(lab, "cid").tap) as heard:
        answered = [ping(lab, "ann", address(lab, "bob", version)) for version in (4, 6)]
        answered += [ping(lab, "bob", address(lab, "eve", version)) for version in (4, 6)]

    frames = [Ether(frame) for frame in heard]
    strangers = [frame for frame in frames if nic_of(lab, "cid").mac not in (frame.src, frame.dst)]
    assert answered == [3, 3, 3, 3]
    assert strangers == []
    assert counters(lab, "cid").rx_packets == before


def test_addresses_that_a_guest_writes_are_those_that_arrive(lab: Sandbox) -> None:
    with (
        listening(nic_of(lab, "ann").tap) as sent,
        listening(nic_of(lab, "bob").tap) as got,
        listening("uplink") as out,
    ):
        ping(lab, "ann", address(lab, "bob"))
        ping(lab, "ann", address(lab, "bob", 6))
        ping(lab, "ann", OUTSIDE[0])

    def requests(frames: list[bytes], kind: int, layer: type) -> list[bytes]:
        """From the IP header on, of ann's echo requests."""
        found = [Ether(frame) for frame in frames]
        mine = [frame for frame in found if layer in frame and frame[layer].src in nic_of(lab, "ann").addresses]
        return [bytes(frame[layer]) for frame in mine if bytes(frame[layer].payload)[:1] == bytes([kind])]

    for kind, layer in ((8, IP), (128, IPv6)):
        wrote = requests(sent, kind, layer)
        assert requests(got, kind, layer) == [one for one in wrote if one in requests(got, kind, layer)]
        assert len(requests(got, kind, layer)) == 3
    to_outside = [one for one in requests(sent, 8, IP) if IP(one).dst == OUTSIDE[0]]
    assert requests(out, 8, IP) == to_outside, "not even the hop count is another"
    assert len(to_outside) == 3


def test_many_guests_and_many_destinations_at_once(lab: Sandbox) -> None:
    wanted = [
        (guest, to)
        for guest in ("ann", "bob", "cid", "eve")
        for to in (*OUTSIDE, *(address(lab, other) for other in ("ann", "bob", "cid", "eve") if other != guest))
    ]
    answers: dict[tuple[str, str], int] = {}

    def ask(guest: str) -> None:
        script = "; ".join(f"ping -c 3 -i 0.2 -W 3 -q {to} &" for who, to in wanted if who == guest).replace(
            "&;", "&"
        )
        said = lab.exec(guest, "sh", "-c", f"{script} wait")
        for to, got in re.findall(r"--- (\S+) ping statistics ---\n3 packets transmitted, (\d)", said):
            answers[guest, to] = int(got)

    threads = [threading.Thread(target=ask, args=(guest,)) for guest in ("ann", "bob", "cid", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == dict.fromkeys(wanted, 3)


def test_outside_reaches_a_guest_and_only_while_the_uplink_is_up(lab: Sandbox) -> None:
    link = names.link("u", resolved(lab).uid, "alpha")
    to = address(lab, "ann")

    def reach() -> int:
        return subprocess.run(["ping", "-c", "1", "-W", "2", to], capture_output=True).returncode

    first = reach()
    subprocess.run(["ip", "link", "set", link, "down"], check=True)
    without = reach()
    neighbours = ping(lab, "ann", address(lab, "bob"))
    subprocess.run(["ip", "link", "set", link, "up"], check=True)
    lab.run("up")

    assert (first, neighbours) == (0, 3)
    assert without != 0
    wait_until(lambda: reach() == 0, "the uplink does not come back", 30)


def test_sender_learns_what_the_uplink_carries(lab: Sandbox) -> None:
    """A guest with a link of 1500 bytes sends to somebody behind one of 1300: the host tells it, and all arrives."""
    subprocess.run(["ip", "-n", ALPHA, "link", "set", "uplink", "mtu", "1300"], check=True)
    try:
        with socket.create_server((OUTSIDE[1], 0)) as listener:
            listener.settimeout(60)
            port = listener.getsockname()[1]
            asking = lab.start(
                "exec", "ann", "--", "sh", "-c", f"head -c 300000 /dev/zero | nc -w 20 {OUTSIDE[1]} {port}"
            )
            stream, _ = listener.accept()
            stream.settimeout(60)
            got = 0
            with stream:
                while part := stream.recv(1 << 16):
                    got += len(part)
            asking.communicate(timeout=60)
    finally:
        subprocess.run(["ip", "-n", ALPHA, "link", "set", "uplink", "mtu", "1500"], check=True)

    assert got == 300_000


# -- a guest that lies -----------------------------------------------------------------------------------------------


def test_guest_that_takes_another_address_gets_nothing_through(lab: Sandbox) -> None:
    taken, free = address(lab, "cid"), "10.81.0.99"
    before = counters(lab, "ann").dropped
    lab.exec("ann", "sh", "-c", f"ip addr add {taken}/24 dev eth0; ip addr add {free}/24 dev eth0")
    try:
        with listening(nic_of(lab, "bob").tap) as heard:
            answered = [ping(lab, "ann", address(lab, "bob"), "-I", forged) for forged in (taken, free)]
    finally:
        lab.exec("ann", "sh", "-c", f"ip addr del {taken}/24 dev eth0; ip addr del {free}/24 dev eth0")
    after = counters(lab, "ann").dropped

    assert answered == [0, 0]
    assert [frame for frame in map(Ether, heard) if IP in frame and frame[IP].src in (taken, free)] == []
    assert after["source_ipv4"] + after["arp"] >= before["source_ipv4"] + before["arp"] + 4
    assert ping(lab, "ann", address(lab, "bob")) == 3


def test_guest_that_takes_another_mac_gets_nothing_through_until_it_has_its_own_again(lab: Sandbox) -> None:
    own, before = nic_of(lab, "ann").mac, counters(lab, "ann").dropped["source_mac"]
    change = "ip link set eth0 down; ip link set eth0 address {}; ip link set eth0 up"
    route = lab.exec("ann", "ip", "route", "show", "default").splitlines()[0]
    lab.exec("ann", "sh", "-c", change.format("02:de:ad:be:ef:01"))
    answered = ping(lab, "ann", address(lab, "bob"))
    lab.exec("ann", "sh", "-c", f"{change.format(own)}; ip route replace {route}")
    back = lab.exec("ann", "cat", "/sys/class/net/eth0/address").strip()

    assert answered == 0
    assert counters(lab, "ann").dropped["source_mac"] > before
    assert back == own
    assert ping(lab, "ann", address(lab, "bob")) == 3


# -- what happens meanwhile ------------------------------------------------------------------------------------------


def test_traffic_goes_on_without_the_agent_and_the_next_one_takes_the_switch_over(lab: Sandbox) -> None:
    running = lab.start("exec", "bob", "--", "ping", "-c", "40", "-i", "0.2", "-q", address(lab, "eve"))
    with inside():
        pids = [int(pid) for pid in netns.ns_pids().get(ALPHA, [])]
    agents = [pid for pid in pids if b"orchestrator.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    before = _program(lab)
    for pid in agents:
        subprocess.run(["kill", f"-{int(signal.SIGKILL)}", str(pid)], check=True)
    alone = subprocess.run(["ping", "-c", "3", "-i", "0.2", "-W", "3", address(lab, "ann")], capture_output=True)
    running.communicate(timeout=60)
    lab.file(LAB + "  dan: {host: alpha}\n")
    lab.run("up")
    after = _program(lab)
    reached = ping(lab, "dan", address(lab, "eve"))
    lab.file(LAB)
    lab.run("up", "--yes")

    assert agents
    assert alone.returncode == 0
    assert reached == 3
    assert after == before, "the program that ran goes on"
    assert lab.json("plan")["operations"] == []


def _program(lab: Sandbox) -> int:
    """Number of the program at ann's tap."""
    with inside(), links.netlink("filter") as ip:
        found = filters.find(ip, ip.link_lookup(ifname=nic_of(lab, "ann").tap)[0], filters.INGRESS, "orchestrator:")
    assert found is not None
    return found.program


def test_tap_that_vanishes_is_made_anew_by_up(lab: Sandbox) -> None:
    subprocess.run(["ip", "-n", ALPHA, "link", "del", nic_of(lab, "cid").tap], check=True)

    plan = {(one["subject"], one["impact"]) for one in lab.json("plan")["operations"]}
    lab.run("up")

    assert ("guest cid", "restart") in plan
    assert ping(lab, "cid", address(lab, "bob")) == 3
    assert "nothing to do" in lab.run("up").stderr


def test_200_ports_come_and_go_during_30_seconds_and_nothing_of_a_stream_is_lost(lab: Sandbox) -> None:
    made = resolved(lab)
    (member,) = control.wanted(made, "alpha")
    began = time.monotonic()
    to_bob = ["ping", "-c", "600", "-i", "0.05", "-q", address(lab, "bob")]
    stream = lab.start("exec", "--timeout", "90", "ann", "--", *to_bob)
    nics = [nic_of(lab, "ann").model_copy(update=_another(count)) for count in range(200)]
    more = [Listed("more", member.local, nic) for nic in nics]
    changes = 0
    with inside(), links.netlink("ports") as ip:
        while stream.poll() is None:
            for listed in more:
                links.ensure_tap(ip, made.uid, "more", listed.nic)
            dispatcher.ensure(made.uid, replace(member, listed=(*member.listed, *more)))
            for listed in more:
                dispatcher.remove_port(made.uid, "more", listed.nic.tap)
            dispatcher.ensure(made.uid, member)
            changes += 1
    said, _ = stream.communicate()

    assert "600 packets transmitted, 600 packets received, 0% packet loss" in said
    assert time.monotonic() - began >= 30
    assert changes > 0
    assert lab.json("plan")["operations"] == []


def _another(count: int) -> dict[str, str]:
    """A NIC that no guest has."""
    return {
        "mac": f"02:00:00:01:00:{count:02x}",
        "tap": f"ot-{count:08x}",
        "ipv4": f"10.81.0.{count + 50}/24",
        "ipv6": f"fd81::{count + 0x5000:x}/64",
    }


def test_policy_changes_while_the_guests_run(lab: Sandbox) -> None:
    boot = lab.exec("ann", "cat", "/proc/sys/kernel/random/boot_id")
    rules = "uplink: true, rules: [{action: deny, source: ann, destination: bob}]}"
    isolated, grouped = "{network: lan, isolated: true}", "{network: lan, group: far}"
    changed = LAB.replace("uplink: true}", rules).replace("beta}\n", f"beta, nics: [{grouped}]}}\n")
    lab.file(changed.replace("cid: {host: alpha}", f"cid: {{host: alpha, nics: [{isolated}]}}"))
    impacts = {one["impact"] for one in lab.json("plan")["operations"]}
    lab.run("up")
    closed = [ping(lab, "ann", address(lab, "bob")), ping(lab, "cid", address(lab, "eve"))]
    open_ = [ping(lab, one, address(lab, other)) for one, other in (("bob", "ann"), ("ann", "eve"), ("cid", "ann"))]
    lab.file(LAB)
    lab.run("up")

    assert impacts == {"live"}
    assert (closed, open_) == ([0, 0], [3, 3, 3])
    assert ping(lab, "ann", address(lab, "bob")) == 3
    assert lab.exec("ann", "cat", "/proc/sys/kernel/random/boot_id") == boot


def test_two_labs_on_one_machine_have_switches_of_their_own(lab: Sandbox, sandbox: Sandbox) -> None:
    """With the same addresses and the same names of guests."""
    other = LAB.replace("lab: switched", "lab: other").replace("uplink: true", "uplink: false")
    sandbox.file(other.replace("  bob: {host: alpha}\n  cid: {host: alpha}\n", ""))
    sandbox.run("up")

    assert all(one["milliseconds"] is not None for one in sandbox.json("reach"))
    assert ping(lab, "ann", address(lab, "eve")) == 3
    sandbox.run("down")
    assert ping(lab, "ann", address(lab, "eve")) == 3
