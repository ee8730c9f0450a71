"""Where things are kept. Each place can be moved by an environment variable.

=====================  ============================  =======================================================
variable               default (root)                what
=====================  ============================  =======================================================
ORCHESTRATOR_STATE     /var/lib/orchestrator         labs: resolved spec, disks, consoles, logs
ORCHESTRATOR_CACHE     /var/cache/orchestrator       images by content, verdicts of probes
ORCHESTRATOR_RUN       /run/orc                      sockets (short, because a socket's path has 107 bytes)
=====================  ============================  =======================================================

Without root the defaults are the XDG folders of the user.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from pathlib import Path

VARIABLES = ("ORCHESTRATOR_STATE", "ORCHESTRATOR_CACHE", "ORCHESTRATOR_RUN")


def _place(variable: str, system: str, xdg: str, fallback: str) -> Path:
    if chosen := os.environ.get(variable):
        return Path(chosen).expanduser().absolute()
    if os.geteuid() == 0:
        return Path(system)
    base = os.environ.get(xdg)
    return (Path(base) if base else Path.home() / fallback) / "orchestrator"


def state() -> Path:
    return _place("ORCHESTRATOR_STATE", "/var/lib/orchestrator", "XDG_STATE_HOME", ".local/state")


def cache() -> Path:
    return _place("ORCHESTRATOR_CACHE", "/var/cache/orchestrator", "XDG_CACHE_HOME", ".cache")


def runtime() -> Path:
    return _place("ORCHESTRATOR_RUN", "/run/orc", "XDG_RUNTIME_DIR", ".local/run")


def _shipped(name: str) -> Path:
    """A folder that comes with the package: inside it where it is installed, else at the top of the checkout."""
    package = Path(__file__).parent
    installed = package / f"_{name}"
    return installed if installed.is_dir() else package.parent / name


def templates() -> Path:
    """The folder of the Jinja2 templates."""
    return _shipped("templates")


def ansible() -> Path:
    """The folder of the playbook and roles that make a machine a lab host."""
    return _shipped("ansible")


def bpf() -> Path:
    """The folder of the eBPF programs, sources and what was compiled of them."""
    return _shipped("bpf")


def dataplane() -> Path:
    """The folder of the compiled programs that guests wait for."""
    package = Path(__file__).parent
    installed = package / "_dataplane"
    return installed if installed.is_dir() else package.parent / "dataplane" / "bin"


def vagrant() -> Path:
    """The folder of the Vagrantfile."""
    return _shipped("vagrant")


def make_dir(path: Path, mode: int = 0o755) -> Path:
    """Make ``path`` and its parents; ``mode`` holds whatever the umask is (QEMU runs as another user)."""
    if not path.is_dir():
        make_dir(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(mode)
    return path


def sources(folder: Path) -> list[Path]:
    """Every file below ``folder`` but what Python compiled there, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def write_atomic(path: Path, data: str | bytes, mode: int = 0o644) -> None:
    """Replace ``path`` in one step: a reader sees the old content or the new, never a part."""
    import tempfile  # here: what emulated hosts run for each command should load little

    raw = data.encode() if isinstance(data, str) else data
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as out:
            os.fchmod(fd, mode)
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
