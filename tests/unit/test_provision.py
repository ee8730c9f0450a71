"""Provisioning: what Ansible is given, and what is made of what it says. Ansible is a script, or works on this
machine with a playbook that changes nothing."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import paths
from orchestrator.errors import CancelledError, HostError
from orchestrator.hosts import provision as module
from orchestrator.hosts.model import SshHost
from orchestrator.hosts.provision import Listener, Result, provision

ANSIBLE = Path(__file__).parents[2] / "ansible"


def host(**fields: Any) -> SshHost:
    return SshHost(**({"kind": "ssh", "address": "192.0.2.1", "known_hosts": "/k/known"} | fields))


def event(host: str, task: str, status: str | None = None, **result: Any) -> str:
    kind = {"event": "end", "status": status, "result": result} if status else {"event": "begin"}
    return json.dumps({"host": host, "task": task, **kind})


class Heard:
    """A listener for hosts ``a`` and ``b``, and what it made of what it heard."""

    def __init__(self, *lines: str) -> None:
        self.results = {name: Result(name) for name in ("a", "b")}
        self.told: list[tuple[str, str]] = []
        hosts = {name: host(user="ann") for name in self.results}
        self.listener = Listener(self.results, hosts, lambda name, text: self.told.append((name, text)))
        for line in lines:
            self.listener.hear(line)

    def error(self, name: str = "a") -> HostError:
        error = self.results[name].error
        assert error is not None
        return error


# -- what Ansible says -----------------------------------------------------------------------------------------------


def test_tasks_are_counted_by_host_and_named_without_their_role() -> None:
    heard = Heard(
        event("a", "base : Install"),
        event("a", "base : Install", "changed"),
        event("b", "base : Install", "ok"),
        event("b", "kernel : Load", "skipped"),
        '{"event": "done"}',
    )

    assert heard.told == [("a", "Install")]
    assert heard.results["a"].changes == ["Install"]
    assert (heard.results["b"].ok, heard.results["b"].changes) == (1, [])
    assert heard.listener.done


def test_dry_run_says_what_a_task_would_change() -> None:
    heard = Heard(event("a", "packages : Install", "changed", msg=["qemu", "libvirt"]))

    assert heard.results["a"].changes == ["Install: qemu, libvirt"]


def test_failure_names_task_and_reason_and_leaves_the_other_host_alone() -> None:
    said = {"msg": "non-zero return code", "stderr": "modprobe: no\nsuch", "cmd": ["modprobe", "x y"]}
    heard = Heard(event("a", "x : Load", "failed", **said))

    assert heard.error().message == "host a: Load: non-zero return code"
    assert heard.error().tail == ("modprobe: no", "such")
    assert heard.error().command == "modprobe 'x y'"
    assert heard.results["b"].error is None


def test_first_failure_counts() -> None:
    heard = Heard(event("a", "One", "failed", msg="1"), event("a", "Two", "failed", msg="2"))

    assert "One" in heard.error().message


def test_failure_that_was_expected_is_none() -> None:
    assert Heard(event("a", "Try", "ignored", msg="no")).results["a"].error is None


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("E: Unable to locate package qemu", "package sources"),
        ("Temporary failure resolving 'x'", "package sources"),
        ("Could not get lock /var/lib/dpkg/lock-frontend", "later"),
        ("sudo: a password is required", "ann ALL=(ALL) NOPASSWD"),
        ("write error: No space left on device", "make room"),
        ("anything else", "run the command again"),
    ],
)
def test_failure_comes_with_a_hint(said: str, hint: str) -> None:
    error = Heard(event("a", "Do", "failed", msg="it failed", stderr=said)).error()

    assert hint in str(error.hint)


@pytest.mark.parametrize("line", ["", "[WARNING]: hm", "[]", "null", "3", '{"event": "end"}', event("c", "x", "ok")])
def test_lines_that_are_not_the_plugins_are_kept_for_the_error(line: str) -> None:
    heard = Heard(line)

    assert heard.listener.other == [line]


# -- what Ansible gets -----------------------------------------------------------------------------------------------


def test_host_keys_are_always_checked() -> None:
    options = module._options(host())

    assert "StrictHostKeyChecking=yes" in options
    assert "UserKnownHostsFile=/k/known" in options
    assert module._environment(Path("/x"))["ANSIBLE_HOST_KEY_CHECKING"] == "True"


def test_jump_host_is_reached_with_the_same_key_and_known_hosts() -> None:
    options = module._options(host(jump="eve@hop:2222", key="/k/my key"))

    way = shlex.split(next(word for word in options if word.startswith("ProxyCommand=")).partition("=")[2])
    assert way[0] == "ssh"
    assert way[-5:] == ["-p", "2222", "-W", "%h:%p", "eve@hop"]
    assert {"UserKnownHostsFile=/k/known", "StrictHostKeyChecking=yes", "/k/my key"} <= set(way)


def test_inventory_says_what_the_lab_file_says() -> None:
    found = module._reach(host(port=2022, user="ann", key="/k/id"))

    assert found["ansible_host"] == "192.0.2.1"
    assert found["ansible_port"] == 2022
    assert found["ansible_user"] == "ann"
    assert found["ansible_ssh_private_key_file"] == "/k/id"


# -- running it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, places: Path) -> dict[str, SshHost]:
    """Hosts ``a`` and ``b``, which are asked nothing and need no bundle."""
    monkeypatch.setattr(module, "_ask", lambda name, spec, progress: ("3.11", True))
    monkeypatch.setattr(module, "bundle", lambda python, progress: Path("/bundle.pyz"))
    return {"a": host(), "b": host()}


def ansible(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put a shell script in the place of Ansible."""
    program = folder / "ansible-playbook"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "_program", lambda: program)


def say(*lines: str) -> str:
    return "\n".join(f"echo {shlex.quote(line)}" for line in lines)


def go(machines: dict[str, SshHost], **options: Any) -> dict[str, Result]:
    return provision(machines, progress=lambda name, text: None, **options)


def test_one_of_two_fails_and_the_other_is_ready(
    machines: dict[str, SshHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = (event("a", "Load", "failed", msg="no"), event("b", "Load", "changed"), '{"event": "done"}')
    ansible(monkeypatch, tmp_path, say(*lines) + "\nexit 2")

    results = go(machines)

    assert results["a"].error is not None
    assert results["b"].error is None
    assert results["b"].changes == ["Load"]


def test_trouble_of_ansible_itself_is_an_error_with_what_it_said(
    machines: dict[str, SshHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ansible(monkeypatch, tmp_path, "echo '[ERROR]: syntax' >&2\nexit 4")

    with pytest.raises(HostError, match="exit status 4") as caught:
        go(machines)

    assert caught.value.tail == ("[ERROR]: syntax",)


def test_ansible_that_ends_without_a_word_is_an_error(
    machines: dict[str, SshHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ansible(monkeypatch, tmp_path, "exit 0")

    with pytest.raises(HostError, match="ended before"):
        go(machines)


def test_missing_ansible_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))

    with pytest.raises(HostError, match="not installed") as caught:
        go({"a": host()})

    assert "ansible-core" in str(caught.value.hint)


def test_settings_of_the_users_own_ansible_do_not_count(
    machines: dict[str, SshHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "")
    monkeypatch.setenv("ANSIBLE_HOST_KEY_CHECKING", "False")
    ansible(monkeypatch, tmp_path, f'env > {tmp_path}/env; cp "$2" {tmp_path}/inventory\n' + say('{"event": "done"}'))

    go(machines, check=True)

    seen = (tmp_path / "env").read_text().splitlines()
    assert "ANSIBLE_HOST_KEY_CHECKING=True" in seen
    assert not [line for line in seen if line.startswith("ANSIBLE_CALLBACKS_ENABLED")]
    inventory = json.loads((tmp_path / "inventory").read_text())
    assert inventory["lab_hosts"]["hosts"]["a"]["toolkit_bundle"] == "/bundle.pyz"


def test_stopping_ends_ansible_and_its_children(
    machines: dict[str, SshHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ansible(monkeypatch, tmp_path, f"sleep 97 & echo $! > {tmp_path}/pid; wait")
    cancel = threading.Event()

    def press() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        cancel.set()

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(CancelledError) as caught:
        go(machines, cancel=cancel)
    thread.join()

    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    assert "again" in str(caught.value.hint)


def test_host_that_does_not_answer_is_left_out(
    machines: dict[str, SshHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ask(name: str, spec: SshHost, progress: object) -> tuple[str, bool]:
        if name == "a":
            raise HostError("host a: does not answer")
        return "3.11", True

    monkeypatch.setattr(module, "_ask", ask)
    ansible(monkeypatch, tmp_path, say(event("b", "Load", "ok"), '{"event": "done"}'))

    results = go(machines)

    assert "does not answer" in str(results["a"].error)
    assert results["b"].ok == 1


def test_check_of_a_machine_without_python_does_without_ansible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_ask", lambda name, spec, progress: ("3.11", False))
    ansible(monkeypatch, tmp_path, "exit 1")

    results = go({"a": host()}, check=True)

    assert results["a"].changes == [module.NO_PYTHON]


# -- the plugin, under Ansible itself --------------------------------------------------------------------------------

PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - {name: Change, ansible.builtin.command: "true", changed_when: true}
    - name: Fail on one, for one of two
      ansible.builtin.command: sh -c 'echo because of {{ item }} >&2; exit {{ item }}'
      loop: [0, 3]
      changed_when: false
      when: inventory_hostname == 'a'
    - {name: Go on, ansible.builtin.command: "true", changed_when: false}
"""


def test_callback_plugin_tells_what_a_playbook_does(tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    command = [
        module._program(),
        "-i",
        "a,b,",
        "-c",
        "local",
        "-e",
        "ansible_python_interpreter=auto_silent",
        playbook,
    ]
    environment = {**module._environment(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    heard = Heard(*done.stdout.splitlines())

    assert done.returncode == 2, done.stderr
    assert heard.listener.other == []
    assert heard.listener.done
    assert heard.results["a"].changes == heard.results["b"].changes == ["Change"]
    assert "Fail on one, for one of two" in heard.error().message
    assert "because of 3" in heard.error().tail
    assert heard.results["b"].error is None
    assert heard.results["b"].ok == 1


# -- the roles -------------------------------------------------------------------------------------------------------


def test_every_default_of_a_role_is_described_and_has_the_same_value() -> None:
    for file in ANSIBLE.glob("roles/*/defaults/main.yml"):
        defaults = yaml.safe_load(file.read_text()) or {}
        options = yaml.safe_load((file.parents[1] / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
        described = {name: option["default"] for name, option in options["options"].items() if "default" in option}
        assert described == defaults, file


def test_playbook_is_found_from_the_checkout() -> None:
    assert (paths.ansible() / module.PLAYBOOK).exists()
