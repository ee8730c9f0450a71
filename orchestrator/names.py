"""Names and ownership marks of everything that is made for a lab.

A *mark* is ``orchestrator:UID:KIND/NAME``; links carry it as their alias, domains in their metadata, network
namespaces on their ``lo``. Only marked things are ever changed or removed.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import re
import socket
from pathlib import Path

from orchestrator import paths

PREFIX = "orchestrator"
_LINK = re.compile(r"o[a-z]-[0-9a-f]{8}")
AGENT_SOCKET = "agent.sock"
"""In :func:`runtime_dir`."""


def digest(*parts: str, length: int = 8) -> str:
    """The first ``length`` hexadecimal digits of the SHA-256 of ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:length]


def lab_uid(lab: str) -> str:
    """8 hexadecimal digits that tell this lab from one of the same name made elsewhere.

    It depends on the machine and on the state folder, so that losing the state loses nothing.
    """
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    return digest(machine or socket.gethostname(), str(paths.state()), lab)


def mark(uid: str, kind: str, name: str) -> str:
    return f"{PREFIX}:{uid}:{kind}/{name}"


def parse_mark(text: str | None) -> tuple[str, str, str] | None:
    """``(uid, kind, name)`` of a mark, or None where ``text`` is none of ours."""
    if not text:
        return None
    prefix, _, rest = text.partition(":")
    uid, _, thing = rest.partition(":")
    kind, slash, name = thing.partition("/")
    return (uid, kind, name) if prefix == PREFIX and uid and slash else None


def namespace(lab: str, host: str | None = None) -> str:
    """Network namespace of a local host; without ``host``, the one that holds the underlay's bridge."""
    return f"orc.{lab}.{host}" if host else f"orc.{lab}"


def link(kind: str, uid: str, *parts: str) -> str:
    """A link's name: at most 15 bytes, as Linux wants. ``kind``: one letter (b bridge, t tap, x VXLAN …)."""
    return f"o{kind}-{digest(uid, kind, *parts)}"


def is_link_ours(name: str, alias: str | None, mark: str) -> bool:
    """Whether a link is ours: it has our ``mark``; or it has no alias and a name of :func:`link`, which nobody else
    chooses. Linux makes a link first and gives it its alias then, and we may have been killed in between."""
    return alias == mark or (not alias and bool(_LINK.fullmatch(name)))


def mac(*parts: str) -> str:
    """A locally administered unicast MAC address that depends on ``parts`` only."""
    raw = bytearray(hashlib.sha256("\0".join(parts).encode()).digest()[:6])
    raw[0] = 0x02
    return ":".join(f"{byte:02x}" for byte in raw)


def vhost_socket(run_dir: Path, tap: str) -> Path:
    """Where QEMU finds a NIC that is served by vhost-user."""
    return run_dir / f"{tap}.vu"


def runtime_dir(uid: str, host: str) -> Path:
    """Sockets and libvirt root of one host of one lab; short, because a socket's path has 107 bytes."""
    return paths.runtime() / digest(uid, host)
