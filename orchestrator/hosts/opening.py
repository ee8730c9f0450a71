"""Which transport reaches a host: the one place that knows every kind."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from orchestrator.hosts.transport import Transport
from orchestrator.spec.resolved import ResolvedLab


def open_host(lab: ResolvedLab, name: str) -> Transport:
    """The transport for one host of ``lab``; nothing is connected yet."""
    host = lab.hosts.get(name) or lab.former_hosts[name]
    if host.spec.kind == "local":
        from orchestrator.hosts.local import LocalTransport

        return LocalTransport(lab, host)
    from orchestrator.hosts.ssh import SshTransport  # paramiko takes 0.2 s to import

    return SshTransport(lab, host)
