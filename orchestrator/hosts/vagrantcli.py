"""The ``vagrant`` command, and the folder in which it finds a lab's machines.

The Vagrantfile is the same for every lab; ``hosts.json`` beside it holds what differs. Vagrant keeps what it knows of
each machine in ``.vagrant`` there.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator import paths
from orchestrator.errors import CommandError, HostError
from orchestrator.patience import scaled
from orchestrator.run import TAIL_LINES, follow, run, shell_line

OUR_BOXES = "orchestrator/"  # what their names begin with
BOOT_SECONDS = 600
COMMAND_SECONDS = 1800
ENVIRONMENT = {"VAGRANT_CHECKPOINT_DISABLE": "1", "VAGRANT_DEFAULT_PROVIDER": "libvirt", "VAGRANT_NO_COLOR": "1"}
HINT = "apt-get install vagrant vagrant-libvirt"

_CREATED = re.compile(r"starting domain|waiting for", re.IGNORECASE)
_TRACE = re.compile(r"\s+from /.*:in `")
_STEP = re.compile(r"^(?:==>)?\s*\S+: (\S.*?)(?:\.\.\.|\.)?$")
_TELLING = re.compile(
    r"Uploading|Creating image|Creating domain with|Starting domain|Waiting for|Inserting|Setting hostname|"
    r"Configuring and enabling|Removing domain|Attempting"
)


def add_box(name: str, version: str, file: Path) -> None:
    """Make a box known to Vagrant; one of that name and version is replaced.

    :raise CommandError: Vagrant is missing or refuses.
    """
    provider = {"name": "libvirt", "url": file.as_uri()}
    metadata = file.with_suffix(".json")
    metadata.write_text(json.dumps({"name": name, "versions": [{"version": version, "providers": [provider]}]}))
    command = ["vagrant", "box", "add", "--force", "--provider", "libvirt", str(metadata)]
    run(command, env=ENVIRONMENT, timeout=scaled(600), hint=HINT)


def list_boxes() -> list[str]:
    """Names of the boxes that Vagrant has for libvirt.

    :raise CommandError: Vagrant is missing or fails.
    """
    listed = run(["vagrant", "box", "list", "--machine-readable"], env=ENVIRONMENT, timeout=scaled(120), hint=HINT)
    found, name = [], ""
    for row in csv.reader(listed.stdout.decode(errors="replace").splitlines()):  # time, target, key, value …
        if row[2:3] == ["box-name"]:
            name = row[3]
        elif row[2:4] == ["box-provider", "libvirt"]:
            found.append(name)
    return found


def remove_box(name: str) -> None:
    """:raise CommandError: Vagrant refuses."""
    command = ["vagrant", "box", "remove", "--force", "--all", "--provider", "libvirt", name]
    run(command, env=ENVIRONMENT, timeout=scaled(120), hint=HINT)


@contextlib.contextmanager
def _one_at_a_time(progress: Callable[[str], None]) -> Iterator[None]:
    with open(paths.make_dir(paths.runtime()) / "vagrant.lock", "w") as lock:
        progress("waiting for another machine")
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Project:
    """The machines of one lab, as Vagrant sees them."""

    def __init__(self, lab: str) -> None:
        self.folder = paths.state() / "labs" / lab / "vagrant"

    def machine(self, name: str) -> Path:
        """Where Vagrant, and we, keep what belongs to one machine; it goes with the machine."""
        return self.folder / ".vagrant" / "machines" / name / "libvirt"

    def machine_id(self, name: str) -> str | None:
        """The UUID of the machine's domain; None where there is no machine."""
        try:
            return (self.machine(name) / "id").read_text().strip() or None
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(paths.make_dir(self.folder) / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def describe(self, common: dict[str, Any], name: str, machine: dict[str, Any] | None) -> None:
        """Write a machine into ``hosts.json``, or take it out."""
        with self._locked():
            shutil.copyfile(paths.vagrant() / "Vagrantfile", self.folder / "Vagrantfile")
            machines = self.described()
            machines.pop(name, None)
            if machine is not None:
                machines[name] = machine
            data = {**common, "boot_timeout": int(scaled(BOOT_SECONDS)), "hosts": machines}
            paths.write_atomic(self.folder / "hosts.json", json.dumps(data, indent=2) + "\n")

    def described(self) -> dict[str, dict[str, Any]]:
        """The machines in ``hosts.json``."""
        try:
            return dict(json.loads((self.folder / "hosts.json").read_text())["hosts"])
        except FileNotFoundError:
            return {}

    def up(self, name: str, progress: Callable[[str], None], cancel: threading.Event | None) -> None:
        """Make the machine, or start it.

        Creating is done by one machine at a time, over all labs: the plugin makes networks and volumes that machines
        share, and looks whether they are there first. What takes long, starting, is done side by side.

        :raise HostError: with what Vagrant said.
        """
        with contextlib.ExitStack() as creating:
            creating.enter_context(_one_at_a_time(progress))
            progress("creating" if self.machine_id(name) is None else "starting")

            def said(text: str) -> None:
                progress(text)
                if _CREATED.search(text):
                    creating.close()

            self._act(["up", name], f"host {name} does not start", said, cancel)

    def destroy(self, name: str, progress: Callable[[str], None]) -> None:
        """:raise HostError: with what Vagrant said."""
        with _one_at_a_time(progress):
            self._act(["destroy", "--force", name], f"host {name} cannot be removed", progress, None)

    def _act(
        self, args: list[str], failure: str, progress: Callable[[str], None], cancel: threading.Event | None
    ) -> None:
        said: list[str] = []

        def on_line(line: str) -> None:
            if not _TRACE.match(line):
                said.append(line)
            if (step := _STEP.match(line)) and _TELLING.match(step[1]):
                progress(step[1][:1].lower() + step[1][1:])

        try:
            follow(
                ["vagrant", *args, "--no-tty"],
                on_line,
                env=ENVIRONMENT,
                cwd=self.folder,
                timeout=scaled(COMMAND_SECONDS),
                cancel=cancel,
                hint=HINT,
            )
        except CommandError as error:
            missing = error.message.endswith("not found")
            raise HostError(
                f"{failure}: {error.message}",
                hint=HINT if missing else None,
                command=shell_line(["vagrant", *args], cwd=self.folder),
                tail=said[-TAIL_LINES:],
            ) from error


def all_projects() -> list[Project]:
    """The projects of every lab that has a state here."""
    return [Project(folder.parent.name) for folder in sorted((paths.state() / "labs").glob("*/vagrant"))]
