"""Programs to measure with or against, from Debian packages: those of this machine or, where it lacks them, unpacked
in the cache. Nothing is installed, so no daemon of theirs is started either.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from orchestrator import paths

DOWNLOAD_SECONDS = 120
_FOLDERS = ("bin", "sbin", "lib/openvswitch-switch", "lib/openvswitch-switch-dpdk")


class MissingError(Exception):
    """A package that this machine lacks and cannot get."""


def _root() -> Path:
    return paths.cache() / "bench"


def find(program: str, package: str) -> Path:
    """
    :param package: the Debian package that it is in.
    :raise MissingError: it is not here and cannot be had.
    """
    there = shutil.which(program) or shutil.which(program, path=_search_path())
    if there is None:
        _unpack(package)
        there = shutil.which(program, path=_search_path())
    if there is None:
        raise MissingError(f"{program}: package {package} has no such program here")
    return Path(there)


def shared(path: str) -> Path:
    """A file below ``/usr/share`` of a package that :func:`find` has found."""
    return _below("share", path)


def library(path: str) -> Path:
    """A file or folder of such a package, below the folder of this machine's libraries."""
    return _below(f"lib/{platform.machine()}-linux-gnu", path)


def _below(folder: str, path: str) -> Path:
    installed = Path("/usr") / folder / path
    return installed if installed.exists() else _root() / "usr" / folder / path


def environment() -> dict[str, str]:
    """The environment to run an unpacked program in."""
    libraries = _root() / "usr/lib"
    return {**os.environ, "LD_LIBRARY_PATH": f"{libraries / f'{platform.machine()}-linux-gnu'}:{libraries}"}


def _search_path() -> str:
    root = _root() / "usr"
    return ":".join(str(root / folder) for folder in _FOLDERS)


def _run(*words: str, folder: Path | None = None) -> str:
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    if done.returncode:
        raise MissingError(f"{' '.join(words[:2])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def _unpack(package: str) -> None:
    """Unpack ``package`` and those of its dependencies that this machine lacks."""
    if not shutil.which("apt-get"):
        raise MissingError(f"{package}: this is no Debian")
    try:
        plan = _run("apt-get", "-s", "install", "--no-install-recommends", package)
        folder = _root() / "packages"
        folder.mkdir(parents=True, exist_ok=True)
        _run("apt-get", "-q", "download", *re.findall(r"^Inst (\S+)", plan, re.MULTILINE), folder=folder)
        for file in folder.glob("*.deb"):
            _run("dpkg-deb", "-x", str(file), str(_root()))
        shutil.rmtree(folder)
    except (MissingError, subprocess.TimeoutExpired, OSError) as error:
        raise MissingError(f"package {package} cannot be had ({error}); apt-get update may help") from error
