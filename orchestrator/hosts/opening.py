"""Which transport reaches a host: the one place that knows every kind."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
from collections.abc import Callable

from orchestrator.errors import HostError, StateError
from orchestrator.hosts.model import SshHost
from orchestrator.hosts.rpc import Progress
from orchestrator.hosts.transport import Transport
from orchestrator.spec.resolved import ResolvedLab


def no_box(_: Progress) -> str:
    """For who only looks at hosts."""
    raise StateError("a box is built by `orchestrator up` only")


def open_host(lab: ResolvedLab, name: str, box: Callable[[Progress], str] = no_box) -> Transport:
    """The transport for one host of ``lab``; nothing is connected yet.

    :param box: gives the name of Vagrant's box for hosts that name none; it may have to build it.
    """
    host = lab.hosts.get(name) or lab.former_hosts[name]
    if host.spec.kind == "local":
        from orchestrator.hosts.local import LocalTransport

        return LocalTransport(lab, host)
    if host.spec.kind == "vagrant":
        from orchestrator.hosts.vagrant import VagrantTransport

        return VagrantTransport(lab, host, box)
    from orchestrator.hosts.ssh import SshTransport  # paramiko takes 0.2 s to import

    return SshTransport(lab, host)


def reached_by_ssh(lab: ResolvedLab) -> dict[str, SshHost]:
    """How plain ssh reaches the hosts of ``lab``; without local ones, and those of Vagrant that do not run."""
    found = {}
    for name, host in lab.hosts.items():
        if isinstance(host.spec, SshHost):
            found[name] = host.spec
        elif host.spec.kind == "vagrant":
            from orchestrator.hosts.vagrant import VagrantTransport

            transport = VagrantTransport(lab, host, no_box)
            with contextlib.suppress(HostError), contextlib.closing(transport):
                found[name] = transport.reached_by_ssh()
    return found
