"""``orchestrator switch``, on hosts in memory."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import json
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from ruamel.yaml import YAML
from scapy.packet import Packet
from scapy.utils import PcapNgReader

from orchestrator.cli import app as cli_app
from orchestrator.cli import capture as cli_capture
from orchestrator.cli import output, session, tools, trace
from orchestrator.cli import switch as cli_switch
from orchestrator.errors import HostError
from orchestrator.hosts.transport import HostFacts
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.state import LabState
from orchestrator.switch.frames import BROADCAST
from orchestrator.switch.stats import Counted, PairStats
from orchestrator.testing import MemoryLab, perfect
from tests.unit.labs import resolved

PROGRAM = typer.Typer()
cli_switch.register(PROGRAM)

LAB: dict[str, Any] = {
    "lab": "wires",
    "hosts": {"alpha": {}, "beta": {}},
    "networks": {
        "lan": {
            "ipv4": "10.10.0.0/24",
            "ipv6": "fd10::/64",
            "rules": [
                {"action": "deny", "source": "group:web", "destination": "eve", "protocol": "tcp", "ports": "80-90"},
                {"action": "allow", "destination": "fd10::/64"},
                {"action": "deny", "source": "ann", "protocol": "icmp"},
            ],
        },
        "six": {"ipv6": "fd20::/64", "uplink": True},
        "old": {"ipv4": "10.30.0.0/24", "datapath": "bridge"},
    },
    "guests": {
        "ann": {"host": "alpha", "nics": [{"network": "lan", "group": "web", "rate_out": "10M"}, "six"]},
        "bob": {"host": "alpha", "nics": ["lan", "old"]},
        "eve": {"host": "beta", "nics": ["lan"]},
        "zoe": {"host": "beta", "nics": ["six"]},
        "mute": {"host": "beta", "nics": []},
    },
}


@dataclass
class Result:
    out: str
    err: str

    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]

    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run ``orchestrator switch`` in an empty folder, and expect a status."""
    monkeypatch.setattr(cli_app, "app", PROGRAM)
    monkeypatch.setattr(cli_app, "_register", lambda: None)
    monkeypatch.chdir(places)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(output.stdout, "no_color", True)
    monkeypatch.setattr(output.stderr, "quiet", False)

    def run(*words: str, status: int = 0) -> Result:
        monkeypatch.setattr(sys, "argv", ["orchestrator", "switch", *words])
        with pytest.raises(SystemExit) as ended:
            cli_app.main()
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == status, f"{words}: {captured.out}\n{captured.err}"
        return Result(captured.out, captured.err)

    return run


@pytest.fixture
def wires(places: Path) -> ResolvedLab:
    made = resolved(LAB)
    LabState(made.lab).save(made)
    return made


@pytest.fixture
def lab(wires: ResolvedLab, monkeypatch: pytest.MonkeyPatch) -> MemoryLab:
    made = MemoryLab(perfect(wires))
    for module in (session, tools):
        monkeypatch.setattr(module, "open_host", lambda lab, name, *_: made.transport(lab, name))
    return made


def tap(wires: ResolvedLab, guest: str, nic: int = 0) -> str:
    return wires.guests[guest].nics[nic].tap


# -- show and ports --------------------------------------------------------------------------------------------------


def test_networks_are_shown_by_host(cli: Cli, lab: MemoryLab, wires: ResolvedLab) -> None:
    lab.host("alpha").counted[tap(wires, "bob")] = Counted(3, 2048, dropped={"arp": 1, "rate": 2})

    rows = cli("show").rows()

    assert rows[0][:4] == ["HOST", "NETWORK", "DATAPATH", "PORTS"]
    lan = ["alpha", "lan", "ebpf", "2", "3", "1", "no", "drop", "10.10.0.1/24", "fd10::1/64", "1500"]
    assert [*lan, "3", "(2", "KiB)", "3", "(rate", "2,", "arp", "1)"] in rows
    assert ["alpha", "old", "bridge", "1", "-", "-", "no"] in [row[:7] for row in rows]
    assert ["beta", "six", "ebpf", "1", "2", "0", "yes"] in [row[:7] for row in rows]


def test_bridge_that_was_not_asked_for_is_explained(cli: Cli, lab: MemoryLab) -> None:
    for name in ("lan", "old"):
        facts = lab.host("alpha").networks[name]
        facts.datapath, facts.lacks = "bridge", "no [BTF]"

    shown = cli("show")
    found = {each["network"]: each for each in cli("show", "-o", "json").json()[0]["networks"]}

    assert "alpha: lan is bridged: no [BTF]" in shown.out
    assert "old is bridged" not in shown.out, "the lab file says so"
    assert (found["lan"]["lacks"], found["old"]["lacks"]) == ("no [BTF]", None)


def test_show_as_json_and_yaml(cli: Cli, lab: MemoryLab, wires: ResolvedLab) -> None:
    lab.host("beta").counted[tap(wires, "eve")] = Counted(1, 60, 2, 120, 0, {"vlan": 1})

    found = cli("show", "-o", "json").json()

    assert [host["host"] for host in found] == ["alpha", "beta"]
    (lan,) = [network for network in found[1]["networks"] if network["network"] == "lan"]
    assert lan["totals"] == {
        "tx_packets": 1, "tx_bytes": 60, "rx_packets": 2, "rx_bytes": 120, "overruns": 0, "dropped": {"vlan": 1},
    }  # fmt: skip
    assert (lan["ports"], lan["listed"], lan["peers"]) == (1, 3, [wires.hosts["alpha"].underlay])
    assert YAML(typ="safe", pure=True).load(cli("show", "-o", "yaml").out) == found


def test_ports_have_identity_and_policy(cli: Cli, lab: MemoryLab, wires: ResolvedLab) -> None:
    nic = wires.guests["eve"].nics[0]

    rows = cli("ports").rows()

    assert ["eve", "lan", "beta", nic.tap, nic.mac, "10.10.0.4", "fd10::4", "-"] in rows
    assert len(rows) == 1 + 6


def test_policy_in_words(cli: Cli, lab: MemoryLab, monkeypatch: pytest.MonkeyPatch) -> None:
    group = f"{cli_switch.group_id('web'):08x}"
    answer = lab.host("alpha").switch_stats

    def with_policy(call: Any, names: dict[str, str], pairs: bool = False) -> Any:
        data = answer(call, names, pairs)
        first, second = data["networks"][0]["ports"]
        first |= {"group": group, "vlan": 7, "rate_out": 10_000_000, "rate_in": 1_500_000_000, "mirror": "bob"}
        second |= {"group": "12345678", "trunk": [10, 20], "isolated": True, "plugged": False, "addresses": []}
        return data

    monkeypatch.setattr(lab.host("alpha"), "switch_stats", with_policy, raising=False)

    shown = cli("ports")
    found = cli("ports", "ann", "-o", "json").json()

    assert "vlan 7 group web out 10 Mbit/s in 1.5 Gbit/s mirror to bob" in shown.out
    assert "not plugged in" in shown.out
    assert "trunk 10,20 group 12345678 isolated" in shown.out
    assert found[0]["group"] == "web"


def test_ports_of_a_guest_are_asked_of_its_host_alone(cli: Cli, lab: MemoryLab) -> None:
    found = cli("ports", "ann", "-o", "json").json()

    assert [(port["guest"], port["network"], port["host"]) for port in found] == [
        ("ann", "lan", "alpha"),
        ("ann", "six", "alpha"),
    ]
    assert set(found[0]) == set(cli_switch.IDENTITY)
    assert "switch.stats" not in lab.host("beta").calls


# -- stats -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(lab: MemoryLab, wires: ResolvedLab) -> MemoryLab:
    ann, bob = wires.guests["ann"].nics[0], wires.guests["bob"].nics[0]
    counted = lab.host("alpha").counted
    counted[ann.tap] = Counted(12, 1500, 3, 180, 2, {"source_mac": 4}, 0.25)
    counted[bob.tap] = Counted(answered=0)
    lab.host("alpha").talk = [
        PairStats("ann", ann.mac, "bob", bob.mac, "lan", 10, 1400, 0.5),
        PairStats("bob", bob.mac, None, "02:de:ad:00:00:01", None, 1, 60, 300),
    ]
    return lab


def test_stats_of_every_port_and_link(cli: Cli, busy: MemoryLab) -> None:
    rows = cli("stats").rows()

    head = ["GUEST", "NETWORK", "HOST", "SENT", "RECEIVED", "ANSWERED", "DROPPED", "OVERRUNS", "LAST", "SEEN"]
    assert rows[0] == head
    ann = ["ann", "lan", "alpha", "12", "(1.5", "KiB)", "3", "(180", "B)", "2", "4", "(source_mac", "4)", "0"]
    assert [*ann, "0.2", "s", "ago"] in rows
    assert ["bob", "lan", "alpha", "0", "(0", "B)", "0", "(0", "B)", "0", "0", "0", "never"] in rows
    assert ["bob", "old", "alpha", "0", "(0", "B)", "0", "(0", "B)", "-", "-", "0", "-"] in rows
    assert ["(host)", "lan", "beta"] in [row[:3] for row in rows]
    assert ["(other", "hosts)", "lan", "beta"] in [row[:4] for row in rows]


def test_stats_as_json(cli: Cli, busy: MemoryLab) -> None:
    found = cli("stats", "-o", "json").json()

    ports = {(port["guest"], port["network"]): port for port in found["ports"]}
    assert ports["ann", "lan"] | {"dropped": {"source_mac": 4}, "host": "alpha"} == ports["ann", "lan"]
    assert ports["eve", "lan"]["last_seen_seconds_ago"] is None
    assert {(link["host"], link["network"], link["link"]) for link in found["links"]} >= {
        ("alpha", "lan", "host"),
        ("alpha", "lan", "underlay"),
        ("beta", "six", "host"),
    }
    assert ("alpha", "old", "underlay") not in {
        (each["host"], each["network"], each["link"]) for each in found["links"]
    }
    assert set(found) == {"ports", "links"}


def test_stats_of_one_guest(cli: Cli, busy: MemoryLab) -> None:
    found = cli("stats", "bob", "--pairs", "--drops", "-o", "json").json()

    assert {port["guest"] for port in found["ports"]} == {"bob"}
    assert "links" not in found
    assert [(pair["sender"], pair["receiver"], pair["host"]) for pair in found["pairs"]] == [
        ("ann", "bob", "alpha"),
        ("bob", None, "alpha"),
    ]
    assert found["drops"] == []


def test_pairs(cli: Cli, busy: MemoryLab) -> None:
    rows = cli("stats", "--pairs").rows()

    assert rows[0] == ["FROM", "TO", "NETWORK", "HOST", "SENT", "LAST", "SEEN"]
    assert ["ann", "bob", "lan", "alpha", "10", "(1.4", "KiB)", "0.5", "s", "ago"] in rows
    assert ["bob", "02:de:ad:00:00:01", "-", "alpha", "1", "(60", "B)", "5", "min", "ago"] in rows


def test_drops_have_their_meaning(cli: Cli, busy: MemoryLab) -> None:
    lines = [" ".join(row) for row in cli("stats", "--drops").rows()]
    (drop,) = cli("stats", "--drops", "-o", "json").json()["drops"]

    assert "ann lan alpha source_mac 4 the frame's source MAC is not the NIC's" in lines
    assert (drop["guest"], drop["reason"], drop["packets"]) == ("ann", "source_mac", 4)


def test_watch_shows_what_is_between_two_looks(
    cli: Cli, busy: MemoryLab, wires: ResolvedLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second passes between the first two looks, and Ctrl-C comes after the third."""
    host, ann = busy.host("alpha"), tap(wires, "ann")
    looks: list[float] = []
    answer = host.switch_stats

    def at(call: Any, names: dict[str, str], pairs: bool = False) -> Any:
        return answer(call, names, pairs) | {"clock": float(len(looks))}

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        before = host.counted[ann]
        host.counted[ann] = (
            replace(before, tx_packets=22, tx_bytes=2750, dropped={"source_mac": 9}) if len(looks) == 1 else Counted()
        )

    monkeypatch.setattr(host, "switch_stats", at, raising=False)
    monkeypatch.setattr(output.time, "sleep", wait)

    shown = cli("stats", "ann", "--watch", "--every", "3", status=130).rows()

    assert looks == [3, 3, 3]
    ann_rows = [row for row in shown if row[:2] == ["ann", "lan"]]
    assert ann_rows[0][3:7] == ["12", "(1.5", "KiB)", "-"]
    assert ann_rows[1][3:9] == ["22", "(2.7", "KiB)", "10", "(10", "kbit/s)"]
    assert ann_rows[1][-4:] == ["5", "0.2", "s", "ago"]
    assert ann_rows[2][3:9] == ["0", "(0", "B)", "0", "(0", "bit/s)"], "its tap was made anew"


def test_host_that_does_not_answer_is_told_and_the_others_go_on(cli: Cli, lab: MemoryLab) -> None:
    lab.host("beta").problem = "no route to [host]"

    for command in ("show", "ports", "stats"):
        shown = cli(command, status=4)
        data = cli(command, "-o", "json", status=4)
        assert "host beta: no route to [host]" in shown.out
        assert "alpha" in shown.out
        assert "error: host beta: no route to [host]" in data.err
        assert data.json()


def test_host_whose_agent_is_too_old_is_told(cli: Cli, lab: MemoryLab) -> None:
    def fail(*_: object) -> None:
        raise HostError("the agent knows no method")

    lab.host("alpha").on_call = fail

    assert "host alpha: the agent knows no method" in cli("stats", status=4).out


def test_agent_that_died_is_started(cli: Cli, lab: MemoryLab) -> None:
    lab.host("alpha").facts = HostFacts(present=True)

    cli("stats")

    assert lab.host("alpha").facts.agent


def test_hosts_are_asked_at_the_same_time(cli: Cli, lab: MemoryLab) -> None:
    meeting = threading.Barrier(2, timeout=20)
    for host in lab.hosts.values():
        host.on_call = lambda method, call, params: meeting.wait() if method == "switch.stats" else None

    cli("show")


@pytest.mark.parametrize(
    "words", [["ports", "nobody"], ["stats", "nobody"], ["trace", "nobody", "ann"], ["capture", "nobody", "-w", "x"]]
)
def test_unknown_guest_ends_with_1_and_those_that_there_are(cli: Cli, lab: MemoryLab, words: list[str]) -> None:
    assert "hint: its guests: ann, bob, eve, zoe, mute" in cli(*words, status=1).err


# -- trace -----------------------------------------------------------------------------------------------------------


def test_trace_across_hosts_asks_both(cli: Cli, lab: MemoryLab, wires: ResolvedLab) -> None:
    shown = cli("trace", "ann", "eve")
    found = cli("trace", "ann", "eve", "-o", "json").json()

    assert [row[:3] for row in shown.rows()[1:3]] == [
        ["alpha", tap(wires, "ann"), "underlay"],
        ["beta", "VXLAN", "guest"],
    ]
    assert "it goes to guest eve on beta, by the VXLAN" in shown.out
    assert "icmp from ann (10.10.0.2) to 10.10.0.4: it arrives" in shown.out
    assert (found["reaches"], found["network"], found["protocol"]) == (True, "lan", "icmp")
    assert [(step["host"], step["fate"], step["to_host"]) for step in found["steps"]] == [
        ("alpha", "underlay", "beta"),
        ("beta", "guest", None),
    ]
    assert all("frame" not in step for step in found["steps"])


def test_trace_to_nobody(cli: Cli, lab: MemoryLab) -> None:
    del lab.host("alpha").networks["lan"].listed[resolved(LAB).guests["bob"].nics[0].mac]

    shown = cli("trace", "ann", "bob", "-p", "udp", "--port", "53")

    assert "it is dropped: the destination is on no list" in shown.out
    assert "udp port 53 from ann (10.10.0.2) to 10.10.0.3: it does not arrive" in shown.out


def test_trace_to_the_host_or_over_a_bridge_is_not_decided(cli: Cli, lab: MemoryLab) -> None:
    gateway = cli("trace", "ann", "10.10.0.1", "-o", "json").json()
    bridge = cli("trace", "bob", "10.30.0.9", "-o", "json").json()

    assert (gateway["reaches"], gateway["steps"][0]["receiver"]) == (None, "host")
    assert (bridge["reaches"], bridge["steps"][0]["fate"]) == (None, "bridge")
    assert "the rest is not up to the switch" in cli("trace", "ann", "10.10.0.1").out


def test_trace_whose_second_host_does_not_answer_shows_the_first(cli: Cli, lab: MemoryLab) -> None:
    lab.host("beta").problem = "no route to host"

    shown = cli("trace", "ann", "eve", "-o", "json", status=4)

    assert [step["host"] for step in shown.json()["steps"]] == ["alpha"]
    assert shown.json()["reaches"] is None
    assert "no route to host" in shown.err


def test_trace_of_what_is_not_there_any_more(cli: Cli, lab: MemoryLab) -> None:
    del lab.host("beta").networks["lan"]
    half = cli("trace", "ann", "eve", status=1)
    del lab.host("alpha").networks["lan"]
    none = cli("trace", "ann", "eve", status=1)

    assert "it goes to guest eve on beta" in half.out
    assert "network lan is not on this host" in half.err
    assert none.out == ""


def test_rule_is_told_in_words(cli: Cli, lab: MemoryLab, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = lab.host("alpha").switch_trace
    number = 1

    def ruled(call: Any, **params: Any) -> Any:
        return answer(call, **params) | {"rule": number}

    monkeypatch.setattr(lab.host("alpha"), "switch_trace", ruled, raising=False)

    first = cli("trace", "ann", "bob").out
    number = 2
    second = cli("trace", "ann", "bob").out
    number = 4
    third = cli("trace", "ann", "bob").out
    number = 9
    fourth = cli("trace", "ann", "bob").out

    assert "rule 1 of lan: deny tcp 80-90 from group:web to eve" in first
    assert "rule 2 of lan: allow any from any to fd10::/64" in second
    assert "rule 4 of lan: deny icmp IPv6 from ann to any" in third
    assert "the lab has no such rule any more" in fourth


def way(wires: ResolvedLab, guest: str, target: str, **choice: Any) -> tuple[str, str, str, str]:
    """Network, addresses, and whose MAC the frame is for."""
    found = trace._way(wires, wires.guests[guest], target, choice.get("network"), choice.get("family"))
    macs = {nic.mac: each.name for each in wires.guests.values() for nic in each.nics}
    macs |= {network.gateway_mac: "gateway" for network in wires.networks.values()}
    mac = macs.get(found.target_mac, found.target_mac)
    return found.nic.network, str(found.source), str(found.target), mac


@pytest.mark.parametrize(
    ("guest", "target", "choice", "wanted"),
    [
        ("ann", "eve", {}, ("lan", "10.10.0.2", "10.10.0.4", "eve")),
        ("ann", "eve", {"family": 6}, ("lan", "fd10::2", "fd10::4", "eve")),
        ("ann", "zoe", {}, ("six", "fd20::2", "fd20::3", "zoe")),
        ("bob", "zoe", {}, ("lan", "fd10::3", "fd20::3", "gateway")),
        ("ann", "10.10.0.4", {}, ("lan", "10.10.0.2", "10.10.0.4", "eve")),
        ("ann", "10.10.0.200", {}, ("lan", "10.10.0.2", "10.10.0.200", "gateway")),
        ("ann", "192.0.2.1", {}, ("lan", "10.10.0.2", "192.0.2.1", "gateway")),
        ("ann", "2001:db8::1", {}, ("six", "fd20::2", "2001:db8::1", "gateway")),
        ("ann", "2001:db8::1", {"network": "lan"}, ("lan", "fd10::2", "2001:db8::1", "gateway")),
        ("ann", "10.10.0.255", {}, ("lan", "10.10.0.2", "10.10.0.255", BROADCAST)),
        ("ann", "255.255.255.255", {}, ("lan", "10.10.0.2", "255.255.255.255", BROADCAST)),
        ("ann", "224.0.0.251", {}, ("lan", "10.10.0.2", "224.0.0.251", "01:00:5e:00:00:fb")),
        ("ann", "ff02::fb", {}, ("six", "fd20::2", "ff02::fb", "33:33:00:00:00:fb")),
    ],
)
def test_way_of_a_datagram(
    wires: ResolvedLab, guest: str, target: str, choice: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    assert way(wires, guest, target, **choice) == wanted


def test_way_to_a_link_local_address(wires: ResolvedLab) -> None:
    mac = wires.guests["eve"].nics[0].mac
    target = str(trace.link_local(mac))

    network, source, _, to = way(wires, "ann", target)

    assert (network, to) == ("lan", "eve")
    assert source == str(trace.link_local(wires.guests["ann"].nics[0].mac))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ann", "eva"], "eva is no guest of lab wires, and no address"),
        (["ann", "eve", "--network", "old"], "guest ann is not in network old"),
        (["mute", "eve"], "guest mute is not in any network"),
        (["ann", "mute"], "guests ann and mute have no IP addresses to talk by"),
        (["ann", "zoe", "--ipv4"], "have no IPv4 addresses"),
        (["zoe", "10.10.0.4"], "guest zoe has no IPv4 address"),
        (["ann", "10.10.0.4", "--ipv6"], "10.10.0.4 is no IPv6 address"),
    ],
)
def test_way_that_is_none_ends_with_1(cli: Cli, lab: MemoryLab, words: list[str], message: str) -> None:
    assert f"error: {message}" in cli("trace", *words, status=1).err.replace("guests ann and zoe ", "")


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "tcp"],
        ["-p", "udp", "--source-port", "0"],
        ["-p", "icmp", "--port", "80"],
        ["-p", "arp", "--ipv6"],
        ["-p", "nd", "--ipv4"],
        ["-p", "sctp"],
        ["--from", "ann"],
        ["--from", "fd10::9"],
        ["--mac", "02:00"],
        ["--vlan", "4095"],
    ],
    ids=" ".join,
)
def test_wrong_usage_of_trace_ends_with_2(cli: Cli, lab: MemoryLab, words: list[str]) -> None:
    assert cli("trace", "ann", "eve", *words, status=2).out == ""


def test_frame_is_as_it_was_asked_for(cli: Cli, lab: MemoryLab) -> None:
    seen: list[bytes] = []
    lab.host("alpha").on_call = lambda method, call, params: (
        seen.append(bytes.fromhex(params["frame"])) if method == "switch.trace" else None
    )

    told = cli(
        "trace", "ann", "bob", "--port", "80", "--source-port", "5000", "--from", "10.10.0.9",
        "--mac", "02:00:00:00:00:09", "--vlan", "7", "-o", "json",
    ).json()  # fmt: skip

    (frame,) = seen
    assert frame[6:18] == bytes.fromhex("020000000009810000070800")
    assert frame[18 + 12 : 18 + 16] == bytes([10, 10, 0, 9])
    assert frame[18 + 20 : 18 + 24] == bytes.fromhex("13880050")
    assert (told["protocol"], told["port"], told["source_port"], told["vlan"]) == ("tcp", 80, 5000, 7)


# -- capture ---------------------------------------------------------------------------------------------------------

FRAMES = [bytes.fromhex("02000000000302000000000288b5") + bytes([number]) * 86 for number in range(5)]


def captured(places: Path) -> list[Packet]:
    return list(PcapNgReader(io.BytesIO((places / "ann.pcapng").read_bytes())))


@pytest.fixture
def sending(lab: MemoryLab) -> MemoryLab:
    lab.host("alpha").frames = list(FRAMES)
    return lab


def test_capture_is_written_to_a_file(cli: Cli, sending: MemoryLab, wires: ResolvedLab, places: Path) -> None:
    shown = cli("capture", "ann", "-w", "ann.pcapng", "--count", "3", "--snap", "64")

    found = captured(places)
    assert [bytes(packet) for packet in found] == [frame[:64] for frame in FRAMES[:3]]
    assert {packet.wirelen for packet in found} == {100}
    assert {packet.sniffed_on for packet in found} == {tap(wires, "ann")}
    assert "3 frames: ended" in shown.err
    assert shown.out == ""


def test_capture_tells_its_result_as_json(cli: Cli, sending: MemoryLab, wires: ResolvedLab) -> None:
    told = cli("capture", "ann", "--nic", "1", "-w", "ann.pcapng", "--seconds", "1", "-o", "json").json()

    assert told == {
        "guest": "ann",
        "tap": tap(wires, "ann", 1),
        "file": "ann.pcapng",
        "frames": 5,
        "dropped": 0,
        "ended": "ended",
    }


def test_ctrl_c_ends_a_capture_and_the_file_is_whole(
    cli: Cli, sending: MemoryLab, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(sink: int, data: bytes) -> None:
        write(sink, data)
        if data and not done:
            done.append(True)
            signal.raise_signal(signal.SIGINT)

    done: list[bool] = []
    write = cli_capture._write
    monkeypatch.setattr(cli_capture, "_write", interrupted)
    before = signal.getsignal(signal.SIGINT)

    shown = cli("capture", "ann", "-w", "ann.pcapng")

    assert len(captured(places)) == 5
    assert "5 frames: ended" in shown.err
    assert signal.getsignal(signal.SIGINT) == before


def test_capture_is_not_written_to_a_terminal(cli: Cli, sending: MemoryLab, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())

    shown = cli("capture", "ann", status=1)

    assert "it is not written to a terminal" in shown.err
    assert "| wireshark -k -i -" in shown.err
    assert not sending.host("alpha").calls


def test_capture_of_a_nic_that_is_not_there(cli: Cli, sending: MemoryLab) -> None:
    shown = cli("capture", "ann", "--nic", "2", "-w", "x", status=1)

    assert shown.err.splitlines() == ["error: guest ann has no NIC 2", "  hint: its NICs: 0: lan, 1: six"]
    assert "its NICs: none" in cli("capture", "mute", "-w", "x", status=1).err


def test_capture_that_cannot_be_written(cli: Cli, sending: MemoryLab) -> None:
    missing = cli("capture", "ann", "-w", "no/such/folder", "--count", "1", status=1)
    full = cli("capture", "ann", "-w", "/dev/full", "--count", "1", status=1)

    assert "the capture cannot be written: No such file or directory" in missing.err
    assert "the capture cannot be written: No space left on device" in full.err


def test_capture_whose_agent_dies_ends_with_4(
    cli: Cli, sending: MemoryLab, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> bytes:
        raise OSError("killed")

    monkeypatch.setattr("orchestrator.testing.memory.pcapng.statistics", die)

    shown = cli("capture", "ann", "-w", "ann.pcapng", "--count", "2", status=4)

    assert "the agent ended during the capture" in shown.err
    assert len(captured(places)) == 2


# -- cells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (1 << 52, "4096 TiB")],
)
def test_bytes_for_the_eye(size: int, shown: str) -> None:
    assert cli_switch._bytes(size) == shown


@pytest.mark.parametrize(
    ("rate", "shown"), [(0, "0 bit/s"), (999, "999 bit/s"), (1500, "1.5 kbit/s"), (10**13, "10000 Gbit/s")]
)
def test_rate_for_the_eye(rate: float, shown: str) -> None:
    assert cli_switch._bits(rate) == shown


@pytest.mark.parametrize(
    ("seconds", "datapath", "shown"),
    [
        (None, "ebpf", "never"),
        (None, "bridge", "-"),
        (0.04, "ebpf", "0.0 s ago"),
        (30, "ebpf", "30 s ago"),
        (600, "ebpf", "10 min ago"),
        (8000, "ebpf", "2 h ago"),
    ],
)
def test_time_since_for_the_eye(seconds: float | None, datapath: str, shown: str) -> None:
    assert cli_switch._ago(seconds, datapath) == shown


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as they need."""
    monkeypatch.setattr(output, "stdout", Console(highlight=False, soft_wrap=True, width=300, no_color=True))
