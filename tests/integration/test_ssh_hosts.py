"""Hosts of kind ssh: two machines, here namespaces with a real sshd each, with their own caches and files."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Machine, Sandbox
from tests.integration.computers import TOOLKIT, Reached, bridge, run

pytestmark = pytest.mark.privileged

BRIDGE = "orc-ssh"


ADDRESSES = {"one": "10.199.0.1", "two": "10.199.0.2"}


@dataclass
class Machines(Reached):
    """Two "machines" on one link, without a libvirtd.

    :ivar pids: of their sshds.
    """

    pids: dict[str, int] = field(default_factory=dict)
    libvirt = "embed"


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="orc-sshd-", dir="/var/tmp"))
    folder.chmod(0o755)
    made = Machines(folder, addresses=ADDRESSES)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", made.key)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        stack.enter_context(bridge(BRIDGE, "10.199.0.254/24"))
        for name in ADDRESSES:
            _remove(name)  # of a run that was killed
            stack.callback(_remove, name)
            _make(made, name)
        yield made


def _make(made: Machines, name: str) -> None:
    folder, address = made.folder, made.addresses[name]
    namespace, host_key = f"{BRIDGE}-{name}", made.folder / f"host_{name}"
    run("ip", "netns", "add", namespace)
    run("ip", "link", "add", "name", namespace, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    run("ip", "link", "set", namespace, "master", BRIDGE, "up")
    for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
        run("ip", "-n", namespace, *words)
    run("ip", "-n", namespace, "link", "set", "lo", "up")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host_key)
    with made.known_hosts.open("a") as known:
        known.write(f"{address} {host_key.with_suffix('.pub').read_text()}")
    (folder / f"{name}.conf").write_text(
        f"HostKey {host_key}\nAuthorizedKeysFile {made.key}.pub\nPidFile {folder}/{name}.pid\n"
        "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n"
        "Subsystem sftp internal-sftp\n"
        f"SetEnv ORCHESTRATOR_STATE={folder}/{name}/state ORCHESTRATOR_CACHE={folder}/{name}/cache "
        f"ORCHESTRATOR_RUN=/run/orcs-{name}\n"
    )
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    run("ip", "netns", "exec", namespace, sshd, "-f", folder / f"{name}.conf")
    made.pids[name] = int(_wait_for(folder / f"{name}.pid"))


def _remove(name: str) -> None:
    namespace = f"{BRIDGE}-{name}"
    pids = subprocess.run(["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True).stdout
    for pid in pids.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
    shutil.rmtree(f"/run/orcs-{name}", ignore_errors=True)


def _wait_for(file: Path) -> str:
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.05)
    return file.read_text()


def lab_of(machines: Machines, one: str | None = None, two: str | None = None) -> str:
    return f"""\
lab: far
hosts:
  one: {one or machines.host("one")}
  two: {two or machines.host("two")}
networks: {{lan: {{ipv4: 10.80.0.0/24, ipv6: "fd80::/64"}}}}
defaults: {{guest: {{memory: 192M, nics: [lan]}}}}
guests:
  ann: {{host: one}}
  eve: {{host: two}}
"""


def test_guests_on_two_ssh_hosts(machines: Machines, sandbox: Sandbox) -> None:
    before = Machine.look()
    file = sandbox.file(lab_of(machines))

    sandbox.run("up", "-f", file)
    again = sandbox.run("up", "-f", file)
    reached = sandbox.json("reach")
    mtu = sandbox.exec("ann", "cat", "/sys/class/net/eth0/mtu")
    subprocess.run(["pkill", "-KILL", "-f", "orchestrator.agent --lab=far .*--host=two "], check=True)
    by_ssh = sandbox.run("ssh", "eve", "hostname").stdout  # which starts it again
    log = sandbox.run("logs", "eve").stdout
    image = list((machines.folder / "two" / "cache" / "images").glob("tiny-*/manifest.json"))
    sandbox.run("down", "-f", file)

    assert "nothing to do" in again.stderr
    assert len(reached) == 4
    assert all(one["milliseconds"] is not None and one["across_hosts"] for one in reached)
    assert mtu == "1450\n"  # the underlay carries 1500
    assert by_ssh == "eve\n"
    assert "eve is up" in log
    assert image, "the image was not copied to the host"
    assert Machine.look().new_since(before) == {}
    assert not (machines.folder / "two" / "state").exists()
    assert not Path("/run/orcs-two").exists()


def test_unreachable_host_is_left_out_and_the_others_go_on(machines: Machines, sandbox: Sandbox) -> None:
    text = lab_of(machines, two=machines.host("two", port="2"))
    file = sandbox.file(text)

    failed = sandbox.run("up", "-f", file, status=4)
    states = {
        guest["name"]: guest["state"]
        for guest in json.loads(sandbox.run("status", "-o", "json", status=4).stdout)["guests"]
    }
    refused = sandbox.run("down", "-f", file, status=4)
    sandbox.run("down", "-f", file, "--forget")

    assert "error: host two: " in failed.stderr
    assert states == {"ann": "running", "eve": "unknown"}
    assert "two" in refused.stderr


def test_unknown_host_key_is_refused_with_the_way_out(machines: Machines, sandbox: Sandbox) -> None:
    empty = sandbox.file("", "known_hosts")
    file = sandbox.file(lab_of(machines, *(machines.host(n, known_hosts=str(empty)) for n in ("one", "two"))))

    failed = sandbox.run("plan", "-f", file, status=4)

    assert "is not known" in failed.stdout


def test_changed_host_key_is_refused(machines: Machines, sandbox: Sandbox) -> None:
    lines = machines.known_hosts.read_text().splitlines()
    keys = [line.split(" ", 1)[1] for line in lines]
    swapped = sandbox.file(f"10.199.0.1 {keys[1]}\n10.199.0.2 {keys[0]}\n", "known_hosts")
    file = sandbox.file(lab_of(machines, *(machines.host(n, known_hosts=str(swapped)) for n in ("one", "two"))))

    failed = sandbox.run("plan", "-f", file, status=4)

    assert "has changed" in failed.stdout


def test_wrong_user_key_says_so(machines: Machines, sandbox: Sandbox) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(sandbox.folder / "other")], check=True)
    wrong = str(sandbox.folder / "other")
    file = sandbox.file(lab_of(machines, *(machines.host(n, key=wrong) for n in ("one", "two"))))

    failed = sandbox.run("plan", "-f", file, status=4)

    assert "may not log in" in failed.stdout


def test_jump_host(machines: Machines, sandbox: Sandbox) -> None:
    # only `one` is asked directly; `two` is reached from there
    file = sandbox.file(lab_of(machines, two=machines.host("two", jump="root@10.199.0.1:22")))

    plan = sandbox.json("plan", "-f", file)

    assert plan["unreachable"] == {}
    assert "host two" in [operation["subject"] for operation in plan["operations"]]


def test_sshd_killed_under_a_running_lab_then_back(machines: Machines, sandbox: Sandbox) -> None:
    file = sandbox.file(lab_of(machines))
    sandbox.run("up", "-f", file)
    os.kill(machines.pids["two"], signal.SIGKILL)

    failed = sandbox.run("status", "-f", file, status=4)
    run("ip", "netns", "exec", "orc-ssh-two", "/usr/sbin/sshd", "-f", machines.folder / "two.conf")
    machines.pids["two"] = int(_wait_for(machines.folder / "two.pid"))
    healed = sandbox.run("up", "-f", file)
    sandbox.run("down", "-f", file)

    assert "unreachable" in failed.stdout
    assert "nothing to do" in healed.stderr


PORT = "52022"


@contextlib.contextmanager
def sshd_here(folder: Path) -> Iterator[str]:
    """An SSH server of this machine itself; the fields of an ssh host that reaches it."""
    for name in ("id", "host"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    (folder / "sshd.conf").write_text(
        f"ListenAddress 127.0.0.1:{PORT}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/id.pub\n"
        f"PidFile {folder}/sshd.pid\nPasswordAuthentication no\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin yes\nSubsystem sftp internal-sftp\n"
        f"SetEnv ORCHESTRATOR_STATE={folder}/far/state ORCHESTRATOR_CACHE={folder}/far/cache "
        f"ORCHESTRATOR_RUN=/run/orcs-here PATH={os.environ['PATH']}\n"
    )
    run(shutil.which("sshd") or "/usr/sbin/sshd", "-f", folder / "sshd.conf")
    pid = int(_wait_for(folder / "sshd.pid"))
    try:
        (folder / "known").write_text(f"[127.0.0.1]:{PORT} {(folder / 'host.pub').read_text()}")
        server = f"kind: ssh, address: 127.0.0.1, port: {PORT}, libvirt: embed"
        yield f"{server}, key: {folder}/id, known_hosts: {folder}/known"
    finally:
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree("/run/orcs-here", ignore_errors=True)


def test_toolkit_is_installed_where_it_is_missing(sandbox: Sandbox) -> None:
    folder = sandbox.folder
    with sshd_here(folder) as reached:
        file = sandbox.file(
            f"lab: install\nhosts: {{far: {{{reached}, toolkit: {folder}/toolkit/bin/orchestrator}}}}\n"
            "networks: {lan: {ipv4: 10.80.0.0/24}}\nguests: {ann: {host: far, memory: 192M, nics: [lan]}}\n"
        )
        before = set(Path("/tmp").glob("tmp.*"))
        sandbox.run("up", "-f", file)
        version = subprocess.run([folder / "toolkit/bin/orchestrator", "--version"], capture_output=True, text=True)
        again = sandbox.run("up", "-f", file)
        name = sandbox.exec("ann", "hostname")
        sandbox.run("down", "-f", file)

    assert version.returncode == 0, version.stderr
    assert "nothing to do" in again.stderr
    assert name == "ann\n"
    assert set(Path("/tmp").glob("tmp.*")) <= before


@pytest.fixture
def user() -> Iterator[str]:
    """An ordinary user of this machine, for one test."""
    name = "orc-test-user"
    rights = Path("/etc/sudoers.d") / name
    run("useradd", "--create-home", "--password", "*", "--shell", "/bin/sh", name)
    try:
        yield name
    finally:
        rights.unlink(missing_ok=True)
        subprocess.run(["userdel", "--remove", "--force", name], capture_output=True)


def may_sudo(user: str) -> None:
    rights = Path("/etc/sudoers.d") / user
    places = "ORCHESTRATOR_STATE ORCHESTRATOR_CACHE ORCHESTRATOR_RUN"
    rights.write_text(f'Defaults:{user} env_keep += "{places}"\n{user} ALL=(ALL) NOPASSWD: ALL\n')
    rights.chmod(0o440)


def test_user_who_may_sudo_brings_a_lab_up(sandbox: Sandbox, user: str) -> None:
    with sshd_here(sandbox.folder) as reached:
        file = sandbox.file(
            f"lab: sudo\nhosts: {{far: {{{reached}, user: {user}, toolkit: {TOOLKIT}}}}}\n"
            "networks: {lan: {ipv4: 10.80.0.0/24}}\nguests: {ann: {host: far, memory: 192M, nics: [lan]}}\n"
        )
        refused = sandbox.run("plan", "-f", file, status=4)
        may_sudo(user)
        sandbox.run("up", "-f", file)
        name = sandbox.exec("ann", "hostname")
        sandbox.run("down", "-f", file)

    assert f"{user} cannot become root there" in refused.stdout
    assert name == "ann\n"


def test_refused_sudo_comes_with_a_hint(sandbox: Sandbox, user: str) -> None:
    with sshd_here(sandbox.folder) as reached:
        file = sandbox.file(f"lab: sudo\nhosts: {{far: {{{reached}, user: {user}}}}}\nguests: {{}}\n")
        refused = sandbox.run("host", "provision", "far", "-f", file, status=4)

    assert "cannot become root there" in refused.stderr
    assert f"{user} ALL=(ALL) NOPASSWD: ALL" in refused.stderr
    assert "a password is required" in refused.stderr
