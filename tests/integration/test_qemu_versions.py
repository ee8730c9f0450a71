"""The newest QEMU beside the distribution's: the same lab runs on both."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Sandbox
from tests.packages import missing_libraries, unpack

pytestmark = pytest.mark.privileged

PACKAGES = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "qemu-system-gui",
    "qemu-system-modules-opengl",
    "qemu-system-modules-spice",
]
FIRMWARE = ["seabios", "qemu"]  # folders of /usr/share that hold the distribution's own firmware


def version_of(emulator: str | Path) -> tuple[int, int]:
    text = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    assert match
    return int(match[1]), int(match[2])


def test_guest_on_qemu_10_beside_one_on_the_distributions(sandbox: Sandbox) -> None:
    if version_of("qemu-system-x86_64") >= (10, 0):
        pytest.skip("the distribution's own QEMU is 10 or newer: every other test runs on it")
    root = unpack(sandbox.folder / "qemu10", "{code}-backports", PACKAGES)
    for folder in FIRMWARE:
        ours = root / "usr/share" / folder
        ours.mkdir(exist_ok=True)
        for file in Path("/usr/share", folder).iterdir():
            if not (ours / file.name).exists():
                (ours / file.name).unlink(missing_ok=True)  # a link into a package that is not unpacked
                (ours / file.name).symlink_to(file)
    program = root / "usr/bin/qemu-system-x86_64"
    assert missing_libraries(program) == []
    # Debian builds QEMU for one place; modules of another build, found in that place, would make it abort.
    emulator = root / "qemu-system-x86_64"
    emulator.write_text(
        "#!/bin/sh\n"
        f"export QEMU_MODULE_DIR={root}/usr/lib/x86_64-linux-gnu/qemu\n"
        f'exec {program} -L {root}/usr/share/qemu -L {root}/usr/share/seabios "$@"\n'
    )
    emulator.chmod(0o755)
    assert version_of(emulator) >= (10, 0)
    file = sandbox.file(
        "lab: versions\nhosts: {alpha: {}}\nnetworks: {lan: {ipv4: 10.81.0.0/24}}\n"
        "defaults: {guest: {memory: {size: 192M, max: 448M}, vcpus: {count: 1, max: 2}, nics: [lan]}}\n"
        f"guests:\n  old: {{host: alpha}}\n  new: {{host: alpha, emulator: {emulator}}}\n"
    )

    sandbox.run("up", "-f", file)
    xml = sandbox.run("inspect", "new", "--xml").stdout
    reached = sandbox.json("reach")
    sandbox.run("snapshot", "save", "new", "one")
    sandbox.run("snapshot", "restore", "new", "one")
    more = "nics: [lan], disks: [{name: data, size: 16M}]"
    text = file.read_text().replace("count: 1", "count: 2").replace("size: 192M", "size: 320M")
    sandbox.file(text.replace("nics: [lan]", more))
    sandbox.run("up", "-f", file)

    assert str(emulator) in xml
    assert len(reached) == 2
    assert all(one["milliseconds"] is not None for one in reached)
    assert {(guest["vcpus"], guest["memory"] >> 20) for guest in sandbox.guests().values()} == {(2, 320)}
    assert sandbox.exec("new", "nproc") == "2\n"
    assert [sandbox.exec(name, "cat", "/sys/class/block/vda/size") for name in ("old", "new")] == ["32768\n"] * 2
