"""The toolkit as a *bundle*: one file that holds it with all that it needs, and installs it where it is run.

A bundle is a zip file that Python runs: :mod:`orchestrator.hosts.installer` with what the wheels of the toolkit and
of its dependencies hold, at the versions and with the hashes of ``requirements-host.lock``. The one dependency that
it does not hold are the bindings of libvirt, which fit one libvirt: a host has those of its distribution
(``python3-libvirt``).

Bundles lie in the cache, named by the digest of all that they are made from.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import compileall
import contextlib
import fcntl
import functools
import importlib.util
import json
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from py_compile import PycInvalidationMode

from orchestrator import __version__, names, paths
from orchestrator.errors import CommandError, HostError
from orchestrator.hosts import installer
from orchestrator.hosts.installed import installed_digest
from orchestrator.hosts.rpc import Progress
from orchestrator.patience import scaled
from orchestrator.run import run

MACHINE = "x86_64"
LOCK = "requirements-host.lock"
SOURCES = ("ansible", "bpf", "dataplane/bin", "orchestrator", "templates", "vagrant")
OLDEST_PYTHON = (3, 11)
KEEP_SECONDS = 24 * 3600

_GLIBC = range(36, 16, -1)  # 2.36, the one of Debian 12, and what runs on it
_MARKED = re.compile(r"^(?P<pin>[\w.-]+==\S+) ; (?P<marker>[^\\]+?)(?P<rest> \\)?$")


def _checkout() -> Path | None:
    """The folder from which this toolkit runs, unless it was installed."""
    checkout = Path(__file__).parents[2]
    return checkout if (checkout / "pyproject.toml").exists() else None


@functools.cache
def _digest(checkout: Path) -> str:
    """Of everything that goes into a bundle. A command stays with what it found first."""
    files = [checkout / "pyproject.toml", checkout / LOCK]
    for folder in SOURCES:
        files += paths.sources(checkout / folder)
    return names.digest(*(f"{path.relative_to(checkout)}\0{path.read_bytes().hex()}" for path in files), length=12)


def our_digest() -> str | None:
    """The digest that other hosts should have; None where it cannot be told, as the toolkit was installed by other
    means than a bundle."""
    checkout = _checkout()
    return _digest(checkout) if checkout else installed_digest()


def bundle(python: str, progress: Progress) -> Path:
    """The bundle for machines whose Python is of version ``python``, such as 3.13; made unless it is in the cache.

    :raise HostError: it cannot be made: no checkout, Python too old, no wheels for it, or no package index.
    """
    checkout = _checkout()
    if checkout is None:
        raise HostError(
            "the toolkit runs from an installed package, so it cannot make one for another host",
            hint="install it there by hand and name it with `toolkit:`, or run from a checkout",
        )
    if not re.fullmatch(r"3\.\d+", python) or tuple(map(int, python.split("."))) < OLDEST_PYTHON:
        raise HostError(
            f"the toolkit needs Python 3.11 or newer, and that is Python {python}",
            hint="Debian 12 and 13 and Ubuntu 24.04 have one",
        )
    digest = _digest(checkout)
    target = _folder() / f"orchestrator-{__version__}-{digest}-py{python}.pyz"
    with _locked(progress):
        if not target.exists():
            _forget_old()
            wheels = [_toolkit(checkout, digest, progress), *_dependencies(checkout, python, progress)]
            about = {
                "id": f"{__version__}-{digest}-py{python}",
                "version": __version__,
                "digest": digest,
                "python": python,
                "machine": MACHINE,
            }
            with _work() as work:
                _write(work / target.name, about, wheels)
                (work / target.name).replace(target)
        target.touch()
    return target


def _folder() -> Path:
    return paths.make_dir(paths.cache() / "bundles")


@contextlib.contextmanager
def _locked(progress: Progress) -> Iterator[None]:
    with open(_folder() / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another command that makes a bundle")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _work() -> Iterator[Path]:
    """A new folder in the cache; who has the lock may remove what a killed one left in it."""
    folder = _folder() / ".build"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield paths.make_dir(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _forget_old() -> None:
    for thing in _folder().glob("[!.]*"):
        if time.time() - thing.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(thing) if thing.is_dir() else thing.unlink()


def _kept(name: str, make: Callable[[Path], None]) -> list[Path]:
    """The wheels in folder ``name`` of the cache, made by ``make`` where there is none."""
    folder = _folder() / name
    if not folder.exists():
        with _work() as work:
            made = paths.make_dir(work / "wheels")
            make(made)
            made.rename(folder)
    folder.touch()
    return sorted(folder.glob("*.whl"))


def _toolkit(checkout: Path, digest: str, progress: Progress) -> Path:
    """The toolkit's own wheel; the same for every Python."""

    def build(folder: Path) -> None:
        progress("building the toolkit's wheel")
        # The back end is there where `.ci/setup` was run; else pip fetches it.
        here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
        _pip(["wheel", "--no-deps", *here, "--wheel-dir", folder, checkout])

        _add_bytecode(folder, progress)

    [wheel] = _kept(f"toolkit-{digest}", build)
    return wheel


def _dependencies(checkout: Path, python: str, progress: Progress) -> list[Path]:
    lock = (checkout / LOCK).read_text()

    def fetch(folder: Path) -> None:
        progress(f"fetching wheels for Python {python}")
        wanted = folder.parent / "requirements.txt"
        wanted.write_text(requirements(lock))
        target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        target += [f"--platform=manylinux_2_{minor}_{MACHINE}" for minor in _GLIBC]
        target += [f"--platform=manylinux2014_{MACHINE}"]
        _pip(["download", "--no-deps", "--require-hashes", *target, "--dest", folder, "-r", wanted])
        if python == installer.python_version():
            _add_bytecode(folder, progress)

    made_from = names.digest(lock, python, str(sys.implementation.cache_tag), length=12)
    return _kept(f"wheels-{made_from}-py{python}", fetch)


def _add_bytecode(folder: Path, progress: Progress) -> None:
    """Add to the wheels in ``folder`` their modules as compiled by the Python that runs.

    Hosts have that one or, if they have another, compile by themselves when they import a module first, which takes a
    slow one half a minute. What was unpacked is never changed, so nobody need compare it with its source.
    """
    progress("compiling")
    for wheel in folder.glob("*.whl"):
        with (
            tempfile.TemporaryDirectory(dir=folder) as work,
            zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as content,
        ):
            content.extractall(work)
            compileall.compile_dir(
                work, stripdir=work, quiet=2, workers=0, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
            )
            for file in sorted(Path(work).rglob("*.pyc")):
                content.write(file, file.relative_to(work))


def requirements(lock: str) -> str:
    """``lock`` without its environment markers, and without what is for Windows.

    pip would judge the markers by the Python that runs it and not by the one that it fetches for. What the target has
    no use for does no harm there.
    """
    lines, skipping = [], False
    for line in lock.splitlines():
        if not line.startswith((" ", "#")):
            found = _MARKED.match(line)
            skipping = bool(found and found["marker"] == "sys_platform == 'win32'")
            if found:
                line = found["pin"] + (found["rest"] or "")
        if not skipping:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _pip(words: list[str | Path]) -> None:
    try:
        run([sys.executable, "-m", "pip", "--quiet", *words], timeout=scaled(900))
    except CommandError as error:
        raise HostError(
            f"the toolkit's bundle could not be made: {error.message}",
            hint="the package index must be reachable from this machine; the hosts need none",
            command=error.command,
            tail=error.tail,
        ) from error


def _write(target: Path, about: dict[str, str], wheels: list[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        site = Path(work, "site")
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as content:
                if any(".data/" in name for name in content.namelist()):
                    raise HostError(f"{wheel.name} has files that are not simply unpacked, which no bundle may hold")
                content.extractall(site)
        packed = Path(work, installer.SITE)
        with tarfile.open(packed, "w:gz", compresslevel=6) as tar:
            tar.add(site, ".", filter=_readable_by_all)
        with zipfile.ZipFile(target, "w") as out:
            out.writestr("__main__.py", Path(installer.__file__).read_bytes())
            out.writestr(installer.ABOUT, json.dumps(about))
            out.write(packed, packed.name)


def _readable_by_all(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    return entry.replace(mode=0o755 if entry.isdir() else 0o644, uid=0, gid=0, uname="root", gname="root", deep=False)
