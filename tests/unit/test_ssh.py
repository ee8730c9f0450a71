"""Hosts of kind ssh, with a connection that answers what a test tells it to."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shlex
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest

from orchestrator import __version__
from orchestrator.errors import HostError, HostLostError
from orchestrator.hosts import ssh
from orchestrator.hosts.model import SshHost
from orchestrator.hosts.rpc import Server
from orchestrator.hosts.ssh import Connection, SshTransport
from tests.unit.labs import resolved

Answer = tuple[int, bytes, bytes]
MISSING: Answer = (127, b"", b"not found")


class Far(Connection):
    """A machine with a toolkit, or without."""

    def __init__(self, spec: SshHost, there: dict[str, Any] | None) -> None:
        super().__init__("far", spec)
        self.there = there
        self.installs: dict[str, Any] | None = None
        self.answers: dict[str, Answer] = {"mktemp": (0, b"/tmp/x\n", b""), ssh.PYTHON: (0, b"3.13\n", b"")}
        self.said: list[str] = []
        self.files: list[str] = []
        self.agent: Server | None = None
        self.streams = 0

    def run(self, command: str, seconds: float = 0) -> Answer:
        self.said.append(command)
        if ".pyz" in command and command.startswith(ssh.PYTHON):
            self.there = self.installs or self.there
            return self.answers.get("install", (0, b"changed\n", b""))
        if " facts " in command:
            return (0, json.dumps(self.there).encode(), b"") if self.there else MISSING
        return self.answers.get(shlex.split(command)[0], (0, b"", b""))

    def put(self, file: Path, target: str) -> None:
        self.files.append(target)

    def client(self) -> paramiko.SSHClient:
        return paramiko.SSHClient()

    def channel(self, command: str) -> Any:
        if self.agent is None:
            raise HostLostError("no agent answers")
        self.streams += 1
        ours, theirs = socket.socketpair()
        threading.Thread(target=self.agent.serve_stream, args=(theirs,), daemon=True).start()
        return ours


def there(**fields: Any) -> dict[str, Any]:
    return {
        "version": __version__,
        "toolkit": "ours",
        "bindings": True,
        "present": True,
        "agent": True,
        "current": True,
    } | fields


Make = Callable[..., tuple[SshTransport, Far]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(ssh, "our_digest", lambda: "ours")
    monkeypatch.setattr(ssh, "bundle", lambda python, progress: Path(f"/cache/orchestrator-{python}.pyz"))

    def build(found: dict[str, Any] | None, **fields: Any) -> tuple[SshTransport, Far]:
        lab = resolved({"lab": "demo", "hosts": {"far": {"kind": "ssh", "address": "192.0.2.1", **fields}}})
        transport = SshTransport(lab, lab.hosts["far"])
        transport.connection = far = Far(transport.spec, found)
        far.installs = there()
        return transport, far

    return build


def ensure(transport: SshTransport) -> None:
    transport.ensure(lambda _: None)


def installed(far: Far) -> bool:
    return any("--prefix" in command for command in far.said)


def test_host_as_it_should_be_has_no_problems(make: Make) -> None:
    facts = make(there())[0].facts()

    assert (facts.present, facts.agent, facts.problems) == (True, True, ())


@pytest.mark.parametrize(("toolkit", "asked"), [("ours", False), ("theirs", True)])
def test_agent_that_runs_our_toolkit_is_enough(make: Make, toolkit: str, asked: bool) -> None:
    transport, far = make(there())
    far.agent = Server()
    far.agent.register("host.hello", lambda call: {"version": __version__, "toolkit": toolkit})

    first, second = transport.facts(), transport.facts()
    agent = transport.agent()
    agent.close()

    assert transport.agent() is not agent
    assert first == second
    assert (first.present, first.agent, first.problems) == (True, True, ())
    assert any(" facts " in command for command in far.said) is asked
    assert far.streams == 2
    transport.close()


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (None, f"toolkit: missing → {__version__}"),
        (there(version="0.0.9"), f"toolkit: 0.0.9 → {__version__}"),
        (there(toolkit="theirs"), "toolkit: theirs → ours"),
        (there(toolkit=None), "toolkit: of unknown origin → ours"),
        (there(current=False), "the agent runs another toolkit than is installed"),
    ],
)
def test_host_with_another_toolkit_says_so(make: Make, found: dict[str, Any] | None, problem: str) -> None:
    facts = make(found)[0].facts()

    assert facts.problems == (problem,)
    assert facts.present is (found is not None)


@pytest.mark.parametrize("found", [None, there(version="0.0.9"), there(toolkit="theirs")])
def test_another_toolkit_is_replaced(make: Make, found: dict[str, Any] | None) -> None:
    transport, far = make(found)

    ensure(transport)

    assert far.files == ["/tmp/x/orchestrator-3.13.pyz"]
    (command,) = (command for command in far.said if "--prefix" in command)
    bundle = "/tmp/x/orchestrator-3.13.pyz"
    assert command == (
        f'install -D -m 644 {bundle} "${{ORCHESTRATOR_CACHE:-/var/cache/orchestrator}}/bundle.pyz" && '
        f"{ssh.PYTHON} {bundle} --prefix=/opt/orchestrator"
    )
    assert "rm -rf /tmp/x" in far.said
    assert " start " in far.said[-1]


def test_same_toolkit_is_not_installed_again(make: Make) -> None:
    transport, far = make(there())

    ensure(transport)

    assert not installed(far)


def test_toolkit_that_the_user_named_is_judged_by_its_version_only(make: Make) -> None:
    transport, far = make(there(toolkit=None), toolkit="/home/ann/bin/orchestrator")

    ensure(transport)

    assert transport.facts().problems == ()
    assert not installed(far)


def test_toolkit_that_the_user_named_is_never_replaced(make: Make) -> None:
    transport, far = make(there(version="0.0.9"), toolkit="/home/ann/bin/orchestrator")

    with pytest.raises(HostError, match="is of version") as caught:
        ensure(transport)

    assert "leave `toolkit:` away" in str(caught.value.hint)
    assert not installed(far)


def test_toolkit_that_the_user_named_is_installed_where_it_is_missing(make: Make) -> None:
    transport, far = make(None, toolkit="/home/ann/bin/orchestrator")

    ensure(transport)

    assert any("--prefix=/home/ann" in command for command in far.said)


def test_failed_installation_leaves_nothing_and_says_why(make: Make) -> None:
    transport, far = make(None)
    far.answers["install"] = (1, b"", b"/opt: Read-only file system\n")

    with pytest.raises(HostError, match="could not be installed") as caught:
        ensure(transport)

    assert caught.value.tail == ("/opt: Read-only file system",)
    assert far.said[-1] == "rm -rf /tmp/x"


@pytest.mark.parametrize("lacks", ["bindings", "python"])
def test_machine_that_is_no_lab_host_names_the_command_that_makes_it_one(make: Make, lacks: str) -> None:
    transport, far = make(there(bindings=False) if lacks == "bindings" else None)
    if lacks == "python":
        far.answers[ssh.PYTHON] = MISSING

    with pytest.raises(HostError) as caught:
        ensure(transport)

    assert "host provision far" in str(caught.value.hint)


def test_other_users_run_everything_by_sudo_without_a_password(make: Make) -> None:
    transport, far = make(there(), user="ann")

    ensure(transport)

    assert far.said[0] == "sudo -n true"
    assert all(command.startswith("sudo -n ") for command in far.said)
    assert far.said.count("sudo -n true") == 1


def test_refused_sudo_says_what_to_allow(make: Make) -> None:
    transport, far = make(there(), user="ann")
    far.answers["sudo"] = (1, b"", b"sudo: a password is required\n")

    with pytest.raises(HostError, match="ann cannot become root") as caught:
        transport.facts()

    assert caught.value.tail == ("sudo: a password is required",)
    assert "ann ALL=(ALL) NOPASSWD: ALL" in str(caught.value.hint)
