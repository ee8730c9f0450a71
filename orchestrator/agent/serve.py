"""The working half of the agent: the one place that knows every service of a host."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator import __version__, paths
from orchestrator.guests.domain import Identity
from orchestrator.guests.service import GuestService
from orchestrator.hosts import accel, inventory
from orchestrator.hosts.installed import installed_digest
from orchestrator.hosts.rpc import Call, Server
from orchestrator.images.service import ImageService
from orchestrator.switch.service import NetworkService

CAPABILITIES = Path("cache/qemu/capabilities")

QEMU_CONF = """\
# Written by orchestrator. QEMU runs as its own user; the agent gives it the files it needs.
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


def _libvirt_uri(kind: str, run_dir: Path) -> str:
    """The URI, after preparing the folder of the embedded driver.

    What libvirt learns about a QEMU binary (seconds of probing) is kept in the cache for every lab.
    """
    if kind == "system":
        return "qemu:///system"
    root = run_dir / "v"
    paths.make_dir(root / "etc")
    (root / "etc" / "qemu.conf").write_text(QEMU_CONF)
    known = root / CAPABILITIES
    if not known.is_symlink():
        paths.make_dir(known.parent)
        known.symlink_to(paths.make_dir(paths.cache() / "libvirt-capabilities"))
    return f"qemu:///embed?root={root}"


class HostService:
    """What the agent says about itself and its host."""

    def __init__(self, identity: Identity, state_dir: Path) -> None:
        self._identity = identity
        self._state_dir = state_dir
        self._started = time.time()

    def register(self, server: Server) -> None:
        server.register("host.hello", self.hello)
        server.register("host.facts", self.facts)
        server.register("host.inventory", self.inventory)
        server.register("host.doctor", self.doctor)

    def hello(self, call: Call) -> dict[str, Any]:
        return {
            "version": __version__,
            "toolkit": installed_digest(),
            "lab": self._identity.lab,
            "uid": self._identity.uid,
            "host": self._identity.host,
            "pid": os.getpid(),
            "started": self._started,
        }

    def facts(self, call: Call) -> dict[str, Any]:
        """What changes, and what a table of hosts shows. Sizes in bytes."""
        memory = inventory.memory()
        verdict = accel.probe()
        return {
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "memory": memory.total or 0,
            "memory_available": memory.available or 0,
            "disk_available": shutil.disk_usage(self._state_dir).free,
            "accel": verdict.kind,
            "accel_reason": verdict.reason,
        }

    def inventory(self, call: Call) -> dict[str, Any]:
        """What the machine is: an :class:`~orchestrator.hosts.inventory.Inventory`, and what accelerates guests."""
        return {"accel": asdict(accel.probe()), **inventory.take().to_json()}

    def doctor(self, call: Call, only: list[str] | None = None) -> list[dict[str, Any]]:
        from orchestrator import doctor

        return [finding.to_json() for finding in doctor.checkup(only=only)]


def serve(args: argparse.Namespace) -> None:
    """Serve clients until the process is ended."""
    run_dir, state_dir = Path(args.run_dir), Path(args.state_dir)
    identity = Identity(lab=args.lab, uid=args.uid, host=args.host)
    server = Server()
    listener = socket.socket(fileno=args.fd)
    HostService(identity, state_dir).register(server)
    networks = NetworkService(args.uid, run_dir, state_dir)
    networks.register(server)
    networks.resume()
    ImageService().register(server)
    prefix = f"{args.lab}." if args.libvirt == "system" else ""
    GuestService(identity, _libvirt_uri(args.libvirt, run_dir), state_dir, prefix).register(server)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=server.serve_stream, args=(client,), name="client", daemon=True).start()
