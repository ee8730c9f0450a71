"""Hosts that are virtual machines: what they are, what becomes of them, and what goes wrong with them."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.conftest import Machine
from tests.guest_use import read_until, wait_until
from tests.nested.conftest import Lab

VIRSH = ["virsh", "-q", "-c", "qemu:///system"]


@pytest.fixture
def lab(nested: Lab) -> Iterator[Lab]:
    """The lab, which is as its file says again after a test that has changed that, or has failed."""
    yield nested
    if (nested.folder / "lab.yaml").read_text() != nested.text or (nested.folder / "failed").exists():
        nested.file(nested.text)
        nested.run("up", "--yes")


def with_lines(lab: Lab, host: str = "", guest: str = "") -> str:
    """The lab file with a host and a guest more."""
    text = lab.text.replace("networks:", f"  {host}\nnetworks:", 1) if host else lab.text
    return f"{text}  {guest}\n" if guest else text


def virsh(*args: str) -> str:
    return subprocess.run([*VIRSH, *args], capture_output=True, text=True, check=True, timeout=300).stdout


# -- what a host is --------------------------------------------------------------------------------------------------


def test_hosts_are_machines_with_their_own_kvm(nested: Lab) -> None:
    listed = nested.json("host", "list")
    facts = nested.json("host", "facts", "alpha")

    assert [(host["name"], host["kind"], host["state"], host["accel"]) for host in listed] == [
        ("alpha", "vagrant", "up", "kvm"),
        ("beta", "vagrant", "up", "kvm"),
    ]
    assert facts["cpu"]["virtualization"] in ("svm", "vmx")
    cards = [device for device in facts["pci"] if device["class_code"].startswith("0200")]
    assert len(cards) == 2, "a NIC of Vagrant's and one of the underlay"
    assert all(card["bus_master"]["capable"] for card in cards)
    assert nested.on("alpha", "systemctl is-enabled orchestrator-agents.service").strip() == "enabled"


def test_key_that_everybody_knows_opens_nothing(nested: Lab) -> None:
    keys = nested.on("alpha", "find / -xdev -name 'authorized_keys*' -exec cat {} +")

    assert re.fullmatch(r"(ssh-ed25519 \S+ orchestrator-nested-alpha\n)\1", keys), "one key, of vagrant and of root"
    assert nested.on("alpha", "cat /etc/hostname; hostname") == "alpha\nalpha\n"


def test_kernel_of_an_emulated_host_is_not_patched_when_guests_come_and_go(nested: Lab) -> None:
    """As a guest does: a virtual machine, a processor with an APIC that is off, a cpuset."""
    if nested.on("alpha", "systemd-detect-virt", status=None).strip() != "qemu":
        pytest.skip("the hosts of this lab have real processors: nothing there executes what is replaced")
    count = "awk '/patch/ { print $2 }' kprobe_profile"

    counts = nested.on(
        "alpha",
        f"""cd /sys/kernel/tracing
        echo 'p:patch arch_jump_label_transform_queue' >> kprobe_events
        echo 1 > events/kprobes/patch/enable
        echo 1 > events/module/module_load/enable
        echo 0 > events/module/module_load/enable
        {count}
        systemd-run --quiet --wait --property=AllowedCPUs=0 timeout 1 /usr/local/sbin/steady-kernel
        {count}
        echo 0 > events/kprobes/patch/enable
        echo '-:patch' >> kprobe_events""",
    )

    before, after = map(int, counts.split())
    assert before > 0, "the probe does not count"
    assert after == before


def test_disk_of_the_lab_file_is_there(nested: Lab) -> None:
    size = nested.on("beta", "blockdev --getsize64 /dev/disk/by-id/virtio-data")

    assert int(size) == 1 << 30


def test_doctor_finds_what_a_lab_needs(nested: Lab) -> None:
    wanted = ["rights", "accelerator", "qemu", "libvirtd", "memfd", "userfaultfd", "bpf", "tap", "firewall"]

    findings = json.loads(nested.run("host", "doctor", "beta", "-o", "json", status=None).stdout)

    found = {finding["name"]: finding["ok"] for finding in findings}
    assert {name: found[name] for name in wanted} == dict.fromkeys(wanted, True)


# -- bad luck --------------------------------------------------------------------------------------------------------


BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


def test_host_is_rebooted_while_the_other_gets_more_memory_and_their_guests_come_back(lab: Lab) -> None:
    boot = lab.on("beta", f"{BOOT_ID}; systemctl --no-block reboot")
    wait_until(lambda: lab.on("beta", BOOT_ID, status=None) != boot, "it stays up")
    lab.text = lab.text.replace("alpha: {kind: vagrant, memory: 2G", "alpha: {kind: vagrant, memory: 2304M")
    lab.file(lab.text)

    lab.run("up")  # beta is on its way down, off, or on its way up

    assert 2 << 30 < lab.json("host", "facts", "alpha")["memory"]["total"] < 2304 << 20
    assert all(one["milliseconds"] is not None for one in lab.json("reach"))


def test_host_without_power_and_halted_host_start_again_also_when_libvirts_networks_are_lost(lab: Lab) -> None:
    lab.on("beta", "echo kept > /root/mark && sync")
    virsh("destroy", "orc-nested-alpha")
    listed = {host["name"]: (host["state"], host["problem"]) for host in lab.json("host", "list")}
    lab.run("down", "--halt")
    off = virsh("list", "--all", "--state-shutoff", "--name").split()
    for network in ("vagrant-libvirt", "orc-nested"):
        virsh("net-destroy", network)
        virsh("net-undefine", network)

    said = lab.run("up").stderr

    assert re.search(r"^alpha, beta: (emulated: KVM|under KVM)", said, re.MULTILINE), said
    assert listed == {"alpha": ("broken", "the machine is off"), "beta": ("up", None)}
    assert {"orc-nested-alpha", "orc-nested-beta"} <= set(off)
    assert lab.on("beta", "cat /root/mark") == "kept\n"
    assert all(one["milliseconds"] is not None for one in lab.json("reach"))


def test_changed_host_key_is_refused(lab: Lab) -> None:
    key = "/etc/ssh/ssh_host_ed25519_key"
    lab.on("beta", f"mv {key} /root/key; ssh-keygen -qt ed25519 -N '' -f {key}; systemctl restart ssh")
    try:
        refused = lab.run("up", status=None)
        other = lab.exec("ann", "hostname")
    finally:
        lab.on("beta", f"mv /root/key {key}; systemctl restart ssh", check_key=False)

    assert refused.returncode == 1
    assert "host beta: the key of" in refused.stderr
    assert "has changed" in refused.stderr
    assert "rm " in refused.stderr
    assert other == "ann\n"


def test_full_disk_of_a_host_is_said_and_up_goes_on_when_there_is_room(lab: Lab) -> None:
    lab.on("beta", "rm -rf /var/cache/orchestrator/images; fallocate -l $(df -B1 --output=avail / | tail -1) /fill")
    lab.file(with_lines(lab, guest="bob: {host: beta}"))
    try:
        full = lab.run("up", status=None)
        others = [lab.exec(name, "hostname") for name in ("ann", "eve")]
    finally:
        lab.on("beta", "rm -f /fill")
    lab.run("up")

    assert full.returncode == 1
    assert re.search(r"(disk has|no space)", full.stderr, re.IGNORECASE), full.stderr
    assert others == ["ann\n", "eve\n"]
    assert lab.exec("bob", "hostname") == "bob\n"


def test_host_that_stands_still_goes_on(lab: Lab) -> None:
    """As a snapshot that was killed in the middle leaves it."""
    virsh("suspend", "orc-nested-beta")

    still = lab.json("host", "list")
    lab.run("up")

    assert [(host["name"], host["problem"]) for host in still if host["problem"]] == [
        ("beta", "the machine is paused")
    ]
    assert lab.exec("eve", "hostname") == "eve\n"


def test_build_of_a_box_that_is_killed_leaves_nothing_and_the_boxes_that_were_there(nested: Lab) -> None:
    before = Machine.look(), nested.json("box", "list")
    build = nested.start("box", "build", "--refresh")

    def installing() -> list[str]:
        return subprocess.run(["pgrep", "-x", "mmdebstrap"], capture_output=True, text=True).stdout.split()

    wait_until(installing, "nothing is installed")
    time.sleep(5)
    build.kill()
    build.communicate(timeout=60)
    wait_until(lambda: not installing(), "what it has started runs on")

    assert Machine.look().new_since(before[0]) == {}
    assert nested.json("box", "list") == before[1]
    assert nested.run("box", "build").stdout.strip() == next(box["name"] for box in before[1] if box["in_use"])


# -- the lab changes -------------------------------------------------------------------------------------------------


def test_local_and_vagrant_hosts_in_one_lab(lab: Lab) -> None:
    lab.file(with_lines(lab, "here: {kind: local}", "loc: {host: here}"))

    lab.run("up")
    reached = lab.json("reach")
    lab.file(lab.text)
    lab.run("up", "--yes")

    assert {(one["source"], one["target"]) for one in reached} >= {("loc", "ann"), ("eve", "loc")}
    assert all(one["milliseconds"] is not None for one in reached), reached
    assert [host["name"] for host in lab.json("host", "list")] == ["alpha", "beta"]


def test_up_that_is_broken_off_while_a_host_is_made(lab: Lab) -> None:
    """First politely, then with force: the next `up` makes the host whole, or removes what there is of it."""
    lab.file(with_lines(lab, "gamma: {kind: vagrant, memory: 1G}"))
    for number in (signal.SIGINT, signal.SIGKILL):
        broken = lab.start("up")
        assert broken.stderr
        read_until(broken.stderr.fileno(), b"gamma")
        wait_until(lambda: "orc-nested-gamma" in virsh("list", "--all", "--name"), "it is not made")
        broken.send_signal(number)
        broken.communicate(timeout=300)
        if number == signal.SIGINT:
            assert broken.returncode == 130
            lab.file(lab.text)
            lab.run("up", "--yes")
            assert "orc-nested-gamma" not in virsh("list", "--all", "--name")
            lab.file(with_lines(lab, "gamma: {kind: vagrant, memory: 1G}"))

    lab.run("up")
    kvm = lab.on("gamma", "test -c /dev/kvm && echo yes")
    lab.file(lab.text)
    lab.run("up", "--yes")

    assert kvm == "yes\n"
    assert "orc-nested-gamma" not in virsh("list", "--all", "--name")
    assert "orc-nested-gamma" not in virsh("vol-list", "default")


def test_guest_moves_live_while_it_computes_and_is_pinged(lab: Lab) -> None:
    fill = "mkdir /mem; mount -t tmpfs -o size=40m tmpfs /mem; head -c 32000000 /dev/urandom > /mem/p; md5sum /mem/p"
    count = "n=0; while sleep 0.1; do n=$((n + 1)); echo $n > /mem/next; mv /mem/next /mem/count; done"
    before = lab.exec("ann", "sh", "-c", fill)
    boot = lab.exec("ann", "cat", "/proc/sys/kernel/random/boot_id")
    lab.exec("ann", "sh", "-c", f"({count}) > /dev/null 2>&1 &")
    lab.exec("eve", "sh", "-c", "ping -i 0.2 10.10.0.2 > /tmp/pings 2>&1 &")

    counted = int(lab.exec("ann", "sh", "-c", "sleep 1; cat /mem/count"))
    report = lab.json("guest", "migrate", "ann", "beta")

    there = lab.on("beta", "virsh -c qemu:///system list --name").split()
    here = lab.on("alpha", "virsh -c qemu:///system list --all --name").split()
    after = lab.exec("ann", "md5sum", "/mem/p")
    goes_on = int(lab.exec("ann", "cat", "/mem/count"))
    pings = lab.exec("eve", "sh", "-c", "killall ping; sleep 1; cat /tmp/pings")
    lab.run("guest", "migrate", "ann", "alpha")
    print(report)  # noqa: T201

    assert ("nested.ann" in there, "nested.ann" in here) == (True, False)
    assert (after, lab.exec("ann", "cat", "/proc/sys/kernel/random/boot_id")) == (before, boot)
    assert goes_on > counted
    assert 0 < report["downtime_seconds"] < report["seconds"]
    numbers = [int(number) for number in re.findall(r"seq=(\d+)", pings)]
    lost = max(numbers) + 1 - len(set(numbers))
    assert lost < 100, f"{lost} of {max(numbers)} pings lost, five a second"


# -- snapshots -------------------------------------------------------------------------------------------------------


def test_snapshot_resets_hosts_with_the_guests_that_run_on_them(lab: Lab) -> None:
    """With a processor that is inside a guest nearly always, which an emulated host could not be put back to."""
    lab.exec("ann", "sh", "-c", "echo before > /tmp/mark; while :; do :; done > /dev/null 2>&1 & echo $! > /tmp/busy")
    lab.on("beta", "echo before > /root/mark")
    lab.run("pause", "eve")

    lab.run("host", "snapshot", "save", "clean")
    saved = {name: guest["state"] for name, guest in lab.guests().items()}
    lab.run("resume", "eve")
    lab.exec("ann", "sh", "-c", "echo after > /tmp/mark")
    lab.on("beta", "rm /root/mark")
    listed = lab.json("host", "snapshot", "list")
    lab.run("host", "snapshot", "restore", "clean")
    restored = {name: guest["state"] for name, guest in lab.guests().items()}
    guest = lab.exec("ann", "sh", "-c", "kill $(cat /tmp/busy); cat /tmp/mark")
    host = lab.on("beta", "cat /root/mark; date +%s")
    lab.run("host", "snapshot", "delete", "clean")
    lab.run("resume", "eve")

    assert [(one["host"], one["name"]) for one in listed] == [("alpha", "clean"), ("beta", "clean")]
    assert saved == restored == {"ann": "running", "eve": "paused"}, "a guest that ran goes on, and only that"
    assert guest == "before\n"
    mark, clock = host.split()
    assert mark == "before"
    assert abs(int(clock) - time.time()) < 60, "the clock of a host that was put back is set"
    assert all(one["milliseconds"] is not None for one in lab.json("reach"))
    assert lab.json("host", "snapshot", "list") == []
