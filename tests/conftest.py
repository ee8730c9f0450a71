"""Fixtures for every tier. What a test makes is gone after it, also after a failure: see :class:`Sandbox`."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.guest_use")

# What a shell starts in the background ignores Ctrl-C, and so would every command that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ORCHESTRATOR = [sys.executable, "-m", "orchestrator"]
SECONDS = 240


@dataclass(frozen=True)
class Machine:
    """What can be seen of this machine that a lab might leave behind."""

    namespaces: frozenset[str]
    links: frozenset[str]
    mounts: frozenset[str]
    processes: frozenset[str]

    @classmethod
    def look(cls) -> Machine:
        netns = Path("/run/netns")
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return cls(
            namespaces=frozenset(path.name for path in netns.iterdir()) if netns.exists() else frozenset(),
            links=frozenset(path.name for path in Path("/sys/class/net").iterdir()),
            mounts=frozenset(line.split()[1] for line in mounts),
            processes=frozenset(_processes()),
        )

    def new_since(self, before: Machine) -> dict[str, list[str]]:
        found = {
            "namespaces": sorted(self.namespaces - before.namespaces),
            "links": sorted(self.links - before.links),
            "mounts": sorted(self.mounts - before.mounts),
            "processes": sorted(self.processes - before.processes),
        }
        return {kind: things for kind, things in found.items() if things}


def _processes() -> Iterator[str]:
    """Agents, and QEMUs of libvirt, that live (a zombie is left to whoever must reap it)."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        ours = "-m orchestrator.agent" in command or ("qemu-system" in command and "guest=" in command)
        if ours and state not in "ZX":
            yield f"{folder.name} {command[:200]}"


@dataclass
class Sandbox:
    """A state folder and a runtime folder of its own, and the command line in them.

    The folder is under /var/tmp and open to all, because QEMU runs as another user.
    """

    folder: Path
    env: dict[str, str]
    seconds: float = SECONDS
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def file(self, text: str, name: str = "lab.yaml") -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def start(self, *args: str | Path, **options: Any) -> subprocess.Popen[str]:
        """The command line in the background."""
        process = subprocess.Popen(
            [*ORCHESTRATOR, *map(str, args)],
            cwd=self.folder,
            env=self.env,
            text=True,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options),
        )
        self.running.append(process)
        return process

    def run(
        self, *args: str | Path, status: int | None = 0, feed: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The command line to its end; its exit status must be ``status`` (None: any)."""
        done = subprocess.run(
            [*ORCHESTRATOR, *map(str, args)],
            cwd=self.folder,
            env=self.env,
            text=True,
            input=feed,
            stdin=subprocess.DEVNULL if feed is None else None,
            capture_output=True,
            timeout=self.seconds,
            check=False,
        )
        if status is not None:
            assert done.returncode == status, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *args: str | Path) -> Any:
        return json.loads(self.run(*args, "-o", "json").stdout)

    def exec(self, guest: str, *argv: str, status: int | None = 0) -> str:
        return self.run("exec", guest, "--", *argv, status=status).stdout

    def guests(self) -> dict[str, dict[str, Any]]:
        return {guest["name"]: guest for guest in self.json("status")["guests"]}

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()
        for lab in (self.folder / "state" / "labs").glob("*/lab.json"):
            self.run("down", "--lab", lab.parent.name, "--forget", status=None)


@pytest.fixture(scope="session")
def make_sandbox() -> Callable[[], Sandbox]:
    def make() -> Sandbox:
        folder = Path(tempfile.mkdtemp(prefix="orc-test-", dir="/var/tmp"))
        folder.chmod(0o755)
        env = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
        if cache := os.environ.get("ORCHESTRATOR_CACHE"):
            env["ORCHESTRATOR_CACHE"] = cache
        env |= {
            "ORCHESTRATOR_STATE": str(folder / "state"),
            "ORCHESTRATOR_RUN": f"/run/{folder.name.removeprefix('orc-')}",
            "NO_COLOR": "1",
        }
        return Sandbox(folder, env)

    return make


def _closing(made: Sandbox, before: Machine) -> None:
    try:
        made.close()
        left = Machine.look().new_since(before)
        runtime = Path(made.env["ORCHESTRATOR_RUN"])
        assert not left, f"left behind: {left}"
        assert not runtime.exists(), f"left behind: {list(runtime.rglob('*'))}"
    finally:
        shutil.rmtree(made.folder, ignore_errors=True)
        shutil.rmtree(made.env["ORCHESTRATOR_RUN"], ignore_errors=True)


@pytest.fixture
def sandbox(make_sandbox: Callable[[], Sandbox]) -> Iterator[Sandbox]:
    """A sandbox for one test, which must leave nothing behind."""
    before = Machine.look()
    made = make_sandbox()
    yield made
    _closing(made, before)


@pytest.fixture(scope="module")
def shared_sandbox(make_sandbox: Callable[[], Sandbox]) -> Iterator[Sandbox]:
    """A sandbox for the tests of one module."""
    before = Machine.look()
    made = make_sandbox()
    yield made
    _closing(made, before)
