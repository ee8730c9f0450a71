"""How the guests of a lab are used: exec, ssh, console, logs, events, power, snapshots.

The tests are the same wherever the guests run. A module that imports them all has the fixture ``lab``: a lab that is
up, with hosts ``alpha`` and ``beta``, a guest ``ann`` on the one, with a disk beside, and ``eve`` on the other.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from orchestrator.patience import every
from tests.conftest import Sandbox


def read_until(fd: int, wanted: bytes, seconds: float = 90) -> bytes:
    """What comes from ``fd`` until ``wanted`` is in it."""
    text, deadline = b"", time.monotonic() + seconds
    while wanted not in text:
        assert time.monotonic() < deadline, f"{wanted!r} did not come: {text!r}"
        if select.select([fd], [], [], 0.2)[0]:
            text += os.read(fd, 4096)
    return text


def wait_until(done: Callable[[], Any], what: str, seconds: float = 300) -> None:
    """Until ``done`` is true; the test fails with ``what`` if it never is."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


# -- exec --------------------------------------------------------------------------------------------------------


def test_exec_passes_output_status_and_input(lab: Sandbox) -> None:
    done = lab.run("exec", "ann", "--", "sh", "-c", "echo out; echo err >&2; exit 7", status=7)
    fed = lab.run("exec", "-i", "eve", "--", "tr", "a-z", "A-Z", feed="hello")

    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert fed.stdout == "HELLO"


def test_exec_json(lab: Sandbox) -> None:
    done = lab.run("exec", "-o", "json", "ann", "--", "hostname")

    assert json.loads(done.stdout) == {"status": 0, "stdout": "ann\n", "stderr": ""}


def test_exec_times_out_with_a_hint(lab: Sandbox) -> None:
    done = lab.run("exec", "--timeout", "1", "ann", "--", "sleep", "30", status=1)

    assert "did not end within" in done.stderr
    assert "--timeout" in done.stderr


# -- ssh ---------------------------------------------------------------------------------------------------------


def test_ssh_through_the_agent(lab: Sandbox) -> None:
    done = lab.run("ssh", "eve", "hostname; exit 5", status=5)

    assert done.stdout == "eve\n"


def test_ssh_config_works_with_plain_ssh(lab: Sandbox) -> None:
    config = lab.file(lab.run("ssh-config").stdout, "ssh_config")

    done = subprocess.run(
        ["ssh", "-F", config, "ann", "hostname"], env=lab.env, capture_output=True, text=True, timeout=90
    )

    assert done.stdout == "ann\n", done.stderr


# -- console, logs, events ---------------------------------------------------------------------------------------


def test_console_takes_keys_and_escape_leaves_it_and_restores_the_terminal(lab: Sandbox) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(lab.folder)
        os.execve(sys.executable, [sys.executable, "-m", "orchestrator", "console", "ann"], lab.env)
    try:
        read_until(fd, b"leave with")
        os.write(fd, b"\n")
        read_until(fd, b"#")
        os.write(fd, b"echo $((6 * 7))-from-the-console\n")
        read_until(fd, b"42-from-the-console")
        second = lab.run("console", "ann", status=1, feed="")
        os.write(fd, b"\x1d")
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(fd)

    assert "somebody else" in second.stderr
    assert "--force" in second.stderr
    assert os.waitstatus_to_exitcode(status) == 0


def test_logs_and_logs_follow(lab: Sandbox) -> None:
    log = lab.run("logs", "ann").stdout
    follower = lab.start("logs", "--follow", "-n", "0", "eve")
    assert follower.stdout

    # what listens may take its time to sit down
    with every(0.5, lambda: lab.exec("eve", "sh", "-c", "echo line-for-the-log > /dev/ttyS0")):
        text = read_until(follower.stdout.fileno(), b"line-for-the-log")

    assert "ann is up" in log
    assert b"line-for-the-log" in text
    follower.send_signal(signal.SIGINT)
    follower.wait(timeout=20)


def test_events_follow_tells_of_a_pause(lab: Sandbox) -> None:
    follower = lab.start("events", "--follow", "-o", "json")
    assert follower.stdout
    read_until(follower.stdout.fileno(), b"agent connected")

    lab.run("pause", "eve")
    lab.run("resume", "eve")

    text = read_until(follower.stdout.fileno(), b'"resumed"').decode()
    kinds = [(event["guest"], event["event"]) for event in map(json.loads, text.strip().splitlines())]
    assert ("eve", "paused") in kinds or '"paused"' in text
    follower.send_signal(signal.SIGINT)
    follower.wait(timeout=20)


# -- power -------------------------------------------------------------------------------------------------------


def test_pause_stops_and_resume_goes_on(lab: Sandbox) -> None:
    lab.run("pause", "eve")
    paused = lab.guests()["eve"]["state"]
    refused = lab.run("exec", "--timeout", "2", "eve", "--", "true", status=None)
    lab.run("resume", "eve")

    assert paused == "paused"
    assert refused.returncode != 0
    assert lab.exec("eve", "echo", "back") == "back\n"


def test_stop_is_graceful_and_a_guest_that_is_off_says_how_to_start_it(lab: Sandbox) -> None:
    stopped = lab.run("stop", "eve")
    off = lab.guests()["eve"]
    refused = lab.run("exec", "eve", "--", "true", status=1)
    lab.run("start", "eve")

    assert "shut down" in stopped.stderr
    assert (off["state"], off["reason"]) == ("off", "shut down")
    assert "not running" in refused.stderr
    assert "orchestrator start eve" in refused.stderr
    assert lab.guests()["eve"]["state"] == "running"


def test_stop_is_hard_after_the_deadline(lab: Sandbox) -> None:
    lab.exec("eve", "sh", "-c", "killall qemu-ga acpid; true", status=None)

    stopped = lab.run("stop", "--timeout", "1", "eve")
    lab.run("start", "eve")

    assert "stopped" in stopped.stderr


def test_restart(lab: Sandbox) -> None:
    lab.exec("eve", "touch", "/tmp/before")

    lab.run("restart", "eve")

    assert "No such file" in lab.run("exec", "eve", "--", "ls", "/tmp/before", status=1).stderr


# -- snapshots ---------------------------------------------------------------------------------------------------


def test_snapshot_restores_memory_and_disk(lab: Sandbox) -> None:
    lab.exec("ann", "sh", "-c", "echo before > /tmp/memory; printf before | dd of=/dev/vda conv=fsync")
    lab.run("snapshot", "save", "ann", "one", "--description", "clean")
    lab.exec("ann", "sh", "-c", "echo after > /tmp/memory; printf after! | dd of=/dev/vda conv=fsync")

    listed = lab.json("snapshot", "list", "ann")
    twice = lab.run("snapshot", "save", "ann", "one", status=1)
    lab.run("snapshot", "restore", "ann", "one")
    disk = lab.exec("ann", "sh", "-c", "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=6 count=1 2>/dev/null")
    memory = lab.exec("ann", "cat", "/tmp/memory")
    lab.run("snapshot", "delete", "ann", "one")
    missing = lab.run("snapshot", "restore", "ann", "one", status=1)

    assert [(one["name"], one["description"]) for one in listed] == [("one", "clean")]
    assert "already" in twice.stderr
    assert (memory, disk) == ("before\n", "before")
    assert "there is no snapshot one" in missing.stderr
    assert lab.json("snapshot", "list", "ann") == []
