"""``python -m orchestrator.agent.remote ACTION …``: the agents of a host, from an SSH session on that host.

========  =============================================================================================
action    what it does
========  =============================================================================================
facts     print what is here, as JSON (:func:`_facts`)
start     start the agent unless it runs; one that runs other code than ours is replaced
remove    stop the agent, and remove the lab's files on this host
boot      start the agents of every lab that has files on this host, after the host was started
========  =============================================================================================

Where systemd runs, an agent gets a scope of its own, so that it is no part of the SSH session that starts it.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import __version__, paths
from orchestrator.errors import OrchestratorError
from orchestrator.hosts import agentproc
from orchestrator.hosts.agentproc import AgentPlace
from orchestrator.hosts.installed import installed_digest

SYSTEM_SOCKETS = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock")
SYSTEMD = Path("/run/systemd/system")
KEPT = "agent.json"


def _system_libvirt() -> bool:
    """A libvirtd or virtqemud of this machine listens."""
    for path in SYSTEM_SOCKETS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(path) == 0:
                return True
    return False


def _place(lab: str, uid: str, host: str, libvirt: str) -> AgentPlace:
    """:param libvirt: ``auto`` is decided once: guests are in the libvirt that it was decided for."""
    place = AgentPlace.of(lab, uid, host, libvirt)
    # Labs of one name, made from different machines, must not share their disks here.
    place = replace(place, state_dir=place.state_dir.with_name(f"{host}.{uid}"))
    if libvirt == "auto":
        try:
            libvirt = str(json.loads((place.state_dir / KEPT).read_text())["libvirt"])
        except (OSError, ValueError, KeyError):
            libvirt = "system" if _system_libvirt() else "embed"
    return replace(place, libvirt=libvirt)


def _facts(place: AgentPlace) -> dict[str, Any]:
    """``toolkit`` is the digest of the bundle that installed it; ``current``: the agent runs this toolkit."""
    return {
        "version": __version__,
        "toolkit": installed_digest(),
        "bindings": importlib.util.find_spec("libvirt") is not None,
        "present": place.state_dir.is_dir(),
        "agent": agentproc.answers(place),
        "current": agentproc.is_current(place),
        "state_dir": str(place.state_dir),
        "cache": str(paths.cache()),
        "python": sys.executable,
    }


def _start(place: AgentPlace) -> None:
    """:raise HostError: it does not start."""
    paths.make_dir(place.state_dir)
    kept = {"lab": place.lab, "uid": place.uid, "host": place.host, "libvirt": place.libvirt}
    paths.write_atomic(place.state_dir / KEPT, json.dumps(kept))
    prefix: list[str] = []
    if SYSTEMD.is_dir() and shutil.which("systemd-run"):
        # Guests stay in the scope of an agent that has ended, so each start needs a name of its own.
        unit = f"orchestrator-agent-{place.lab}-{place.host}-{os.urandom(3).hex()}"
        prefix = ["systemd-run", "--quiet", "--scope", "--collect", f"--unit={unit}", "--"]
    agentproc.start(place, prefix)


def _remove(place: AgentPlace) -> None:
    agentproc.stop(place)
    shutil.rmtree(place.state_dir, ignore_errors=True)
    for folder in list(place.state_dir.parents)[:4]:
        try:
            folder.rmdir()
        except OSError:
            break  # something else is kept there


def _boot() -> bool:
    """Whether every agent was started."""
    good = True
    for file in sorted((paths.state() / "labs").glob(f"*/hosts/*/{KEPT}")):
        try:
            _start(_place(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError) as error:
            sys.stderr.write(f"{file}: {error}\n")
            good = False
        except OrchestratorError as error:
            _complain(error)
            good = False
    return good


def _complain(error: OrchestratorError) -> None:
    sys.stderr.write("\n".join([str(error), *error.tail]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("facts", "start", "remove"):
        action = actions.add_parser(name)
        for option in ("lab", "uid", "host"):
            action.add_argument(f"--{option}", required=True)
        action.add_argument("--libvirt", choices=("auto", "system", "embed"), default="auto")
    actions.add_parser("boot")
    args = parser.parse_args()
    try:
        if args.action == "boot":
            sys.exit(0 if _boot() else 1)
        place = _place(args.lab, args.uid, args.host, args.libvirt)
        if args.action == "facts":
            sys.stdout.write(json.dumps(_facts(place)) + "\n")
        elif args.action == "start":
            _start(place)
        else:
            _remove(place)
    except OrchestratorError as error:
        _complain(error)
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{Path(error.filename or '').name}: {error.strerror}")


if __name__ == "__main__":
    main()
