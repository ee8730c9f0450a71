"""Turning machines into lab hosts: the roles in ``ansible/``, run from here on machines that SSH reaches.

Each machine is asked first what it is, which also says in plain words who cannot be reached or may not become root.
Then Ansible works on all of them at once; one that fails does not hold up the others, and a second run goes on where
the first one ended. What Ansible does is told by a callback plugin, ``ansible/callback_plugins``, line by line.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import paths
from orchestrator.errors import CancelledError, CommandError, HostError
from orchestrator.hosts.install import bundle
from orchestrator.hosts.model import SshHost
from orchestrator.hosts.ssh import NO_PASSWORD, PYTHON, Connection, known_hosts_of, parse_jump
from orchestrator.patience import scaled
from orchestrator.run import TAIL_LINES, Args, follow, run, tail_of

Tell = Callable[[str, str], None]
"""Is told the name of a host, and what happens there; called from many threads."""

SECONDS = 3600
PLAYBOOK = "provision.yml"
MISSING = "Ansible is not installed beside the toolkit"
NO_PYTHON = "Python would be installed; what else there is to do can be told only then"

#: What a machine without Python will have, by its distribution.
PYTHONS = {"debian 12": "3.11", "debian 13": "3.13", "ubuntu 24.04": "3.12"}

_ASK = f"""\
. /etc/os-release
uname -m
echo "$ID $VERSION_ID"
{PYTHON} -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none
"""

_HINTS = (
    (r"sudo: a password is required|Missing sudo password", NO_PASSWORD),
    (
        r"No package matching|Unable to locate|Failed to fetch|Failed to update apt cache|resolv",
        "the machine's own package sources must work: apt-get update there",
    ),
    (r"[Cc]ould not get lock|Failed to lock", "something else installs packages there: run the command again later"),
    (r"No space left", "make room there and run the command again"),
)
_AGAIN = "what was done is kept: mend the cause and run the command again"


@dataclass
class Result:
    """What became of one machine.

    :ivar changes: the tasks that changed something, or would have.
    :ivar ok: how many tasks found all as it should be.
    :ivar error: why it is no lab host.
    """

    host: str
    ok: int = 0
    changes: list[str] = field(default_factory=list)
    error: HostError | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "host": self.host,
            "ok": self.ok,
            "changed": len(self.changes),
            "changes": self.changes,
            "error": self.error.to_wire() if self.error else None,
        }


def provision(
    targets: Mapping[str, SshHost],
    *,
    check: bool = False,
    progress: Tell,
    cancel: threading.Event | None = None,
) -> dict[str, Result]:
    """Make lab hosts of the machines ``targets``; does nothing on those that are. What goes wrong on one of them is
    in its result, and does not keep the others from becoming lab hosts.

    :param check: change nothing, tell what would be.
    :raise HostError: there is no Ansible, no bundle can be made, or Ansible itself fails.
    :raise CancelledError: ``cancel`` was set.
    """
    program = _program()
    results = {name: Result(name) for name in targets}
    hosts: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(max(1, len(targets)), "ask") as pool:
        asked = {name: pool.submit(_ask, name, spec, progress) for name, spec in targets.items()}
    for name, spec in targets.items():
        try:
            python, installed = asked[name].result()
        except HostError as error:
            results[name].error = error
            continue
        if check and not installed:
            results[name].changes.append(NO_PYTHON)
            continue
        made = bundle(python, lambda text, name=name: progress(name, text))  # type: ignore[misc]
        hosts[name] = {**_reach(spec), "toolkit_bundle": str(made)}
        if cancel is not None and cancel.is_set():
            raise _given_up()
    if hosts:
        _play(program, hosts, Listener(results, targets, progress), check, cancel)
    return results


def _program() -> Path:
    """:raise HostError: there is no Ansible in the Python environment that we run in."""
    program = Path(sys.executable).with_name("ansible-playbook")
    if not program.exists():
        raise HostError(MISSING, hint=f"{sys.executable} -m pip install 'ansible-core>=2.19'")
    return program


def _given_up() -> CancelledError:
    return CancelledError(
        "stopped; what was done on the hosts is kept", hint="run the command again: it goes on where it was"
    )


def _ask(name: str, spec: SshHost, progress: Tell) -> tuple[str, bool]:
    """The version of Python that a machine has or will have, and whether it has it.

    :raise HostError: it does not answer, we cannot become root there, or it cannot be a lab host.
    """
    progress(name, "connecting")
    connection = Connection(name, spec)
    with contextlib.closing(connection):
        status, stdout, stderr = connection.run(connection.as_root(_ASK))
    lines = stdout.decode(errors="replace").split("\n")
    if status or len(lines) < 3:
        raise HostError(f"host {name}: it cannot be told what it runs", tail=tail_of(stderr or stdout))
    machine, system, python = lines[:3]
    if machine != "x86_64":
        raise HostError(f"host {name}: lab hosts are x86_64, and this is {machine}")
    if python != "none":
        return python, True
    if system not in PYTHONS:
        raise HostError(
            f"host {name} runs {system or 'an unknown system'}, and has no {PYTHON}",
            hint="lab hosts run Debian 12 or 13, or Ubuntu 24.04",
        )
    return PYTHONS[system], False


# -- what Ansible gets -----------------------------------------------------------------------------------------------


def _reach(spec: SshHost) -> dict[str, Any]:
    """A machine as Ansible's inventory has it. What counts is the lab file, as for our own connections, and not the
    user's configuration of ssh; host keys are always checked."""
    found: dict[str, Any] = {
        "ansible_host": spec.address,
        "ansible_port": spec.port,
        "ansible_user": spec.user,
        "ansible_ssh_common_args": shlex.join(_options(spec)),
    }
    if spec.key:
        found["ansible_ssh_private_key_file"] = str(spec.key.expanduser())
    return found


def _options(spec: SshHost) -> list[str]:
    options = ["-F", "none", "-o", f"UserKnownHostsFile={known_hosts_of(spec)}", "-o", "StrictHostKeyChecking=yes"]
    options += ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=15"]
    if spec.jump:
        user, host, port = parse_jump(spec.jump)
        key = ["-i", str(spec.key.expanduser())] if spec.key else []
        login = f"{user}@{host}" if user else host
        # ssh's own -J would take neither the key nor the known hosts
        way = ["ssh", *options, *key, "-p", str(port), "-W", "%h:%p", login]
        options += ["-o", f"ProxyCommand={shlex.join(way)}"]
    return options


def _environment(folder: Path) -> dict[str, str]:
    return {
        "ANSIBLE_CONFIG": str(paths.ansible() / "ansible.cfg"),
        "ANSIBLE_STDOUT_CALLBACK": "orchestrator_lines",
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "ANSIBLE_HOME": str(folder / "home"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "cp"),
        "ANSIBLE_NOCOLOR": "True",
        "LC_ALL": "C.UTF-8",  # Ansible refuses to run without UTF-8
    }


def _play(
    program: Path,
    hosts: dict[str, dict[str, Any]],
    listener: Listener,
    check: bool,
    cancel: threading.Event | None,
) -> None:
    """:raise HostError: Ansible itself fails."""
    with tempfile.TemporaryDirectory(prefix="orc-ansible-") as temporary:
        folder = Path(temporary)
        inventory = folder / "hosts.json"
        inventory.write_text(json.dumps({"lab_hosts": {"hosts": hosts}}))
        # The user's own settings of Ansible are for the user's own playbooks.
        foreign: Args = [word for name in os.environ if name.startswith("ANSIBLE_") for word in ("-u", name)]
        environment = [f"{name}={value}" for name, value in _environment(folder).items()]
        command: Args = [program, "-i", inventory, "--forks", str(len(hosts)), *(["--check"] if check else [])]
        try:
            follow(
                ["env", *foreign, *environment, *command, paths.ansible() / PLAYBOOK],
                listener.hear,
                timeout=scaled(SECONDS),
                cancel=cancel,
            )
        except CancelledError as error:
            raise _given_up() from error
        except CommandError as error:
            if not listener.done:  # else it is the hosts that failed, each with its reason
                raise HostError(
                    f"Ansible failed: {error.message}",
                    command=error.command,
                    tail=listener.other or error.tail,
                    hint=_AGAIN,
                ) from error
        finally:
            _close_connections(folder / "cp")
        if not listener.done:
            raise HostError("Ansible ended before it had done with every host", tail=listener.other, hint=_AGAIN)


def _close_connections(folder: Path) -> None:
    """End the ssh processes that Ansible leaves, so that the next task need not log in again."""
    for control in folder.glob("*"):
        with contextlib.suppress(CommandError):
            run(["ssh", "-F", "none", "-o", f"ControlPath={control}", "-O", "exit", "-"], check=False, timeout=20)


# -- what Ansible says -----------------------------------------------------------------------------------------------


class Listener:
    """Makes results and progress of the lines of the callback plugin.

    :ivar done: Ansible has done with every host, in one way or the other.
    :ivar other: the last lines that were not the plugin's.
    """

    def __init__(self, results: Mapping[str, Result], hosts: Mapping[str, SshHost], progress: Tell) -> None:
        self._results = results
        self._hosts = hosts
        self._progress = progress
        self.done = False
        self.other: list[str] = []

    def hear(self, line: str) -> None:
        try:
            event = json.loads(line)
            if event["event"] == "done":
                self.done = True
                return
            result, task = self._results[event["host"]], str(event["task"]).rpartition(" : ")[2]
            if event["event"] == "begin":
                self._progress(result.host, task)
            elif event["status"] == "ok":
                result.ok += 1
            elif event["status"] == "changed":
                said = event["result"].get("msg")
                result.changes.append(f"{task}: {', '.join(said)}" if isinstance(said, list) else task)
            elif event["status"] in ("failed", "unreachable") and result.error is None:
                result.error = _failure(result.host, task, event["result"], self._hosts[result.host])
        except (ValueError, TypeError, KeyError, AttributeError):
            self.other = [*self.other, line][-TAIL_LINES:]


def _failure(host: str, task: str, result: Mapping[str, Any], spec: SshHost) -> HostError:
    said = [
        str(result[key]) for key in ("msg", "module_stderr", "stderr", "module_stdout", "stdout") if key in result
    ]
    lines = [line.rstrip() for text in said for line in text.splitlines() if line.strip()]
    command = result.get("cmd")
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, "\n".join(lines))), _AGAIN)
    return HostError(
        f"host {host}: {task}: {lines[0] if lines else 'failed without a word'}",
        hint=hint.format(user=spec.user),
        command=shlex.join(map(str, command)) if isinstance(command, list) else command,
        tail=lines[1:][-TAIL_LINES:],
    )
