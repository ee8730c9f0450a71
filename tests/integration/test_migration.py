"""Live migration between two computers with a libvirtd each: what goes along, and what breaks on the way."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import Sandbox
from tests.guest_use import wait_until
from tests.integration.computers import STATE_MIB, Computers, computers

pytestmark = pytest.mark.privileged

OTHER = {"one": "two", "two": "one"}
SECONDS = 300.0
WEB = "{host: one, disks: [{name: data, size: 64M}]}"


def lab_file(machines: Computers, web: str = WEB, lab: str = "move", number: int = 80) -> str:
    return f"""\
lab: {lab}
hosts:
  one: {machines.host("one")}
  two: {machines.host("two")}
networks: {{lan: {{ipv4: 10.{number}.0.0/24, ipv6: "fd{number}::/64"}}}}
defaults:
  guest:
    memory: {{size: 256M, max: 512M}}
    nics: [lan]
guests:
  web: {web}
  eve: {{host: two}}
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Computers]:
    with computers("one", "two") as made:
        yield made


@pytest.fixture(scope="module")
def lab(machines: Computers, shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    shared_sandbox.file(lab_file(machines))
    shared_sandbox.run("up")
    yield shared_sandbox
    shared_sandbox.run("down")


@dataclass
class Trip:
    """The guest ``web`` and where it goes: from the host where the test before has left it to the other one."""

    lab: Sandbox
    machines: Computers
    source: str

    @property
    def target(self) -> str:
        return OTHER[self.source]

    def start(self, *options: str) -> subprocess.Popen[str]:
        return self.lab.start("migrate", *options, "web", self.target)

    def slow(self, bandwidth: int = 2) -> subprocess.Popen[str]:
        """A migration that is under way, and takes long."""
        moving = self.start("--bandwidth", str(bandwidth))
        wait_until(lambda: self.target in self.states() or moving.poll() is not None, "nothing came to the target")
        return moving

    def states(self) -> dict[str, str]:
        """Host → state of the domain of ``web`` there, as libvirt says."""
        return {name: state for name in OTHER if (state := self.machines[name].domains().get("move.web"))}

    def left(self, host: str) -> list[str]:
        """Files and taps of ``web`` on a host."""
        files = self.machines[host].path("/var/lib/orchestrator").glob("labs/move/hosts/*/guests/web")
        links = json.loads(self.machines[host].run("ip", "-j", "-d", "link"))
        return [*map(str, files), *(link["ifname"] for link in links if "port/web/" in link.get("ifalias", ""))]

    def mark(self) -> str:
        """New contents of the guest's memory and disk that must go along: their checksums."""
        script = """mkdir -p /mem; mountpoint -q /mem || mount -t tmpfs -o size=48m tmpfs /mem
            head -c 30000000 /dev/urandom > /mem/pattern && head -c 20000000 /dev/urandom > /dev/vda && sync"""
        self.lab.exec("web", "sh", "-c", script)
        return self.sums()

    def sums(self) -> str:
        return self.lab.exec("web", "sh", "-c", "echo 3 > /proc/sys/vm/drop_caches; md5sum /mem/pattern /dev/vda")

    def marked(self) -> str:
        """The checksums of what is there, or of new contents where there is nothing yet."""
        there = self.lab.run("exec", "web", "--", "test", "-e", "/mem/pattern", status=None).returncode == 0
        return self.sums() if there else self.mark()

    def check_unharmed(self, before: str) -> None:
        """The guest goes on where it was, nothing is left on the target, and moving it works now."""
        assert self.states() == {self.source: "running"}
        assert self.left(self.target) == []
        assert self.sums() == before
        self.lab.run("migrate", "web", self.target)
        assert self.states() == {self.target: "running"}
        assert self.sums() == before


@pytest.fixture
def trip(machines: Computers, lab: Sandbox) -> Trip:
    return Trip(lab, machines, lab.guests()["web"]["host"])


@pytest.fixture
def from_home(trip: Trip) -> Iterator[Trip]:
    """From host one, which the file names; for tests that change the file."""
    trip.lab.run("migrate", "web", "one")
    yield Trip(trip.lab, trip.machines, "one")
    trip.lab.file(lab_file(trip.machines))
    trip.lab.run("up", "--yes")


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """What the process says until ``wanted`` is in it."""
    assert process.stderr
    text, deadline = "", time.monotonic() + SECONDS
    while not re.search(wanted, text):
        assert time.monotonic() < deadline, f"{wanted!r} did not come: {text!r}"
        if select.select([process.stderr], [], [], 0.2)[0]:
            line = process.stderr.readline()
            assert line, text
            text += line
    return text


# -- a guest goes on -------------------------------------------------------------------------------------------------


def test_guest_goes_on_with_memory_disks_network_and_name(trip: Trip) -> None:
    lab, before, since = trip.lab, trip.mark(), trip.lab.guests()["web"]["since"]
    count = "n=0; while sleep 0.05; do n=$((n + 1)); echo $n > /mem/next; mv /mem/next /mem/count; done"
    lab.exec("web", "sh", "-c", f"({count}) > /dev/null 2>&1 &")
    counted = int(lab.exec("web", "sh", "-c", "sleep 1; cat /mem/count"))
    pinging = lab.start("exec", "--timeout", "200", "eve", "--", "ping", "-i", "0.2", "-w", "30", "10.80.0.2")

    report = lab.json("migrate", "web", trip.target)

    reached = lab.json("reach")
    seen, log = lab.guests()["web"], lab.run("logs", "web").stdout
    again = lab.run("up")
    pings, _ = pinging.communicate()
    assert (report["guest"], report["source"], report["target"]) == ("web", trip.source, trip.target)
    assert 0 < report["downtime_seconds"] < report["seconds"]
    assert report["memory_bytes"] > 30_000_000
    assert report["disk_bytes"] > 20_000_000
    assert report["passes"] > 0
    assert (seen["host"], seen["home"], seen["state"], seen["ready"]) == (trip.target, "one", "running", True)
    assert abs(seen["since"] - since) < 0.001
    assert "guest web is up" in log
    assert trip.sums() == before
    assert int(lab.exec("web", "cat", "/mem/count")) > counted
    assert all(one["milliseconds"] is not None for one in reached)
    numbers = [int(number) for number in re.findall(r"seq=(\d+)", pings)]
    assert numbers, pings
    assert max(numbers) - len(numbers) < 50, f"too many of {max(numbers)} pings lost: {len(numbers)} answers"
    assert "nothing to do" in again.stderr
    assert trip.states() == {trip.target: "running"}
    assert trip.left(trip.source) == []


def test_place_is_shown_and_kept_until_the_file_changes(from_home: Trip) -> None:
    lab, machines = from_home.lab, from_home.machines
    lab.run("guest", "migrate", "web", "two")

    table, plan = lab.run("status").stdout, lab.run("plan")
    wish = lab.json("inspect", "web")["wish"]
    lab.file(lab_file(machines, WEB.replace("one", "two")))
    adopted = lab.run("up")
    lab.file(lab_file(machines))
    back = lab.json("plan")
    up = lab.run("up")

    assert "two (file: one)" in table
    assert "the file says one" in plan.stderr
    assert (wish["host"], wish["home"]) == ("two", "one")
    assert "nothing to do" in adopted.stderr
    moves = [each for each in back["operations"] if each["summary"] == "move to one"]
    assert [(each["subject"], each["host"], each["impact"]) for each in moves] == [("guest web", "two", "live")]
    assert "move to one" in up.stderr
    assert from_home.states() == {"one": "running"}


def test_changed_file_moves_the_guest_and_makes_its_other_changes(from_home: Trip) -> None:
    lab, machines, before = from_home.lab, from_home.machines, from_home.marked()
    live = "{host: two, memory: {size: 384M, max: 512M}, disks: [{name: data, size: 64M}, {name: logs, size: 32M}]}"
    lab.file(lab_file(machines, live))

    plan = [(each["impact"], each["subject"], each["summary"]) for each in lab.json("plan")["operations"]]
    lab.run("up")
    again = lab.run("up")
    after, disks = from_home.sums(), lab.exec("web", "cat", "/proc/partitions")
    lab.file(lab_file(machines, "{host: one, cmdline: quiet, disks: [{name: data, size: 64M}]}"))
    lab.run("up", "--yes")  # the disk `logs` goes, before the guest does
    words, left = lab.exec("web", "cat", "/proc/cmdline"), lab.exec("web", "md5sum", "/dev/vda")

    assert ("live", "guest web", "move to two") in plan
    assert ("live", "guest web", "change") in plan
    assert {impact for impact, subject, _ in plan if subject == "guest web"} <= {"create", "live", "remove"}
    assert "nothing to do" in again.stderr
    assert after == before
    assert "vdb" in disks
    assert words.strip().endswith("quiet")
    assert left.split()[0] == before.splitlines()[1].split()[0]
    assert from_home.states() == {"one": "running"}


def test_paused_guest_stays_paused(trip: Trip) -> None:
    trip.lab.run("pause", "web")

    trip.lab.run("migrate", "web", trip.target)
    paused = trip.states()
    trip.lab.run("resume", "web")

    assert paused == {trip.target: "paused"}
    assert trip.lab.exec("web", "echo", "on") == "on\n"


def test_snapshots_do_not_go_along_and_somebody_must_agree(trip: Trip) -> None:
    trip.lab.run("snapshot", "save", "web", "clean")

    refused = trip.lab.run("migrate", "web", trip.target, status=1)
    trip.lab.run("migrate", "web", trip.target, "--yes")

    assert "snapshot clean: does not move" in refused.stdout
    assert "--yes" in refused.stderr
    assert trip.lab.json("snapshot", "list", "web") == []


def test_disk_of_an_image_goes_along(machines: Computers, lab: Sandbox, sandbox: Sandbox) -> None:
    """An image without an operating system: what is on its disk was put there from outside, above it and below."""
    blank = sandbox.folder / "blank.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", blank, "32M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 17 1M 64k", blank], check=True, capture_output=True)
    file = sandbox.file(
        lab_file(machines, "{host: one, image: blank, disk_size: 48M, nics: []}", "disk", 81).replace(
            "guests:", "images: {blank: {path: blank.qcow2, ready: none}}\nguests:"
        )
    )
    sandbox.run("up", "-f", file)
    sandbox.run("stop", "web", "--hard")
    access = "for f in /var/lib/orchestrator/labs/disk/hosts/*/guests/web/root.qcow2; do qemu-io -c '{}' $f; done"
    machines["one"].run("sh", "-c", access.format("write -P 34 40M 64k"))
    sandbox.run("start", "web")

    report = sandbox.json("migrate", "web", "two")
    sandbox.run("stop", "web", "--hard")
    found = [machines["two"].run("sh", "-c", access.format(f"read -P {what} 64k")) for what in ("17 1M", "34 40M")]
    sandbox.run("start", "web")
    sandbox.run("down", "-f", file)

    assert report["disk_bytes"] > 0
    assert all("64 KiB" in each and "fail" not in each for each in found), found


# -- what does not work ----------------------------------------------------------------------------------------------


FILLER = "/var/lib/orchestrator/filler"


def test_full_disk_on_the_target(trip: Trip) -> None:
    before, there = trip.marked(), trip.machines[trip.target]
    there.run("fallocate", "-l", f"{STATE_MIB - 40}M", FILLER)
    try:
        refused = trip.lab.run("migrate", "web", trip.target, status=1)
    finally:
        there.run("rm", FILLER)

    wanted = rf"guest web needs \d+ MiB of disk, host {trip.target} has \d+ MiB left"
    assert re.search(wanted, refused.stderr), refused.stderr
    trip.check_unharmed(before)


def test_disk_of_the_target_fills_up_on_the_way(trip: Trip) -> None:
    before, there = trip.mark(), trip.machines[trip.target]
    moving = trip.slow()
    try:
        there.run("sh", "-c", f"cat /dev/zero > {FILLER} || true")
        _, said = moving.communicate(timeout=SECONDS)
    finally:
        there.run("rm", "-f", FILLER)

    assert moving.returncode == 1, said
    trip.check_unharmed(before)


def test_name_that_is_taken_on_the_target(trip: Trip) -> None:
    before, there = trip.marked(), trip.machines[trip.target]
    xml = "<domain type='qemu'><name>move.web</name><memory>65536</memory><os><type>hvm</type></os></domain>"
    there.run("sh", "-c", f'echo "{xml}" > /run/theirs.xml; virsh -c qemu:///system define /run/theirs.xml')
    try:
        refused = trip.lab.run("migrate", "web", trip.target, status=1)
        theirs = trip.states()
    finally:
        there.run("virsh", "-c", "qemu:///system", "undefine", "move.web")

    assert "a domain named move.web is there and is not of this lab" in refused.stderr
    assert theirs == {trip.source: "running", trip.target: "shut off"}
    trip.check_unharmed(before)


def test_host_without_libvirtd(machines: Computers, lab: Sandbox, sandbox: Sandbox) -> None:
    text = lab_file(machines, "{host: one}", "embed", 82)
    text = text.replace(machines.host("two"), machines.host("two", libvirt="embed"))
    sandbox.run("up", "-f", sandbox.file(text))

    refused = sandbox.run("migrate", "web", "two", status=1)
    changed = sandbox.file(text.replace("web: {host: one}", "web: {host: two}"))
    plan = sandbox.run("plan", "-f", changed).stdout
    needs_yes = sandbox.run("up", "-f", changed, status=1)
    sandbox.run("down", "-f", changed)

    assert "guest web cannot move as it runs: host two has no libvirtd" in refused.stderr
    assert "not live: host two has no libvirtd" in plan
    assert "recreate" in plan
    assert "--yes" in needs_yes.stderr


# -- what breaks on the way ------------------------------------------------------------------------------------------


def test_ctrl_c_while_it_tells_how_far_it_is(trip: Trip) -> None:
    before, lab, moving = trip.mark(), trip.lab, trip.slow(1)
    said = read_until(
        moving, rf"… guest web on {trip.source}: move to {trip.target}: disks: \d+ of \d+ MiB, \d+ MiB/s"
    )
    meanwhile, used = lab.guests()["web"], lab.exec("web", "echo", "here")
    locked = lab.run("up", status=5)

    moving.send_signal(signal.SIGINT)
    _, rest = moving.communicate(timeout=SECONDS)

    assert moving.returncode == 130, said + rest
    assert (meanwhile["host"], meanwhile["state"]) == (trip.source, "running")
    assert used == "here\n"
    assert "is being changed by" in locked.stderr
    trip.check_unharmed(before)


def kill_command(trip: Trip, moving: subprocess.Popen[str]) -> None:
    moving.kill()


def kill_agent(trip: Trip, host: str) -> None:
    trip.machines[host].run("sh", "-c", "pkill -KILL -P $(pgrep -o -f 'orchestrator.agent --lab=move ')")


def kill_agent_of_source(trip: Trip, moving: subprocess.Popen[str]) -> None:
    kill_agent(trip, trip.source)


def kill_agent_of_target(trip: Trip, moving: subprocess.Popen[str]) -> None:
    kill_agent(trip, trip.target)


def kill_libvirtd_of_target(trip: Trip, moving: subprocess.Popen[str]) -> None:
    there = trip.machines[trip.target]
    there.stop_libvirtd()
    try:
        moving.wait(SECONDS)
    finally:
        there.start_libvirtd()


def kill_qemu_of_target(trip: Trip, moving: subprocess.Popen[str]) -> None:
    trip.machines[trip.target].run("pkill", "-KILL", "-f", "guest=move.web,")


def ctrl_c_while_target_is_silent(trip: Trip, moving: subprocess.Popen[str]) -> None:
    """libvirt cannot abort while a disk waits for the other side."""
    trip.machines[trip.target].run("pkill", "-STOP", "-f", "guest=move.web,")
    time.sleep(2)  # until more is sent than fits into buffers
    moving.send_signal(signal.SIGINT)
    moving.wait(SECONDS)


BREAKS = [
    kill_command,
    kill_agent_of_source,
    kill_agent_of_target,
    kill_libvirtd_of_target,
    kill_qemu_of_target,
    ctrl_c_while_target_is_silent,
]


@pytest.mark.parametrize("how", BREAKS, ids=lambda how: how.__name__)
def test_what_breaks_on_the_way_leaves_the_guest_where_it_was(
    trip: Trip, how: Callable[[Trip, subprocess.Popen[str]], None]
) -> None:
    before, moving = trip.marked(), trip.slow()

    how(trip, moving)
    _, said = moving.communicate(timeout=SECONDS)
    up = trip.lab.run("up")
    again = trip.lab.run("up")

    assert moving.returncode != 0, said
    assert "nothing to do" in again.stderr, up.stderr
    trip.check_unharmed(before)


#: The command line, killed when it is about to pass on a certain message between the two libvirts, or just has.
KILLED_AT = """
import os, signal, struct, sys
from orchestrator.cli import main
from orchestrator.guests import migration

TO_TARGET, PROCEDURE, KIND, AFTER = (int(word) for word in sys.argv[1:5])
carry = migration.relay


class Cut:
    def __init__(self, stream, to_target):
        self.stream, self.to_target, self.pending = stream, to_target, b""
        self.recv, self.close, self.fileno = stream.recv, stream.close, stream.fileno

    def sendall(self, data):
        self.pending += data
        while len(self.pending) >= 28:
            length, _, _, procedure, kind = struct.unpack_from(">IIIII", self.pending)
            if len(self.pending) < length:
                return
            hit = (self.to_target, procedure, kind) == (TO_TARGET, PROCEDURE, KIND)
            if hit and not AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            self.stream.sendall(self.pending[:length])
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
            self.pending = self.pending[length:]


migration.relay = lambda left, right: carry(Cut(left, 0), Cut(right, 1))
sys.argv = ["orchestrator", *sys.argv[5:]]
main()
"""
PREPARE, FINISH = 303, 306
CALL, REPLY = 0, 1
STEPS = [
    pytest.param((1, PREPARE, CALL, 1), id="target-prepares"),
    pytest.param((0, PREPARE, REPLY, 0), id="target-has-prepared"),
    pytest.param((1, FINISH, CALL, 0), id="everything-was-sent"),
    pytest.param((1, FINISH, CALL, 1), id="target-finishes"),
    pytest.param((0, FINISH, REPLY, 0), id="target-has-finished"),
    pytest.param((0, FINISH, REPLY, 1), id="source-may-know"),
]


def killed_at(trip: Trip, step: tuple[int, int, int, int]) -> None:
    words = [*map(str, step), "migrate", "web", trip.target]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, *words],
        cwd=trip.lab.folder,
        env=trip.lab.env,
        capture_output=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("step", STEPS)
def test_command_killed_at_each_step_leaves_one_guest(trip: Trip, step: tuple[int, int, int, int]) -> None:
    before = trip.marked()
    killed_at(trip, step)
    seen = [trip.states() for _ in range(4)]

    up = trip.lab.run("up")
    again = trip.lab.run("up")

    assert all(list(each.values()).count("running") <= 1 for each in seen), seen
    assert "nothing to do" in again.stderr, up.stderr
    trip.check_unharmed(before)


@pytest.mark.parametrize("step", STEPS[-2:])
def test_command_killed_at_the_end_is_finished_by_the_same_command(
    trip: Trip, step: tuple[int, int, int, int]
) -> None:
    before = trip.marked()
    killed_at(trip, step)

    trip.lab.run("migrate", "web", trip.target)
    again = trip.lab.run("up")

    assert trip.states() == {trip.target: "running"}
    assert trip.left(trip.source) == []
    assert trip.sums() == before
    assert "nothing to do" in again.stderr


# -- a libvirtd that comes and goes ----------------------------------------------------------------------------------


def test_libvirtd_that_is_restarted_is_found_again_with_its_events(trip: Trip) -> None:
    follower = trip.lab.start("events", "--follow", "-o", "json")
    assert follower.stdout
    here = trip.machines[trip.source]
    here.stop_libvirtd()
    here.start_libvirtd()

    after = trip.lab.exec("web", "echo", "still here")
    trip.lab.run("pause", "web")
    trip.lab.run("resume", "web")

    told, deadline = "", time.monotonic() + SECONDS
    while '"resumed"' not in told:
        assert time.monotonic() < deadline, told
        told += follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    follower.wait(timeout=SECONDS)
    assert after == "still here\n"
    assert trip.lab.guests()["web"]["ready"]


def test_guest_that_boots_while_libvirtd_is_restarted(machines: Computers, lab: Sandbox, sandbox: Sandbox) -> None:
    file = sandbox.file(lab_file(machines, "{host: one}", "boot", 83))
    booting = sandbox.start("up", "-f", file)
    wait_until(lambda: machines["one"].domains().get("boot.web") == "running", "the guest did not start")
    time.sleep(0.5)  # the agent has to hear of it
    machines["one"].stop_libvirtd()
    machines["one"].start_libvirtd()

    _, said = booting.communicate(timeout=SECONDS)
    again = sandbox.run("up", "-f", file)
    sandbox.run("down", "-f", file)

    assert booting.returncode == 0, said
    assert "nothing to do" in again.stderr
