"""``python -m orchestrator.agent.remote ACTION …``: the agent of a host, from an SSH session on that host.

========  =============================================================================================
action    what it does
========  =============================================================================================
facts     print ``{"version", "present", "agent", "state_dir", "cache", "python"}``
start     start the agent unless it runs
connect   the agent's stream as standard input and output
remove    stop the agent, and remove the lab's files on this host
========  =============================================================================================
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

from orchestrator import __version__, paths
from orchestrator.agent.connect import carry
from orchestrator.errors import OrchestratorError
from orchestrator.hosts import agentproc
from orchestrator.hosts.agentproc import AgentPlace

SYSTEM_SOCKETS = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock")


def _system_libvirt() -> bool:
    """A libvirtd or virtqemud of this machine listens."""
    for path in SYSTEM_SOCKETS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(path) == 0:
                return True
    return False


def _remove(place: AgentPlace) -> None:
    agentproc.stop(place)
    shutil.rmtree(place.state_dir, ignore_errors=True)
    for folder in list(place.state_dir.parents)[:4]:
        try:
            folder.rmdir()
        except OSError:
            break  # something else is kept there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("facts", "start", "connect", "remove"))
    for name in ("lab", "uid", "host"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--libvirt", choices=("auto", "system", "embed"), default="auto")
    args = parser.parse_args()
    libvirt = args.libvirt if args.libvirt != "auto" else "system" if _system_libvirt() else "embed"
    place = AgentPlace.of(args.lab, args.uid, args.host, libvirt)
    # Labs of one name, made from different machines, must not share their disks here.
    place = replace(place, state_dir=place.state_dir.with_name(f"{args.host}.{args.uid}"))
    try:
        if args.action == "facts":
            facts = {
                "version": __version__,
                "present": place.state_dir.is_dir(),
                "agent": agentproc.answers(place),
                "state_dir": str(place.state_dir),
                "cache": str(paths.cache()),
                "python": sys.executable,
            }
            sys.stdout.write(json.dumps(facts) + "\n")
        elif args.action == "start":
            agentproc.start(place)
        elif args.action == "connect":
            carry(agentproc.connect(place))
        else:
            _remove(place)
    except OrchestratorError as error:
        sys.stderr.write("\n".join([str(error), *error.tail]) + "\n")
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{Path(error.filename or '').name}: {error.strerror}")


if __name__ == "__main__":
    main()
