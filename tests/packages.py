"""A private view of Debian packages: newer programs to test with, unpacked in a folder, nothing installed.

The package sources are those of this machine, read when the test runs; only the suite is another one.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path


def _release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


def _sources() -> Iterator[tuple[str, str]]:
    """``(URI, options)`` of the entries for this release's main suite."""
    code = _release().get("VERSION_CODENAME", "")
    for file in Path("/etc/apt/sources.list.d").glob("*.sources"):
        for stanza in re.split(r"\n\s*\n", file.read_text()):
            fields = dict(re.findall(r"^([A-Za-z-]+):\s*(.+)$", stanza, re.MULTILINE))
            if code in fields.get("Suites", "").split():
                key = fields.get("Signed-By")
                yield fields["URIs"].split()[0], f"[signed-by={key}] " if key else ""
    listed = Path("/etc/apt/sources.list")
    if listed.exists():
        for line in listed.read_text().splitlines():
            match = re.match(rf"deb\s+(\[.*?\]\s+)?(\S+)\s+{code}\s", line)
            if match:
                yield match[2], match[1] or ""


def unpack(folder: Path, suite: str, packages: list[str]) -> Path:
    """Download ``packages`` of ``suite`` (``{code}`` stands for this release's name) and unpack them.

    :raise RuntimeError: the machine has no package source, or a package cannot be had.
    """
    suite = suite.format(code=_release().get("VERSION_CODENAME", ""))
    uri, options = next(_sources(), (None, ""))
    if uri is None:
        raise RuntimeError("this machine's package sources name no Debian or Ubuntu archive")
    for name in ("lists/partial", "archives/partial", "debs", "root", "etc/parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "etc" / "sources.list").write_text(f"deb {options}{uri} {suite} main\n")
    config = [
        f"Dir::State::lists={folder}/lists",
        f"Dir::Cache::archives={folder}/archives",
        f"Dir::Cache::pkgcache={folder}/pkgcache.bin",
        f"Dir::Cache::srcpkgcache={folder}/srcpkgcache.bin",
        f"Dir::Etc::sourcelist={folder}/etc/sources.list",
        f"Dir::Etc::sourceparts={folder}/etc/parts",
        "APT::Sandbox::User=root",
    ]
    flags = [word for setting in config for word in ("-o", setting)]
    for words in (["update", "-q"], ["download", "-q", *packages]):
        done = subprocess.run(
            ["apt-get", *flags, *words], cwd=folder / "debs", capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise RuntimeError(f"apt-get {words[0]} failed: {done.stderr[-500:]}")
    root = folder / "root"
    for package in (folder / "debs").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    root.chmod(0o755)
    return root


def missing_libraries(program: Path) -> list[str]:
    """Libraries that ``program`` needs and this machine lacks."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
