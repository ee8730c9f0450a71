"""Packages of the distribution that this machine runs, unpacked into a folder: nothing is installed.

apt's own lists and solver say what is needed and where it comes from, so mirrors, keys and proxies are those that the
machine has.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

from orchestrator.errors import CommandError, ImageError
from orchestrator.run import run

UPDATE_HINT = "apt-get update"
INSTALL_HINT = "apt-get install mmdebstrap"

# As if nothing were installed here, and without a word into apt's own caches.
_APT = ("-o", "Dir::State::status=/dev/null", "-o", "Dir::Cache::pkgcache=", "-o", "Debug::NoLocking=1")

_PLANNED = re.compile(r"^Inst (\S+) \((\S+)", re.MULTILINE)
_KERNEL = re.compile(r"^linux-(image|modules|binary)-(unsigned-)?\d")
_LIBRARY = re.compile(r"^(lib|zlib)")


@dataclass(frozen=True)
class Distribution:
    """What this machine runs, as far as images depend on it."""

    id: str
    codename: str
    kernel: str  # the package that always depends on the newest kernel
    keyring: str  # the package with the keys of its archive


_KERNELS = {
    "debian": ("linux-image-amd64", "debian-archive-keyring"),
    "ubuntu": ("linux-image-generic", "ubuntu-keyring"),
}


def distribution() -> Distribution:
    """:raise ImageError: no images can be built from the packages of this machine."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    found = release.get("ID", "an unknown system")
    if found not in _KERNELS or platform.machine() != "x86_64":
        raise ImageError(
            f"images cannot be built on {found} {platform.machine()}",
            hint="build on Debian or Ubuntu on x86_64, or name a disk image by path or url under `images`",
        )
    return Distribution(found, release.get("VERSION_CODENAME", ""), *_KERNELS[found])


def resolve(names: Iterable[str]) -> dict[str, str]:
    """The packages that hold ``names``, the libraries that these need and the kernel: name → version.

    Other dependencies (maintainer scripts' helpers and the like) are left out.

    :raise ImageError: apt does not know one of them.
    """
    wanted = list(names)
    hint = f"refresh the package lists: {UPDATE_HINT}"
    try:
        plan = run(
            ["apt-get", *_APT, "--no-install-recommends", "--simulate", "install", *wanted],
            env={"LC_ALL": "C"},
            hint=hint,
        )
    except CommandError as error:
        raise ImageError(
            f"apt cannot resolve {' '.join(wanted)}", hint=error.hint, command=error.command, tail=error.tail
        ) from error
    versions = dict(_PLANNED.findall(plan.stdout.decode()))
    shown = run(["apt-cache", "show", *(f"{name}={version}" for name, version in versions.items())])
    needs = {}
    for paragraph in shown.stdout.decode().strip().split("\n\n"):
        fields = Parser().parsestr(paragraph)
        depends = f"{fields.get('Pre-Depends', '')},{fields.get('Depends', '')}"
        needs[fields["Package"]] = re.findall(r"[a-z0-9][a-z0-9.+-]+(?=[ :,|(]|$)", depends)
    chosen: dict[str, str] = {}
    queue = wanted
    while queue:
        name = queue.pop()
        if name in versions and name not in chosen:
            chosen[name] = versions[name]
            queue += [need for need in needs.get(name, ()) if _LIBRARY.match(need) or _KERNEL.match(need)]
    return dict(sorted(chosen.items()))


def unpack(packages: dict[str, str], downloads: Path, root: Path) -> None:
    """Fetch ``packages`` (name → version) into ``downloads`` and unpack them into ``root``.

    :raise CommandError: a package could not be fetched or unpacked.
    """
    downloads.mkdir(parents=True)
    run(
        ["apt-get", "-o", "APT::Sandbox::User=root", "download", *(f"{n}={v}" for n, v in packages.items())],
        cwd=downloads,
        timeout=1800,
        hint=f"is the machine on line? An old list names packages that are gone: {UPDATE_HINT}",
    )
    for package in sorted(downloads.glob("*.deb")):
        run(["dpkg-deb", "--extract", package, root], timeout=600)


def locate(root: Path, file: str) -> Path:
    """``file`` below ``root``, be it in the place of old or in ``usr``: packages differ.

    :raise ImageError: it is in neither.
    """
    for place in (root / file, root / "usr" / file):
        if place.exists():
            return place
    raise ImageError(f"the packages bring no {file}")


def sources(system: Distribution) -> str:
    """Where this machine gets the packages of its own release from, as lines for a sources.list."""
    columns = ("$(ORIGIN)", "$(CODENAME)", "$(SIGNED_BY)", "$(REPO_URI)", "$(RELEASE)", "$(COMPONENT)")
    listed = run(["apt-get", "indextargets", "--format", "|".join(columns), "Created-By: Packages"])
    lines = []
    for line in dict.fromkeys(listed.stdout.decode().splitlines()):
        origin, codename, signed_by, uri, release, component = line.split("|")
        if origin.lower() == system.id and codename.partition("-")[0] == system.codename:
            options = f"[signed-by={signed_by}] " if signed_by.startswith("/") else ""
            lines.append(f"deb {options}{uri} {release} {component}")
    if not lines:
        raise ImageError(f"apt has no lists of {system.id} {system.codename}", hint=UPDATE_HINT)
    return "\n".join(lines) + "\n"


def install_system(
    system: Distribution, root: Path, names: Sequence[str], hooks: Sequence[str], options: Sequence[str] = ()
) -> None:
    """Install a system of this machine's release with the packages ``names`` into the new folder ``root``.

    :param hooks: shell commands for the time when all is installed; ``$1`` is the folder.
    :param options: further options of mmdebstrap.
    :raise ImageError: this user cannot, or mmdebstrap is missing.
    :raise CommandError: mmdebstrap fails.
    """
    if os.geteuid():
        raise ImageError("only root can install a system into a folder", hint="use sudo")
    if not shutil.which("mmdebstrap"):
        raise ImageError("mmdebstrap, which installs a system into a folder, is missing", hint=INSTALL_HINT)
    # In namespaces of its own, which end with us: whatever happens, no process and no mount is left.
    run(
        ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        + ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"]
        + [f"--include={','.join((*names, system.keyring))}", "--dpkgopt=force-unsafe-io", *options]
        + [f"--dpkgopt=path-exclude=/usr/share/{kind}/*" for kind in ("doc", "man", "locale", "info")]
        + [f"--customize-hook={hook}" for hook in hooks]
        + [system.codename, root, "-"],
        feed=sources(system).encode(),
        env={"TMPDIR": str(root.parent)},
        timeout=3600,
    )


def installed(root: Path) -> str:
    """Every package of the system in ``root`` with its version, one line each."""
    return run(["dpkg-query", f"--root={root}", "--show"]).stdout.decode()
