"""What the command line remembers of a lab, and the lock that lets one command at a time change it.

The state is a help, never the truth: it holds the lab as it was last resolved (so that assigned addresses stay, and
``down`` works without the lab file) and the lab's SSH key. What exists is what is observed.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from orchestrator import paths, sshkeys
from orchestrator.errors import LockedError, NotFoundError, StateError
from orchestrator.run import shell_line
from orchestrator.spec.resolved import ResolvedLab


def _labs() -> Path:
    return paths.state() / "labs"


def all_labs() -> list[str]:
    """Names of the labs that have a state here."""
    return sorted(folder.parent.name for folder in _labs().glob("*/lab.json"))


class LabState:
    """The state folder of one lab."""

    def __init__(self, lab: str) -> None:
        self.lab = lab
        self.folder = _labs() / lab

    @property
    def _file(self) -> Path:
        return self.folder / "lab.json"

    @property
    def ssh_key(self) -> Path:
        return self.folder / "ssh_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def load(self) -> ResolvedLab | None:
        """The lab as it was last resolved; None where there is none.

        :raise StateError: the file is there and cannot be read.
        """
        try:
            text = self._file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self._file}: {error.strerror}", hint="run the command with sudo") from error
        try:
            return ResolvedLab.model_validate_json(text)
        except ValidationError as error:
            raise StateError(
                f"{self._file} is damaged or of another version",
                hint="`orchestrator doctor --clean` finds what is left; then remove the file",
                tail=str(error).splitlines()[:5],
            ) from error

    def get(self) -> ResolvedLab:
        """:raise NotFoundError: the lab has never been up, or has been taken down."""
        lab = self.load()
        if lab is None:
            known = ", ".join(all_labs())
            raise NotFoundError(
                f"lab {self.lab} is not up", hint=f"labs that are: {known}" if known else "orchestrator up"
            )
        return lab

    def save(self, lab: ResolvedLab) -> None:
        paths.make_dir(self.folder)
        paths.write_atomic(self._file, lab.model_dump_json(indent=1))

    def remove(self) -> None:
        """Forget the lab. Other labs, and what is not ours in the folder, stay."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in (_labs(), paths.state()):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def public_key(self) -> str:
        """The lab's SSH public key; the pair is made when it is first asked for."""
        if not self.ssh_key.exists():
            sshkeys.make(self.ssh_key, f"orchestrator-{self.lab}")
        return sshkeys.public_key(self.ssh_key)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lab for changes.

        :raise LockedError: another command holds it; the message says which.
        """
        file = paths.runtime() / f"{self.lab}.lock"
        fd = self._take(file)
        while not _same_file(fd, file):  # its last holder removed it between our open and our lock
            os.close(fd)
            fd = self._take(file)
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid(), "command": shell_line(sys.argv)}).encode(), 0)
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()
                file.parent.rmdir()
            os.close(fd)

    def _take(self, file: Path) -> int:
        try:
            paths.make_dir(file.parent)
            fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StateError(f"{error.filename}: {error.strerror}", hint="run the command with sudo") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read_owner(fd)
            os.close(fd)
            raise LockedError(
                f"lab {self.lab} is being changed by {owner}", hint="wait until it ends, or end it"
            ) from error
        return fd


def _same_file(fd: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), file.stat())
    except FileNotFoundError:
        return False


def _read_owner(fd: int) -> str:
    try:
        data = json.loads(os.pread(fd, 4096, 0))
        return f"process {data['pid']} ({data['command']})"
    except (ValueError, KeyError, TypeError):
        return "another command"
