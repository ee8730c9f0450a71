"""The nested tier: two Vagrant hosts with their own KVM, made once for all tests.

``KEEP`` says what becomes of the lab: ``1`` it stays up, and the next run finds it as it is; ``0`` it is destroyed in
any case; otherwise it is destroyed unless a test failed, so that there is something to look at.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Machine, Sandbox

FOLDER = Path("/var/tmp/orchestrator-nested")
SECONDS = 1200

LAB = """\
lab: nested
hosts:
  alpha: {kind: vagrant, memory: 2G}
  beta: {kind: vagrant, memory: 2G, disks: [{name: data, size: 1G}]}
networks: {lan: {ipv4: 10.10.0.0/24, ipv6: "fd10::/64"}}
defaults: {guest: {memory: 192M, nics: [lan]}}
guests:
  ann: {host: alpha, disks: [{name: data, size: 32M}]}
  eve: {host: beta}
"""


class Lab(Sandbox):
    """The lab of the nested tier, and its hosts by SSH.

    :ivar text: what its file says between tests.
    """

    text = LAB

    def on(self, host: str, command: str, *, status: int | None = 0, check_key: bool = True) -> str:
        """Run a shell command on a host as root; what it prints."""
        config = self.folder / "ssh_config"
        if not config.exists() or f"Host {host}\n" not in config.read_text():
            config.write_text(self.run("ssh-config").stdout)
        options = ["-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=5"]  # a host that reboots just goes silent
        if not check_key:
            options += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        done = subprocess.run(
            ["ssh", "-F", config, *options, host, f"sudo sh -c {shlex.quote(command)}"],
            env=self.env,
            text=True,
            capture_output=True,
            timeout=self.seconds,
            check=False,
        )
        if status is not None:
            assert done.returncode == status, f"{host}: {command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(SECONDS))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and FOLDER.exists():  # which the end of the last test removes
        (FOLDER / "failed").touch()


@pytest.fixture(autouse=True, scope="session")
def _root() -> None:
    if os.geteuid() != 0:
        pytest.fail("the nested tests make virtual machines: run them as root (make nested uses sudo)")


@pytest.fixture(scope="session")
def nested(_root: None) -> Iterator[Lab]:
    keep = os.environ.get("KEEP", "")
    before = Machine.look()
    resumed = FOLDER.exists()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "failed").unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
    if cache := os.environ.get("ORCHESTRATOR_CACHE"):
        env["ORCHESTRATOR_CACHE"] = cache
    env |= {"ORCHESTRATOR_STATE": str(FOLDER / "state"), "ORCHESTRATOR_RUN": "/run/orc-nested", "NO_COLOR": "1"}
    lab = Lab(FOLDER, env, SECONDS)
    lab.file(lab.text)
    done = lab.run("up", status=None)
    if done.returncode:
        (FOLDER / "failed").touch()
    try:
        assert done.returncode == 0, f"the lab does not come up:\n{done.stdout}\n{done.stderr}"
        yield lab
    finally:
        failed = (FOLDER / "failed").exists()
        if keep == "1" or (failed and keep != "0"):
            print(f"\nThe lab is left as it is, in {FOLDER}. To look at it, or to remove it:")  # noqa: T201
            print(f"  cd {FOLDER} && export ORCHESTRATOR_STATE=$PWD/state ORCHESTRATOR_RUN=/run/orc-nested")  # noqa: T201
            print("  orchestrator status; orchestrator ssh-config > ssh_config; ssh -F ssh_config alpha")  # noqa: T201
            print("  orchestrator down     # or: make nested KEEP=0")  # noqa: T201
        else:
            for process in lab.running:
                process.kill()
                process.communicate()
            lab.run("down")
            shutil.rmtree(FOLDER)
            left = Machine.look().new_since(before)
            assert resumed or not left, f"left behind: {left}"
            assert not (run := Path(env["ORCHESTRATOR_RUN"])).exists(), f"left behind: {list(run.iterdir())}"
