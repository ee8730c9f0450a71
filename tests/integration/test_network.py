"""Networks between real guests: reach, MTU, uplink without translation, and names that are taken."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from orchestrator import names
from tests.conftest import Machine, Sandbox

pytestmark = pytest.mark.privileged

LAB = """\
lab: nets
hosts: {alpha: {}, beta: {}}
networks:
  lan: {ipv4: 10.77.0.0/24, ipv6: "fd77::/64", uplink: true}
  six: {ipv6: "fd78::/64", mtu: 9000}
underlay: {mtu: 9100}
defaults: {guest: {memory: 192M, nics: [lan, six]}}
guests:
  ann: {host: alpha}
  eve: {host: beta}
"""


@pytest.fixture(scope="module")
def lab(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    shared_sandbox.file(LAB)
    shared_sandbox.run("up")
    yield shared_sandbox
    shared_sandbox.run("down")


def test_guests_reach_each_other_across_hosts_by_both_families(lab: Sandbox) -> None:
    reached = lab.json("reach")

    assert {(one["source"], one["network"]) for one in reached} == {
        ("ann", "lan"),
        ("ann", "six"),
        ("eve", "lan"),
        ("eve", "six"),
    }
    assert all(one["milliseconds"] is not None for one in reached), reached


def test_full_size_datagrams_cross_the_hosts_unfragmented(lab: Sandbox) -> None:
    mtu = lab.exec("ann", "sh", "-c", "cat /sys/class/net/eth*/mtu").split()
    answer = lab.exec("ann", "ping", "-c", "2", "-s", str(9000 - 48), "fd78::3")

    assert sorted(mtu) == ["1500", "9000"]
    assert "2 packets received" in answer


def test_uplink_reaches_the_machine_with_the_guests_own_address(lab: Sandbox) -> None:
    address = lab.guests()["eve"]["addresses"][0]
    links = [name for name in Machine.look().links if name.startswith("ou-")]

    from_here = subprocess.run(["ping", "-c", "2", "-W", "5", address], capture_output=True, text=True)
    routes = subprocess.run(["ip", "-4", "route", "show"], capture_output=True, text=True, check=True).stdout
    translated = subprocess.run(
        ["ip", "netns", "exec", "orc.nets.beta", "cat", "/proc/net/nf_conntrack"], capture_output=True, text=True
    )

    assert from_here.returncode == 0, from_here.stdout
    assert len(links) == 2
    assert f"{address} via inet6 fe80::2" in routes
    assert "src=10.77" not in translated.stdout


def test_guest_reaches_the_machine_and_its_address_is_what_arrives(lab: Sandbox) -> None:
    import socket

    listener = socket.create_server(("192.0.2.77", 0)) if _add_address() else None
    assert listener
    try:
        listener.settimeout(60)
        port = listener.getsockname()[1]
        asking = lab.start("exec", "ann", "--", "sh", "-c", f"echo hello | nc -w 5 192.0.2.77 {port}")
        stream, (peer, _) = listener.accept()
        with stream:
            said = stream.recv(100)
        asking.communicate(timeout=60)
    finally:
        listener.close()
        subprocess.run(["ip", "addr", "del", "192.0.2.77/32", "dev", "lo"], check=True)

    assert said == b"hello\n"
    assert peer == lab.guests()["ann"]["addresses"][0]


def _add_address() -> bool:
    return subprocess.run(["ip", "addr", "add", "192.0.2.77/32", "dev", "lo"]).returncode == 0


def test_damaged_network_is_healed_by_up(lab: Sandbox) -> None:
    host = {host["name"]: host for host in lab.json("status")["hosts"]}["alpha"]
    bridge = {network["name"]: network["bridge"] for network in host["networks"]}["lan"]
    subprocess.run(["ip", "-n", "orc.nets.alpha", "link", "set", bridge, "down"], check=True)
    subprocess.run(["ip", "-n", "orc.nets.alpha", "addr", "flush", "dev", bridge, "scope", "global"], check=True)

    plan = lab.json("plan")["operations"]
    lab.run("up")

    assert [(one["subject"], one["impact"]) for one in plan] == [("network lan", "live")]
    assert all(one["milliseconds"] is not None for one in lab.json("reach"))


def test_underlay_that_led_to_vagrant_hosts_is_parted_from_them(lab: Sandbox) -> None:
    uid = json.loads((lab.folder / "state/labs/nets/lab.json").read_text())["uid"]
    joint = names.link("j", uid, "underlay")
    subprocess.run(
        ["ip", "link", "add", joint, "type", "veth", "peer", "name", "joint", "netns", "orc.nets"], check=True
    )

    plan = lab.json("plan")["operations"]
    lab.run("up")

    assert {(one["subject"], one["impact"]) for one in plan} == {("host alpha", "live"), ("host beta", "live")}
    assert joint not in Machine.look().links
    assert "nothing to do" in lab.run("up").stderr


def test_links_that_were_made_and_not_yet_marked_are_taken_on(sandbox: Sandbox) -> None:
    file = sandbox.file(
        "lab: half\nhosts: {alpha: {}, beta: {}}\nnetworks: {lan: {ipv4: 10.79.0.0/24, bridge: ours}}\n"
        "guests: {ann: {host: alpha, memory: 192M, nics: [lan]}, eve: {host: beta, memory: 192M, nics: [lan]}}\n"
    )
    sandbox.run("up", "-f", file)
    uid = json.loads((sandbox.folder / "state/labs/half/lab.json").read_text())["uid"]
    inside = ["ip", "-n", "orc.half.alpha"]
    links = json.loads(subprocess.run([*inside, "-j", "link"], capture_output=True, check=True).stdout)
    marks = {link["ifname"]: link["ifalias"] for link in links if link["ifname"][:3] in ("ot-", "ox-")}
    for name in marks:
        subprocess.run([*inside, "link", "set", name, "alias", ""], check=True)
    first = names.link("b", uid, "lan")
    for words in (["link", "del", "ours"], ["link", "add", first, "type", "bridge"]):
        subprocess.run([*inside, *words], check=True)

    sandbox.run("up", "-f", file)

    links = json.loads(subprocess.run([*inside, "-j", "link"], capture_output=True, check=True).stdout)
    assert {name[:3] for name in marks} == {"ot-", "ox-"}
    assert marks.items() <= {link["ifname"]: link.get("ifalias") for link in links}.items()
    assert {"ours"} == {link["ifname"] for link in links if link["ifname"] in ("ours", first)}
    assert all(one["milliseconds"] is not None for one in sandbox.json("reach", "-f", file))


def test_bridge_name_taken_by_somebody_else(sandbox: Sandbox) -> None:
    file = sandbox.file(
        "lab: taken\nhosts: {alpha: {}}\nnetworks: {lan: {ipv4: 10.78.0.0/24}}\n"
        "guests: {ann: {host: alpha, memory: 192M, nics: [lan]}}\n"
    )
    sandbox.run("up", "-f", file)
    subprocess.run(["ip", "-n", "orc.taken.alpha", "link", "add", "theirs", "type", "bridge"], check=True)

    sandbox.file(file.read_text().replace("10.78.0.0/24}", "10.78.0.0/24, bridge: theirs}"))
    failed = sandbox.run("up", "-f", file, status=1)

    assert "theirs" in failed.stderr
    assert "not ours" in failed.stderr
    shown = subprocess.run(["ip", "-n", "orc.taken.alpha", "link", "show", "theirs"], capture_output=True, text=True)
    assert shown.returncode == 0
