"""plan, up, down: from nothing to a lab and back, with changes, interruptions and bad luck in between."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from string import Template

import pytest

from tests.conftest import Machine, Sandbox

pytestmark = pytest.mark.privileged

DEMO = Path(__file__).parents[2] / "examples" / "demo.yaml"

SMALL = """\
lab: small
hosts: {alpha: {}, beta: {}}
networks:
  lan: {ipv4: 10.10.0.0/24, ipv6: "fd10::/64"}
  wan: {ipv4: 10.11.0.0/24}
defaults:
  guest: {memory: 192M, nics: [lan]}
guests:
  ann: {host: alpha, memory: {size: 192M, max: 512M}, vcpus: {count: 1, max: 2}}
  eve: {host: beta, disks: [{name: data, size: 32M}]}
"""


def plan_of(sandbox: Sandbox, file: Path) -> list[tuple[str, str, str]]:
    plan = sandbox.json("plan", "-f", file)
    return [(one["impact"], one["subject"], one["summary"]) for one in plan["operations"]]


def test_demo_lab_up_again_reach_down_leaves_nothing(sandbox: Sandbox) -> None:
    before = Machine.look()

    first = sandbox.run("up", "-f", DEMO)
    again = sandbox.run("up", "-f", DEMO)
    reached = sandbox.json("reach", "-f", DEMO)
    status = sandbox.json("status", "-f", DEMO)
    sandbox.run("down", "-f", DEMO)

    assert "4 guests on 2 hosts" in first.stderr
    assert "nothing to do" in again.stderr
    assert [guest["state"] for guest in status["guests"]] == ["running"] * 4
    assert len(reached) == 4 * 3 * 2  # each to each other, by IPv4 and IPv6
    assert all(one["milliseconds"] is not None for one in reached), reached
    assert any(one["across_hosts"] for one in reached)
    assert Machine.look().new_since(before) == {}
    assert not Path(sandbox.env["ORCHESTRATOR_STATE"]).exists()
    assert not Path(sandbox.env["ORCHESTRATOR_RUN"]).exists()


def test_changed_file_changes_only_what_differs(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    sandbox.run("up", "-f", file)
    began = {name: guest["since"] for name, guest in sandbox.guests().items()}

    sandbox.file(
        SMALL.replace("ann: {host: alpha, memory: {size: 192M, max: 512M}, vcpus: {count: 1, max: 2}}",
                      "ann: {host: alpha, memory: {size: 320M, max: 512M}, vcpus: {count: 2, max: 2}, "
                      "nics: [lan, wan]}")
        .replace("[{name: data, size: 32M}]", "[{name: data, size: 32M}, {name: more, size: 16M}]")
    )  # fmt: skip
    plan = plan_of(sandbox, file)
    sandbox.run("up", "-f", file)

    assert ("live", "guest ann", "change") in plan
    assert ("live", "guest eve", "change") in plan
    assert {impact for impact, _, _ in plan} <= {"live", "create"}
    guests = sandbox.guests()
    assert {name: guest["since"] for name, guest in guests.items()} == began, "a guest was restarted"
    assert (guests["ann"]["vcpus"], guests["ann"]["memory"]) == (2, 320 << 20)
    assert sandbox.exec("ann", "nproc").strip() == "2"
    assert "10.11.0.2/24" in sandbox.exec("ann", "ip", "addr")
    assert len(sandbox.exec("eve", "sh", "-c", "ls -d /sys/block/vd*").split()) == 2
    total = int(sandbox.exec("ann", "sh", "-c", "grep MemTotal /proc/meminfo").split()[1])
    assert total > 200 << 10, f"the plugged memory is not in use: {total} KiB"

    # and back again, still live but for the vCPU, which QEMU under TCG does not release
    sandbox.file(SMALL.replace("vcpus: {count: 1, max: 2}", "vcpus: {count: 2, max: 2}"))
    assert {impact for impact, _, _ in plan_of(sandbox, file)} <= {"live", "remove"}
    refused = sandbox.run("up", "-f", file, status=1)
    assert "contents of disks would be lost" in refused.stderr
    sandbox.run("up", "-f", file, "--yes")
    guests = sandbox.guests()
    assert {name: guest["since"] for name, guest in guests.items()} == began, "a guest was restarted"
    assert (guests["ann"]["vcpus"], guests["ann"]["memory"]) == (2, 192 << 20)
    assert "10.11.0.2" not in sandbox.exec("ann", "ip", "addr")
    assert plan_of(sandbox, file) == []


def test_cmdline_change_restarts_only_that_guest(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    sandbox.run("up", "-f", file)
    began = sandbox.guests()

    sandbox.file(SMALL.replace("eve: {host: beta,", "eve: {host: beta, cmdline: colour=blue,"))
    plan = plan_of(sandbox, file)
    sandbox.run("up", "-f", file)

    assert plan == [("restart", "guest eve", "restart")]
    assert "colour=blue" in sandbox.exec("eve", "cat", "/proc/cmdline")
    assert sandbox.guests()["ann"]["since"] == began["ann"]["since"]


def test_guest_moved_and_guest_and_network_removed(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    sandbox.run("up", "-f", file)

    sandbox.file(
        "lab: small\nhosts: {alpha: {}, beta: {}}\nnetworks: {lan: {ipv4: 10.10.0.0/24, ipv6: 'fd10::/64'}}\n"
        "guests: {ann: {host: beta, memory: 192M, nics: [lan]}}\n"
    )
    refused = sandbox.run("up", "-f", file, status=1)
    sandbox.run("up", "-f", file, "--yes")

    assert "--yes" in refused.stderr
    guests = sandbox.guests()
    assert list(guests) == ["ann"]
    assert (guests["ann"]["host"], guests["ann"]["state"]) == ("beta", "running")
    hosts = {host["name"]: host for host in sandbox.json("status")["hosts"]}
    assert hosts["alpha"]["networks"] == []
    assert plan_of(sandbox, file) == []


def test_host_removed_from_the_file_is_cleared(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    sandbox.run("up", "-f", file)

    sandbox.file(
        "lab: small\nhosts: {alpha: {}}\nnetworks: {lan: {ipv4: 10.10.0.0/24, ipv6: 'fd10::/64'}}\n"
        "guests: {ann: {host: alpha, memory: {size: 192M, max: 512M}, vcpus: {count: 1, max: 2}, nics: [lan]}}\n"
    )
    sandbox.run("up", "-f", file)

    assert "orc.small.beta" not in Machine.look().namespaces
    assert plan_of(sandbox, file) == []
    assert sandbox.guests()["ann"]["state"] == "running"


@pytest.mark.parametrize("seconds", [0.8, 1.2, 2.0, 3.5])
def test_kill_9_during_up_then_up_gives_the_right_result(sandbox: Sandbox, seconds: float) -> None:
    file = sandbox.file(SMALL)
    process = sandbox.start("up", "-f", file)
    time.sleep(seconds)  # the moment is arbitrary: that is the point
    process.kill()
    process.wait()

    sandbox.run("up", "-f", file)

    assert {guest["state"] for guest in sandbox.guests().values()} == {"running"}
    assert plan_of(sandbox, file) == []


def test_kill_9_during_up_then_down_leaves_nothing(sandbox: Sandbox) -> None:
    before = Machine.look()
    process = sandbox.start("up", "-f", sandbox.file(SMALL))
    time.sleep(2)
    process.kill()
    process.wait()

    sandbox.run("down", "-f", sandbox.folder / "lab.yaml")

    assert Machine.look().new_since(before) == {}


def test_kill_9_during_down_then_down_leaves_nothing(sandbox: Sandbox) -> None:
    before = Machine.look()
    file = sandbox.file(SMALL)
    sandbox.run("up", "-f", file)
    process = sandbox.start("down", "-f", file)
    time.sleep(0.9)
    process.kill()
    process.wait()

    sandbox.run("down", "-f", file)

    assert Machine.look().new_since(before) == {}


def test_ctrl_c_during_up_rolls_back_what_is_half_made(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    process = sandbox.start("up", "-f", file)
    wait_for_qemu_of("ann")

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "rolled back" in stderr
    states = {name: guest["state"] for name, guest in sandbox.guests().items()}
    assert set(states.values()) <= {"absent", "running"}, states
    assert "absent" in states.values()
    ports = [port for host in sandbox.json("status")["hosts"] for net in host["networks"] for port in net["ports"]]
    assert len(ports) == list(states.values()).count("running")
    sandbox.run("up", "-f", file)
    assert {guest["state"] for guest in sandbox.guests().values()} == {"running"}


def wait_for_qemu_of(guest: str) -> None:
    deadline = time.monotonic() + 60
    while not subprocess.run(["pgrep", "-f", f"guest={guest},"], capture_output=True).stdout:
        assert time.monotonic() < deadline, f"guest {guest} was not started"
        time.sleep(0.05)


@pytest.mark.parametrize(("answer", "status"), [(b"n\n", 0), (b"y\n", 130), (b"\x03", 130)])
def test_ctrl_c_on_a_terminal_asks_once(sandbox: Sandbox, answer: bytes, status: int) -> None:
    file = sandbox.file(SMALL)
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "orchestrator", "up", "-f", str(file)], sandbox.env)
    shown = b""
    try:
        wait_for_qemu_of("ann")
        os.write(fd, b"\x03")
        while b"Stop?" not in shown:
            shown += os.read(fd, 4096)
        os.write(fd, answer)
        with contextlib.suppress(OSError):  # the terminal ends with the command
            while part := os.read(fd, 4096):
                shown += part
        _, ended = os.waitpid(pid, 0)
    finally:
        os.close(fd)

    assert os.waitstatus_to_exitcode(ended) == status, shown.decode(errors="replace")
    states = {guest["state"] for guest in sandbox.guests().values()}
    assert (states == {"running"}) == (status == 0)


def test_two_ups_at_once_second_names_the_first(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    first = sandbox.start("up", "-f", file)
    lock = Path(sandbox.env["ORCHESTRATOR_RUN"]) / "small.lock"
    deadline = time.monotonic() + 30
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    second = sandbox.run("up", "-f", file, status=5)
    first.communicate(timeout=120)

    assert str(first.pid) in second.stderr
    assert first.returncode == 0


def test_agent_killed_is_started_again_and_guests_go_on(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    sandbox.run("up", "-f", file)
    began = sandbox.guests()
    for owner in Path(sandbox.env["ORCHESTRATOR_RUN"]).glob("*/owner.json"):
        os.kill(json.loads(owner.read_text())["pid"], signal.SIGKILL)

    after = sandbox.guests()
    again = sandbox.run("up", "-f", file)

    assert {name: guest["state"] for name, guest in after.items()} == {"ann": "running", "eve": "running"}
    assert {name: guest["since"] for name, guest in after.items()} == {n: g["since"] for n, g in began.items()}
    assert "nothing to do" in again.stderr
    assert sandbox.exec("ann", "echo", "hello") == "hello\n"


def test_qemu_killed_is_shown_with_its_console_and_up_heals(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL)
    sandbox.run("up", "-f", file)
    pid = subprocess.run(["pgrep", "-f", "guest=ann"], capture_output=True, text=True, check=True).stdout.split()[0]
    os.kill(int(pid), signal.SIGKILL)

    deadline = time.monotonic() + 30
    while (crashed := sandbox.guests()["ann"])["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    table = sandbox.run("status", "-f", file).stdout
    sandbox.run("up", "-f", file)

    assert crashed["state"] == "crashed"
    assert "ann is up" in "\n".join(crashed["tail"])
    assert "the end of its console" in table
    assert sandbox.guests()["ann"]["state"] == "running"


def test_guest_that_panics_at_boot_fails_with_its_console(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL.replace("eve: {host: beta,", "eve: {host: beta, cmdline: orc.panic=1,"))

    failed = sandbox.run("up", "-f", file, status=1)

    assert "Kernel panic" in failed.stderr
    assert "│" in failed.stderr  # the tail of the console
    guests = sandbox.guests()
    assert guests["ann"]["state"] == "running"
    assert guests["eve"]["state"] == "crashed"


def test_guest_larger_than_the_host_is_refused_and_others_go_on(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL.replace("eve: {host: beta,", "eve: {host: beta, memory: 2T,"))

    failed = sandbox.run("up", "-f", file, status=1)

    assert "guest eve wants 2T" in failed.stderr
    assert sandbox.guests()["ann"]["state"] == "running"


def test_kill_9_while_a_namespace_is_made_leaves_none_that_is_nobodys(sandbox: Sandbox, tmp_path: Path) -> None:
    file = sandbox.file(SMALL)
    before = Machine.look()
    slow = tmp_path / "ip"  # stands still where the namespace is there and has no mark yet
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 60\n")
    slow.chmod(0o755)
    sandbox.env["PATH"] = f"{tmp_path}:{sandbox.env['PATH']}"
    process = sandbox.start("up", "-f", file)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline, "no namespace was made"
        time.sleep(0.05)

    process.kill()
    process.wait(30)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    assert Machine.look().namespaces == before.namespaces
    sandbox.env["PATH"] = sandbox.env["PATH"].partition(":")[2]
    sandbox.run("up", "-f", file)


def test_namespace_of_somebody_else_is_not_touched(sandbox: Sandbox) -> None:
    subprocess.run(["ip", "netns", "add", "orc.small.alpha"], check=True)
    try:
        failed = sandbox.run("up", "-f", sandbox.file(SMALL), status=1)
        assert "orc.small.alpha belongs to somebody else" in failed.stderr
        assert "orc.small.alpha" in Machine.look().namespaces
    finally:
        subprocess.run(["ip", "netns", "del", "orc.small.alpha"], check=True)


def test_missing_emulator_says_so(sandbox: Sandbox) -> None:
    file = sandbox.file(SMALL.replace("eve: {host: beta,", "eve: {host: beta, emulator: /no/such/qemu,"))

    failed = sandbox.run("up", "-f", file, status=1)

    assert "/no/such/qemu" in failed.stderr
    assert "hint:" in failed.stderr
    assert sandbox.guests()["ann"]["state"] == "running"


def test_same_name_from_another_file_is_refused(sandbox: Sandbox) -> None:
    sandbox.run("up", "-f", sandbox.file(SMALL))
    other = sandbox.file(SMALL, "other.yaml")

    refused = sandbox.run("up", "-f", other, status=3)

    assert "--take-over" in refused.stderr


@pytest.mark.parametrize("command", ["up", "down", "plan", "status"])
def test_without_root_says_so(sandbox: Sandbox, command: str) -> None:
    file = sandbox.file(Template(SMALL).template)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *sandbox_command(command, file)],
        env={**sandbox.env, "ORCHESTRATOR_STATE": "/var/tmp/orc-nobody-state", "HOME": "/nonexistent"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert any(word in done.stderr for word in ("sudo", "is not up", "no lab is up")), done.stderr


def sandbox_command(command: str, file: Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator", command, "-f", str(file)]
