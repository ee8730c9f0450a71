"""What a bundle (:mod:`orchestrator.hosts.install`) does on the machine where it is run: it installs the toolkit.

``python3 BUNDLE [--prefix DIR] [--check]`` prints ``changed`` or ``unchanged``; with ``--check`` it changes nothing
and prints what it would do. It needs Python's standard library and ``tar``, but no package index and no pip.

==============================  ============================================================================
PREFIX/lib/ID/                  a virtual environment with the toolkit; appears whole, by being renamed
PREFIX/bin/python, …            two lines of shell that lead there; replaced when all else is done
==============================  ============================================================================

An installation that is killed at any moment leaves what was there before, or what there should be. Processes that run
go on with the files that they began with: those of one earlier installation are kept.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ABOUT = "bundle.json"
SITE = "site-packages.tar.gz"
PROGRAMS = {"python": "", "orchestrator": " -P -m orchestrator"}
_NEW = ".new-"


def script(home: Path, arguments: str) -> str:
    return f'#!/bin/sh\nexec {shlex.quote(str(home / "bin" / "python"))}{arguments} "$@"\n'


def is_installed(prefix: Path, home: Path) -> bool:
    """The programs lead to ``home``, and what is there runs: the machine's Python may have become another."""
    for name, arguments in PROGRAMS.items():
        try:
            if (prefix / "bin" / name).read_text() != script(home, arguments):
                return False
        except (OSError, UnicodeDecodeError):
            return False
    return runs(home)


def runs(home: Path) -> bool:
    command = [str(home / "bin" / "python"), "-P", "-c", "import orchestrator.errors"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def install(bundle: zipfile.ZipFile, prefix: Path) -> None:
    """Make what is in ``bundle`` the toolkit at ``prefix``. Who calls it holds the lock."""
    home = home_of(bundle, prefix)
    before = _homes(prefix)
    if not runs(home):
        for left in home.parent.glob(f"{_NEW}*"):
            shutil.rmtree(left)
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=home.parent))
        new.chmod(0o755)
        import venv  # others only want to know a name

        venv.EnvBuilder(system_site_packages=True, symlinks=True).create(new)
        site = new / "lib" / f"python{python_version()}" / "site-packages"
        _unpack(bundle, site)
        (new / ABOUT).write_bytes(bundle.read(ABOUT))
        os.sync()  # the name must not outlive a power cut without what it stands for
        if home.exists():
            home.rename(Path(tempfile.mkdtemp(prefix=_NEW, dir=home.parent)) / "broken")
        new.rename(home)
    (prefix / "bin").mkdir(exist_ok=True)
    for name, arguments in PROGRAMS.items():
        _replace(prefix / "bin" / name, script(home, arguments))
    for old in home.parent.iterdir():
        if old.name.startswith(_NEW) or ((old / ABOUT).exists() and old not in {home, *before}):
            shutil.rmtree(old)


def _unpack(bundle: zipfile.ZipFile, folder: Path) -> None:
    """By ``tar``, which takes a quarter of the time that Python does for so many files."""
    command = ["tar", "--extract", "--gzip", "--no-same-owner", f"--directory={folder}"]
    with bundle.open(SITE) as packed, subprocess.Popen(command, stdin=subprocess.PIPE) as tar:
        assert tar.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # tar says why it ended
            shutil.copyfileobj(packed, tar.stdin)
    if tar.returncode:
        raise OSError(errno.EIO, "the toolkit cannot be unpacked", str(folder))


def home_of(bundle: zipfile.ZipFile, prefix: Path) -> Path:
    return prefix / "lib" / str(json.loads(bundle.read(ABOUT))["id"])


def _homes(prefix: Path) -> set[Path]:
    """The installations that the programs lead to."""
    found = set()
    for name, arguments in PROGRAMS.items():
        for home in (prefix / "lib").glob("*/"):
            program = prefix / "bin" / name
            if program.is_file() and program.read_bytes() == script(home, arguments).encode():
                found.add(home)
    return found


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f"{_NEW}{file.name}")
    new.write_text(text)
    new.chmod(0o755)
    new.replace(file)


def python_version() -> str:
    """Of the Python that runs, such as 3.13."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the toolkit from this bundle.")
    parser.add_argument("--prefix", type=Path, default=Path("/opt/orchestrator"), help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="change nothing, print what would be done")
    args = parser.parse_args()
    prefix = args.prefix.absolute()
    os.umask(0o022)
    with zipfile.ZipFile(Path(sys.argv[0])) as bundle:
        wanted = json.loads(bundle.read(ABOUT))
        here = {"python": python_version(), "machine": platform.machine()}
        for key, value in here.items():
            if wanted[key] != value:
                sys.exit(f"this bundle is for {key} {wanted[key]}, and this is {value}")
        try:
            home = home_of(bundle, prefix)
            changed = not is_installed(prefix, home)
            if changed and not args.check:
                (prefix / "lib").mkdir(parents=True, exist_ok=True)
                lock = os.open(prefix / "lib", os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends
                changed = not is_installed(prefix, home)  # another one may have done it
                if changed:
                    install(bundle, prefix)
        except OSError as error:
            sys.exit(f"{error.filename or prefix}: {error.strerror}")
    sys.stdout.write("changed\n" if changed else "unchanged\n")


if __name__ == "__main__":
    main()
