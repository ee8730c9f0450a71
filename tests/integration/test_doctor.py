"""Doctor on the real machine: probes that do what they say, and left-overs that are really made and removed."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import names
from orchestrator.doctor import checkup
from orchestrator.hosts.accel import DEFAULT_EMULATOR

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

FOREIGN = secrets.token_hex(4)
DOCTOR = [sys.executable, "-W", "error", "-m", "orchestrator.doctor"]
NO_CAPABILITIES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("STATE", "CACHE", "RUN"):
        monkeypatch.setenv(f"ORCHESTRATOR_{variable}", str(tmp_path / variable.lower()))


class Sandbox:
    """Network and mount namespaces of their own, with an empty /run: what is made in there is nobody else's."""

    def __init__(self, pid: int) -> None:
        self._inside = ["nsenter", f"--target={pid}", "--net", "--mount", "--"]

    def run(self, *command: str) -> str:
        return subprocess.run(
            [*self._inside, *command], check=True, stdout=subprocess.PIPE, timeout=60
        ).stdout.decode()

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._inside, *command], stdout=subprocess.PIPE)

    def _python(self, code: str) -> Any:
        """Only what this test made counts: processes of others, which may be testing too, can be seen from here."""
        head = "import json; from orchestrator.doctor import clean, leftovers; from dataclasses import asdict"
        uids = {FOREIGN, *map(names.lab_uid, ("dead", "alive"))}
        return json.loads(self.run(sys.executable, "-W", "error", "-c", f"{head}\nuids = {uids!r}\n{code}"))

    def leftovers(self) -> set[tuple[str, str]]:
        found = self._python("print(json.dumps([asdict(one) for one in leftovers() if one.uid in uids]))")
        return {(one["kind"], one["name"]) for one in found}

    def clean(self) -> list[str]:
        lines = self._python("print(json.dumps(clean([one for one in leftovers() if one.uid in uids])))")
        assert isinstance(lines, list)
        return lines

    def namespace(self, name: str, mark: str | None = None) -> None:
        self.run("ip", "netns", "add", name)
        if mark:
            self.run("ip", "-n", name, "link", "set", "lo", "alias", mark)

    def link(self, name: str, alias: str | None = None) -> None:
        self.run("ip", "link", "add", name, "type", "bridge")
        if alias:
            self.run("ip", "link", "set", name, "alias", alias)

    def namespaces(self) -> set[str]:
        return {line.split()[0] for line in self.run("ip", "netns", "list").splitlines()}

    def links(self) -> set[str]:
        return {link["ifname"] for link in json.loads(self.run("ip", "-j", "link", "show"))}


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    script = "mount -t tmpfs none /run && mkdir /run/netns && echo ready && exec sleep 600"
    command = ["unshare", "--net", "--mount", "--propagation=private", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        try:
            yield Sandbox(holder.pid)
        finally:
            holder.kill()


# -- probes ----------------------------------------------------------------------------------------------------------


def test_the_kernel_of_a_lab_host_passes_and_nothing_of_its_network_changes(sandbox: Sandbox) -> None:
    names_of_probes = ["rights", "memfd", "userfaultfd", "bpf", "tap", "namespaces"]

    findings = json.loads(sandbox.run(*DOCTOR, "--json", *names_of_probes))

    assert {finding["name"]: finding["ok"] for finding in findings} == dict.fromkeys(names_of_probes, True), findings
    assert "missing-shmem" in findings[2]["detail"][0]
    assert sandbox.links() == {"lo"}
    assert sandbox.namespaces() == set()


@pytest.mark.skipif(shutil.which(DEFAULT_EMULATOR) is None, reason="needs QEMU")
def test_qemu_and_libvirt_work_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's own folder is closed to the user that QEMU runs as
    with tempfile.TemporaryDirectory(prefix="orc-test-") as scratch:
        Path(scratch).chmod(0o711)
        monkeypatch.setenv("TMPDIR", scratch)
        findings = checkup(only=["qemu", "libvirt", "accelerator"])

        assert [finding.ok for finding in findings] == [True, True, True], findings
        assert any("which finds QEMU" in finding.summary for finding in findings)
        assert list(Path(scratch).iterdir()) == []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert scratch.encode() not in entry.read_bytes()


def test_every_probe_answers_here_without_an_exception() -> None:
    for finding in checkup():
        assert not finding.summary.startswith("cannot be told: "), finding
        if finding.ok is False:
            assert finding.fix


def test_without_capabilities_the_probes_say_false_and_the_fix() -> None:
    wanted = ["rights", "userfaultfd", "bpf", "tap", "namespaces"]
    done = subprocess.run([*NO_CAPABILITIES, *DOCTOR, "--json", *wanted], capture_output=True, timeout=120)

    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1, done.stderr
    for name in ("rights", "bpf", "tap", "namespaces"):
        assert findings[name]["ok"] is False, findings[name]
        assert "run" in findings[name]["fix"]


def test_one_probe_runs_in_the_very_process() -> None:
    done = subprocess.run([*DOCTOR, "--here", "memfd"], capture_output=True, timeout=60, check=True)

    assert json.loads(done.stdout)["name"] == "memfd"


# -- left-overs ------------------------------------------------------------------------------------------------------


def keep_lab(tmp_path: Path, lab: str, uid: str) -> None:
    folder = tmp_path / "state" / "labs" / lab
    folder.mkdir(parents=True)
    (folder / "lab.json").write_text(json.dumps({"uid": uid, "lab": lab}))


def test_namespaces_and_links_of_dead_labs_go_and_their_neighbours_stay(sandbox: Sandbox, tmp_path: Path) -> None:
    dead, alive = names.lab_uid("dead"), names.lab_uid("alive")
    keep_lab(tmp_path, "alive", alive)
    sandbox.namespace("orc.dead", names.mark(dead, "host", "underlay"))
    sandbox.namespace("orc.dead.one", names.mark(dead, "host", "one"))
    sandbox.namespace("orc.foreign.one", names.mark(FOREIGN, "host", "one"))
    sandbox.namespace("orc.alive.one", names.mark(alive, "host", "one"))
    sandbox.namespace("orc.plain")
    sandbox.namespace("orc.other", "somebody:else:host/one")
    sandbox.namespace("marked", names.mark(dead, "host", "one"))
    sandbox.run("sh", "-c", "echo > /run/netns/orc.stale")
    sandbox.link("ou-dead", names.mark(dead, "uplink", "one"))
    sandbox.link("ou-foreign", names.mark(FOREIGN, "uplink", "one"))
    sandbox.link("ou-alive", names.mark(alive, "uplink", "one"))
    sandbox.link("ou-plain")
    sandbox.link("other", "uplink of somebody")

    assert sandbox.leftovers() == {
        ("link", "ou-dead"),
        ("link", "ou-foreign"),
        ("namespace", "orc.dead"),
        ("namespace", "orc.dead.one"),
        ("namespace", "orc.foreign.one"),
    }
    lines = sandbox.clean()

    assert len(lines) == 5
    assert all(line.endswith(": removed") for line in lines), lines
    assert sandbox.namespaces() == {"orc.alive.one", "orc.plain", "orc.other", "marked", "orc.stale"}
    assert sandbox.links() == {"lo", "ou-alive", "ou-plain", "other"}
    assert sandbox.leftovers() == set()


def test_a_process_in_a_namespace_keeps_a_foreign_lab(sandbox: Sandbox) -> None:
    sandbox.namespace("orc.foreign", names.mark(FOREIGN, "host", "underlay"))
    sandbox.namespace("orc.foreign.one", names.mark(FOREIGN, "host", "one"))
    sandbox.link("ou-foreign", names.mark(FOREIGN, "uplink", "one"))
    with sandbox.start("ip", "netns", "exec", "orc.foreign.one", "sh", "-c", "echo ready; exec sleep 600") as sleeper:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == b"ready\n"
        try:
            assert sandbox.leftovers() == set()
        finally:
            sleeper.kill()


def test_a_whole_dead_lab_goes_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    uid = names.lab_uid("dead")
    folder = names.runtime_dir(uid, "one")
    sandbox.namespace("orc.dead.one", names.mark(uid, "host", "one"))
    sandbox.link("ou-dead", names.mark(uid, "uplink", "one"))
    folder.mkdir(parents=True)
    code = "print('ready', flush=True); import time; time.sleep(600)"
    state = tmp_path / "state" / "labs" / "dead" / "hosts" / "one"
    options = [f"--lab=dead --uid={uid}", f"--run-dir={folder}", f"--state-dir={state}"]
    command = ["python", "-c", code, "orchestrator.agent", *" ".join(options).split()]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        agent.stdout.readline()
        start = Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()[19]
        owner = {"uid": uid, "lab": "dead", "host": "one", "pid": agent.pid, "start": start}
        (folder / "owner.json").write_text(json.dumps(owner))
        try:
            lines = sandbox.clean()
            ended = agent.wait(20)
        finally:
            agent.kill()

    assert [line.split()[0] for line in lines] == ["process", "link", "namespace", "runtime"], lines
    assert all(line.endswith(": removed") for line in lines), lines
    assert ended == -15
    assert not folder.exists()
    assert sandbox.leftovers() == set()
