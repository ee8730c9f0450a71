"""A lab in other forms: status as data, graphs, an Ansible inventory, an ssh_config."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator import paths
from orchestrator.hosts.model import SshHost
from orchestrator.plan.moves import whereabouts
from orchestrator.plan.operations import ObservedLab, Plan
from orchestrator.run import run
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab
from orchestrator.state import LabState


class GraphFormat(StrEnum):
    MERMAID = "mermaid"
    DOT = "dot"
    SVG = "svg"


def status(lab: ResolvedLab, observed: ObservedLab, plan: Plan) -> dict[str, Any]:
    """What ``status`` shows. Sizes in bytes, ``since`` in seconds since the epoch. ``host`` is where a guest is,
    ``home`` what the lab file says."""
    hosts = []
    for name, host in lab.hosts.items():
        seen = observed.hosts[name]
        state = "broken" if seen.facts.broken else "up" if seen.facts.present else "absent"
        damage = "; ".join(seen.facts.problems) if seen.facts.broken else None
        hosts.append(
            {
                "name": name,
                "kind": host.spec.kind,
                "underlay": host.underlay,
                "state": "unreachable" if seen.problem else state,
                "problem": seen.problem.message if seen.problem else damage,
                "guests": len(seen.guests),
                "networks": [facts.to_json() for facts in seen.networks],
            }
        )
    guests = []
    places = whereabouts(observed)
    known = {facts.name: facts for facts in (*places.unclear, *places.there)}
    for name, wish in lab.guests.items():
        facts = known.pop(name, None)
        addresses = [address for nic in wish.nics for address in nic.addresses]
        if facts is None:
            where = observed.hosts[wish.host]
            unseen = where.problem or where.facts.broken
            guests.append(_guest(wish, "unknown" if unseen else "absent") | {"addresses": addresses})
            continue
        state = "starting" if facts.state == "running" and not facts.ready else facts.state
        guests.append(
            {
                "name": name,
                "host": facts.host,
                "home": wish.home,
                "state": state,
                "reason": facts.reason,
                "ready": facts.ready,
                "vcpus": facts.vcpus,
                "memory": facts.memory,
                "accel": facts.accel,
                "image": facts.image,
                "addresses": addresses,
                "since": facts.since,
                "tail": facts.tail,
            }
        )
    return {
        "lab": lab.lab,
        "file": str(lab.file),
        "hosts": hosts,
        "guests": guests,
        "changes": len(plan.operations),
    }


def _guest(wish: ResolvedGuest, state: str) -> dict[str, Any]:
    return {
        "name": wish.name,
        "host": wish.host,
        "home": wish.home,
        "state": state,
        "reason": "",
        "ready": False,
        "vcpus": wish.vcpus,
        "memory": wish.memory,
        "accel": wish.accel,
        "image": wish.image,
        "since": None,
        "tail": [],
    }


def _network_label(lab: ResolvedLab, name: str) -> str:
    network = lab.networks[name]
    return " ".join(part for part in (name, network.ipv4, network.ipv6) if part)


def graph(lab: ResolvedLab, kind: GraphFormat) -> str:
    """The lab as a Mermaid flowchart, Graphviz source or SVG.

    :raise CommandError: SVG needs Graphviz.
    """
    if kind is GraphFormat.MERMAID:
        return _mermaid(lab)
    dot = _dot(lab)
    if kind is GraphFormat.DOT:
        return dot
    return run(["dot", "-Tsvg"], feed=dot.encode(), hint="install graphviz, or use --format mermaid").stdout.decode()


def _mermaid(lab: ResolvedLab) -> str:
    lines = ["flowchart LR"]
    for host in lab.hosts.values():
        lines.append(f'  subgraph host_{host.name}["{host.name} ({host.spec.kind}, {host.underlay})"]')
        lines += [f'    guest_{guest.name}["{guest.name}"]' for guest in lab.guests_of(host.name)]
        lines.append("  end")
    lines += [f'  network_{name}(("{_network_label(lab, name)}"))' for name in lab.networks]
    for guest in lab.guests.values():
        for nic in guest.nics:
            label = "<br/>".join(nic.addresses) or nic.mac
            lines.append(f'  guest_{guest.name} ---|"{label}"| network_{nic.network}')
    return "\n".join(lines)


def _dot(lab: ResolvedLab) -> str:
    quote = json.dumps
    lines = [f"graph {quote(lab.lab)} {{", "  rankdir=LR;", '  node [shape=box, fontname="sans-serif"];']
    for host in lab.hosts.values():
        lines.append(f"  subgraph {quote('cluster_' + host.name)} {{")
        lines.append(f"    label={quote(f'{host.name} ({host.spec.kind}, {host.underlay})')};")
        lines += [
            f"    {quote('guest ' + guest.name)} [label={quote(guest.name)}];" for guest in lab.guests_of(host.name)
        ]
        lines.append("  }")
    lines += [
        f"  {quote('network ' + name)} [shape=ellipse, label={quote(_network_label(lab, name))}];"
        for name in lab.networks
    ]
    for guest in lab.guests.values():
        for nic in guest.nics:
            label = quote("\n".join(nic.addresses) or nic.mac)
            lines.append(f"  {quote('guest ' + guest.name)} -- {quote('network ' + nic.network)} [label={label}];")
    return "\n".join([*lines, "}"])


def ssh_arguments(guest: ResolvedGuest, state: LabState, port: int = 22) -> dict[str, str]:
    """The ssh_config options by which a guest is reached, through its host's agent."""
    moved = [f"{name}={os.environ[name]}" for name in paths.VARIABLES if name in os.environ]
    prefix = ["env", *moved] if moved else []
    command = [*prefix, sys.executable, "-m", "orchestrator", "connect", "--lab", state.lab, guest.name, str(port)]
    return {
        "User": "root",
        "IdentityFile": _ssh_path(state.ssh_key),
        "IdentitiesOnly": "yes",
        "HostKeyAlias": f"{state.lab}.{guest.name}",
        "UserKnownHostsFile": _ssh_path(state.known_hosts),
        "StrictHostKeyChecking": "accept-new",
        "ProxyCommand": shlex.join(command).replace("%", "%%"),
        "LogLevel": "ERROR",
    }


def _ssh_path(path: Path) -> str:
    """A path as ssh_config(5) takes it: percent signs doubled, quoted where there are spaces."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if " " in text else text


def ssh_config(lab: ResolvedLab, state: LabState, hosts: Mapping[str, SshHost]) -> str:
    """An ssh_config with every guest, and with ``hosts``; a guest goes before a host of the same name."""
    lines = []
    for guest in lab.guests.values():
        lines.append(f"Host {guest.name} {lab.lab}.{guest.name}")
        lines += [f"  {key} {value}" for key, value in ssh_arguments(guest, state).items()]
        lines.append("")
    for name, spec in hosts.items():
        lines.append(f"Host {name}")
        lines += [f"  {key} {value}" for key, value in _host_arguments(spec).items()]
        lines.append("")
    return "\n".join(lines)


def _host_arguments(spec: SshHost) -> dict[str, str]:
    options = {"HostName": spec.address, "Port": str(spec.port), "User": spec.user}
    if spec.key:
        options |= {"IdentityFile": _ssh_path(spec.key.expanduser()), "IdentitiesOnly": "yes"}
    if spec.known_hosts:
        options["UserKnownHostsFile"] = _ssh_path(spec.known_hosts.expanduser())
    if spec.jump:
        options["ProxyJump"] = spec.jump
    return options


def inventory(lab: ResolvedLab, state: LabState, hosts: Mapping[str, SshHost]) -> dict[str, Any]:
    """An Ansible inventory: group ``lab_hosts`` and one group of guests per host.

    :param hosts: how those hosts that are reached by SSH are reached.
    """
    groups: dict[str, Any] = {"lab_hosts": {"hosts": {}}, "guests": {"children": {}}}
    for name in lab.hosts:
        groups["lab_hosts"]["hosts"][name] = _host_variables(hosts.get(name))
        members = {}
        for guest in lab.guests_of(name):
            options = ssh_arguments(guest, state)
            members[guest.name] = {
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(state.ssh_key),
                "ansible_ssh_common_args": " ".join(
                    f"-o {key}={shlex.quote(value)}" for key, value in options.items() if key != "User"
                ),
                "addresses": [address for nic in guest.nics for address in nic.addresses],
            }
        groups["guests"]["children"][f"guests_on_{name.replace('-', '_')}"] = {"hosts": members}
    return {"all": {"children": groups}}


def _host_variables(spec: SshHost | None) -> dict[str, Any]:
    if spec is None:
        return {"ansible_connection": "local"}
    found: dict[str, Any] = {"ansible_host": spec.address, "ansible_port": spec.port, "ansible_user": spec.user}
    if spec.key:
        found["ansible_ssh_private_key_file"] = str(spec.key.expanduser())
    more = [
        f"-o {key}={shlex.quote(value)}"
        for key, value in _host_arguments(spec).items()
        if key in ("UserKnownHostsFile", "ProxyJump")
    ]
    if more:
        found["ansible_ssh_common_args"] = " ".join(more)
    return found
