"""Machines that were not made for labs become lab hosts. They are guests of the image `debian`, with systemd and
their own kernel and KVM, and have neither QEMU nor libvirt nor anything of ours. Packages reach them through a proxy
that fetches with this machine's own settings.

The tests come in order, each where the one before left off, because installing QEMU under emulation takes minutes.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import http.server
import json
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.hosts.install import LOCK, SOURCES
from tests.conftest import Machine, Sandbox

pytestmark = [pytest.mark.privileged, pytest.mark.timeout(2400)]

SECONDS = 1800
CHECKOUT = Path(__file__).parents[2]
SCOPES = "systemctl list-units --plain --no-legend 'orchestrator-agent-*.scope'"
TRACES = "find /etc /opt /var/lib /var/cache /usr -name '*orchestrator*' | sort"
LET_ANN_IN = """\
set -e
useradd --create-home ann
install -d -o ann -m 700 /home/ann/.ssh
install -o ann -m 600 /root/.ssh/authorized_keys /home/ann/.ssh
echo 'ann ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ann
"""
PROXY = "10.211.10.1"
USERS = {"bare": "ann", "poor": "root"}
"""``ann`` becomes root by sudo."""
ADDRESSES = {"bare": "10.211.9.10", "poor": "10.211.9.11"}
LAB = f"""\
lab: metal
hosts: {{here: {{kind: local}}}}
networks: {{lan: {{ipv4: 10.211.9.0/24, uplink: true}}}}
defaults: {{guest: {{host: here, image: debian}}}}
guests:
  bare: {{memory: 1536M, vcpus: 2, nics: [{{network: lan, ipv4: {ADDRESSES["bare"]}}}]}}
  poor: {{memory: 384M, nics: [{{network: lan, ipv4: {ADDRESSES["poor"]}}}]}}
"""


class Fetch(http.server.BaseHTTPRequestHandler):
    """A proxy for apt: it fetches what is asked for, as this machine does."""

    protocol_version = "HTTP/1.1"
    KEPT = ("if-modified-since", "range", "if-range")

    def do_GET(self) -> None:
        asked = {name: value for name, value in self.headers.items() if name.lower() in self.KEPT}
        try:
            answer = urllib.request.urlopen(urllib.request.Request(self.path, headers=asked), timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
        self.send_response(answer.status)
        for name in ("Last-Modified", "Content-Type", "Content-Range"):
            if value := answer.headers.get(name):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def proxy() -> Iterator[str]:
    """Where the machines find a proxy: an address that only this machine has."""
    subprocess.run(["ip", "addr", "add", f"{PROXY}/32", "dev", "lo"], check=True)
    try:
        with http.server.ThreadingHTTPServer((PROXY, 0), Fetch) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://{PROXY}:{server.server_port}"
            server.shutdown()
            thread.join()
    finally:
        subprocess.run(["ip", "addr", "del", f"{PROXY}/32", "dev", "lo"], check=True)


class Far:
    """The machines, and the command line of a checkout of its own, which may be changed."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.checkout = sandbox.folder / "checkout"
        for name in SOURCES:
            shutil.copytree(CHECKOUT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE", LOCK):
            shutil.copy(CHECKOUT / name, self.checkout)
        sandbox.env["PYTHONPATH"] = str(self.checkout)
        self.traces = ""  # of us on the machine, before anything was done there

    def run(self, *args: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """A command that may take long."""
        process = self.sandbox.start(*args)
        out, err = process.communicate(timeout=SECONDS)
        if status is not None:
            assert process.returncode == status, f"{args}: {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def provision(self, *args: str, status: int = 0) -> dict[str, dict[str, Any]]:
        done = self.run("host", "provision", *args, "-f", "far.yaml", "-o", "json", status=status)
        return {result["host"]: result for result in json.loads(done.stdout)}

    def ssh(self, name: str, command: str, status: int | None = 0) -> str:
        folder = self.sandbox.folder
        options = [
            "-F",
            "none",
            "-i",
            folder / "state/labs/metal/ssh_key",
            "-o",
            f"UserKnownHostsFile={folder}/known",
        ]
        words = ["ssh", *options, "-o", "ConnectTimeout=20", f"root@{ADDRESSES[name]}", command]
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
        if status is not None:
            assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait_for(self, name: str, command: str, wanted: Callable[[str], bool]) -> None:
        """Until the machine answers to SSH, and ``wanted`` is true of what ``command`` prints there."""
        deadline = time.monotonic() + 600
        while not wanted(answer := self.ssh(name, command, status=None)):
            assert time.monotonic() < deadline, f"{name}: {command}: {answer}"
            time.sleep(1)

    def use_proxy(self, name: str, proxy: str) -> None:
        settings = f'Acquire::http::Proxy "{proxy}";\\nAcquire::Retries "0";\\n'
        self.ssh(name, f"printf '{settings}' > /etc/apt/apt.conf.d/90proxy")
        self.ssh(name, "echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/io")


@pytest.fixture(scope="module")
def far(make_sandbox: Callable[[], Sandbox], proxy: str) -> Iterator[Far]:
    before = Machine.look()
    sandbox = make_sandbox()
    try:
        made = Far(sandbox)
        made.run("up", "-f", sandbox.file(LAB, "metal.yaml"))
        public = "/etc/ssh/ssh_host_ed25519_key.pub"
        keys = {address: sandbox.exec(name, "cat", public) for name, address in ADDRESSES.items()}
        known = sandbox.file("".join(f"{address} {key}" for address, key in keys.items()), "known")
        hosts = "".join(
            f"  {name}: {{kind: ssh, address: {address}, user: {USERS[name]}, "
            f"key: {sandbox.folder}/state/labs/metal/ssh_key, known_hosts: {known}}}\n"
            for name, address in ADDRESSES.items()
        )
        sandbox.file(
            f"lab: far\nhosts:\n{hosts}networks: {{lan: {{ipv4: 10.80.0.0/24}}}}\n"
            "guests: {ann: {host: bare, memory: 192M, nics: [lan]}}\n",
            "far.yaml",
        )
        for name in ADDRESSES:  # to the end: cloud-init starts their SSH servers anew
            made.wait_for(name, "systemctl is-system-running --wait", lambda answer: answer.strip() != "")
        made.ssh("bare", LET_ANN_IN)
        made.traces = made.ssh("bare", TRACES)
        made.use_proxy("bare", proxy)
        made.use_proxy("poor", f"http://{PROXY}:9")  # nobody is there
        yield made
    finally:
        try:
            sandbox.close()
            assert not Machine.look().new_since(before).get("namespaces")
        finally:
            shutil.rmtree(sandbox.folder, ignore_errors=True)
            shutil.rmtree(sandbox.env["ORCHESTRATOR_RUN"], ignore_errors=True)


def test_dry_run_on_bare_machine_tells_and_changes_nothing(far: Far) -> None:
    look = "dpkg-query --show | sha256sum; find /etc /opt /var/lib /var/cache -newer /tmp/now -type f | sort"
    far.ssh("bare", "touch /tmp/now; sleep 1")
    before = far.ssh("bare", look)

    result = far.provision("bare", "--check")["bare"]

    assert far.ssh("bare", look) == before
    assert result["error"] is None
    assert any("qemu-system-x86" in change for change in result["changes"])
    assert {"Copy the bundle", "Write the unit"} <= set(result["changes"])


def test_one_of_two_fails_and_the_other_becomes_a_lab_host(far: Far) -> None:
    results = far.provision("bare", "poor", status=4)

    assert results["bare"]["error"] is None
    assert results["bare"]["changed"] >= 10
    error = results["poor"]["error"]
    assert error["message"].startswith("host poor: Install the packages: ")
    assert "package sources" in error["hint"]
    assert far.ssh("bare", "virsh --readonly list --all; /opt/orchestrator/bin/orchestrator --version")


def test_interrupted_run_leaves_nothing_behind(far: Far) -> None:
    process = far.sandbox.start("host", "provision", "bare", "-f", "far.yaml")
    playbook = str(far.checkout / "ansible/provision.yml")

    def processes() -> list[str]:
        found = subprocess.run(["pgrep", "-f", playbook], capture_output=True, text=True).stdout.split()
        return [pid for pid in found if not _is_zombie(pid)]

    deadline = time.monotonic() + 120
    while not processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)

    assert process.returncode == 130
    assert "run the command again" in err
    assert processes() == []


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_second_run_changes_nothing(far: Far) -> None:
    result = far.provision("bare")["bare"]

    assert (result["error"], result["changes"]) == (None, [])
    assert result["ok"] > 10


def test_dry_run_on_lab_host_finds_nothing_and_on_the_failed_one_the_rest(far: Far, proxy: str) -> None:
    far.use_proxy("poor", proxy)

    results = far.provision("bare", "poor", "--check")

    assert results["bare"]["changes"] == []
    assert results["poor"]["error"] is None
    assert any("python3-apt" in change for change in results["poor"]["changes"])


def test_lab_comes_up_on_it(far: Far) -> None:
    lab = far.sandbox.folder / "far.yaml"
    lab.write_text("\n".join(line for line in lab.read_text().splitlines() if not line.startswith("  poor:")))

    far.run("up", "-f", lab)
    again = far.run("up", "-f", lab)

    assert "nothing to do" in again.stderr
    assert far.run("exec", "--lab", "far", "ann", "hostname").stdout == "ann\n"
    assert "far.ann" in far.ssh("bare", "virsh list --name")
    assert "orchestrator-agent-far-bare-" in far.ssh("bare", SCOPES)


def test_changed_toolkit_replaces_the_agent_and_the_guest_goes_on(far: Far) -> None:
    boot = far.run("exec", "--lab", "far", "ann", "cat", "/proc/sys/kernel/random/boot_id").stdout
    scope = far.ssh("bare", "ls -d /sys/fs/cgroup/system.slice/orchestrator-agent-*")
    with open(far.checkout / "orchestrator/names.py", "a") as file:
        file.write("# changed\n")

    plan = far.run("plan", "-f", "far.yaml").stdout
    far.run("up", "-f", "far.yaml")

    assert "toolkit:" in plan
    assert far.run("exec", "--lab", "far", "ann", "cat", "/proc/sys/kernel/random/boot_id").stdout == boot
    assert far.ssh("bare", "ls -d /sys/fs/cgroup/system.slice/orchestrator-agent-*") != scope
    assert "is as its file says" in far.run("plan", "-f", "far.yaml").stderr


def test_agent_is_back_after_the_machine_was_started_anew(far: Far) -> None:
    booted = "cat /proc/sys/kernel/random/boot_id"
    before = far.ssh("bare", booted)
    far.ssh("bare", "systemctl reboot", status=None)
    far.wait_for("bare", booted, lambda answer: answer not in ("", before))
    far.ssh("bare", "systemctl is-system-running --wait", status=None)

    assert "active" in far.ssh("bare", "systemctl is-active orchestrator-agents.service")
    assert "orchestrator-agent-far-bare-" in far.ssh("bare", SCOPES)
    settings = far.ssh("bare", "sysctl -n net.bridge.bridge-nf-call-iptables vm.unprivileged_userfaultfd")
    assert settings.split() == ["0", "1"]
    plan = json.loads(far.run("plan", "-f", "far.yaml", "-o", "json").stdout)
    assert "guest ann" in {operation["subject"] for operation in plan["operations"]}
    assert "host bare" not in {operation["subject"] for operation in plan["operations"]}


def test_down_leaves_the_lab_host_as_provisioning_made_it(far: Far) -> None:
    far.run("down", "-f", "far.yaml")

    left = far.ssh("bare", "virsh list --all --name; ls /var/lib/orchestrator /run/orc 2>/dev/null", status=None)
    assert left.strip() == ""
    assert far.ssh("bare", SCOPES) == ""


def test_what_provisioning_made_can_be_taken_back_as_the_page_says(far: Far) -> None:
    """Only its own files: the packages stay."""
    page = (CHECKOUT / "docs/your-own-machines.md").read_text()
    commands = page.partition("## Taking it back")[2].partition("```sh\n")[2].partition("```")[0]

    far.ssh("bare", f"set -e\n{commands}")

    assert far.ssh("bare", TRACES) == far.traces
    assert far.ssh("bare", "systemctl is-enabled libvirt-guests.service").strip() == "enabled"
