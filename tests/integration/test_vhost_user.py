"""Networks of `datapath: vhost-user`: frames from virtqueue to virtqueue, and all else through the switch."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import names
from orchestrator.switch import vswitch
from tests.conftest import Sandbox
from tests.guest_use import wait_until
from tests.integration.test_switch import address, nic_of, ping, resolved

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.skipif(
        vswitch.unavailable() is not None, reason=f"NOT TESTED: the vhost-user datapath: {vswitch.unavailable()}"
    ),
]

LAB = """\
lab: switched
hosts: {alpha: {}, beta: {}}
networks:
  lan: {ipv4: 10.82.0.0/24, ipv6: "fd82::/64", uplink: true, datapath: vhost-user}
defaults: {guest: {memory: 192M, nics: [lan]}}
guests:
  ann: {host: alpha}
  bob: {host: alpha}
  eve: {host: beta}
"""


@pytest.fixture(scope="module")
def lab(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    shared_sandbox.file(LAB)
    shared_sandbox.run("up")
    yield shared_sandbox
    shared_sandbox.run("down")


def place(lab: Sandbox) -> Path:
    """The runtime folder of alpha."""
    return Path(lab.env["ORCHESTRATOR_RUN"]) / names.digest(resolved(lab).uid, "alpha")


def process(lab: Sandbox) -> int:
    return int(json.loads((place(lab) / "vswitch.json").read_text())["pid"])


def stats(lab: Sandbox) -> dict[str, dict[str, Any]]:
    """What the process of alpha counts, by guest."""
    said = vswitch.Vswitch(place(lab), lab.folder).stats()["ports"]
    return {guest: said[nic_of(lab, guest).tap] for guest in ("ann", "bob")}


def test_guests_reach_each_other_the_other_host_and_the_machine(lab: Sandbox) -> None:
    reached = lab.json("reach")
    from_here = subprocess.run(["ping", "-c", "2", "-W", "5", address(lab, "ann")], capture_output=True, text=True)

    assert all(one["milliseconds"] is not None for one in reached), reached
    assert from_here.returncode == 0, from_here.stdout
    assert "nothing to do" in lab.run("up").stderr


def test_frames_between_guests_of_a_host_do_not_pass_the_kernel(lab: Sandbox) -> None:
    before = stats(lab)
    answered = ping(lab, "ann", address(lab, "bob"), count=20)
    after = stats(lab)

    assert answered == 20
    assert after["ann"]["tx_packets"] - before["ann"]["tx_packets"] >= 20
    assert after["bob"]["rx_packets"] - before["bob"]["rx_packets"] >= 20


def test_guest_that_lies_is_caught_by_the_switch(lab: Sandbox) -> None:
    lab.exec("ann", "ip", "addr", "add", "10.82.0.99/24", "dev", "eth0")
    before = lab.json("switch", "stats", "ann")
    answered = ping(lab, "ann", address(lab, "bob"), "-I", "10.82.0.99")
    lab.exec("ann", "ip", "addr", "del", "10.82.0.99/24", "dev", "eth0")

    assert answered == 0
    assert before != lab.json("switch", "stats", "ann")


def test_transfer_goes_on_when_the_process_is_killed(lab: Sandbox) -> None:
    size = 192 << 20
    receiver = lab.start("exec", "--timeout", "200", "bob", "--", "nc", "-l", "-p", "5000", "-e", "md5sum")
    wait_until(lambda: ":1388 " in lab.exec("bob", "cat", "/proc/net/tcp", "/proc/net/tcp6"), "nobody listens", 30)
    send = f"dd if=/dev/zero bs=65536 count={size >> 16} 2>/dev/null | nc {address(lab, 'bob')} 5000"
    sender = lab.start("exec", "--timeout", "200", "ann", "--", "sh", "-c", send)
    killed = []
    for _ in range(3):
        wait_until(lambda: stats(lab)["bob"]["rx_packets"] > 50, "nothing arrives", 60)
        killed.append(process(lab))
        subprocess.run(["kill", f"-{int(signal.SIGKILL)}", str(killed[-1])], check=True)
        wait_until(lambda: process(lab) != killed[-1], "it is not started again", 30)
        assert sender.poll() is None, "it was over before: not tested"
    said, _ = sender.communicate(timeout=200)
    receiver.communicate(timeout=60)

    assert said.split()[0] == hashlib.md5(bytes(size)).hexdigest()
    assert len(set(killed)) == 3


def test_process_goes_on_without_the_agent_and_the_next_agent_finds_it(lab: Sandbox) -> None:
    before = process(lab)
    subprocess.run(["pkill", "-KILL", "-f", "orchestrator.agent --lab=switched .*--host=alpha "], check=True)
    lab.run("up")
    answered = ping(lab, "ann", address(lab, "bob"))
    after = process(lab)
    subprocess.run(["kill", f"-{int(signal.SIGKILL)}", str(after)], check=True)
    wait_until(lambda: process(lab) != after, "the new agent does not watch it", 30)

    assert answered == 3
    assert after == before
    wait_until(lambda: ping(lab, "ann", address(lab, "bob")) == 3, "it does not come back", 60)


def test_rules_and_rates_hold_here_too(lab: Sandbox) -> None:
    changed = LAB.replace(
        "datapath: vhost-user}", "datapath: vhost-user, rules: [{action: deny, source: ann, destination: bob}]}"
    )
    lab.file(changed)
    impacts = {one["impact"] for one in lab.json("plan")["operations"]}
    lab.run("up")
    closed = ping(lab, "ann", address(lab, "bob"))
    lab.file(LAB)
    lab.run("up")

    assert impacts == {"live"}
    assert closed == 0
    assert ping(lab, "ann", address(lab, "bob")) == 3


def test_other_datapath_is_a_restart_and_leaves_no_process(lab: Sandbox) -> None:
    pid = process(lab)
    lab.file(LAB.replace(", datapath: vhost-user", ""))

    impacts = {(one["subject"], one["impact"]) for one in lab.json("plan")["operations"]}
    lab.run("up")

    assert ("guest ann", "restart") in impacts
    assert not Path(f"/proc/{pid}").exists()
    assert not list(place(lab).glob("*.vu"))
    assert ping(lab, "ann", address(lab, "bob")) == 3
    lab.file(LAB)
    lab.run("up")
    assert ping(lab, "ann", address(lab, "bob")) == 3
