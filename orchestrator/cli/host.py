"""``host``: what the hosts of a lab are and can do, and how machines become hosts."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

from orchestrator.cli import hostsnapshot, output, provision, tools
from orchestrator.cli.output import Format
from orchestrator.cli.session import (
    FileOption,
    HostArgument,
    LabOption,
    OutputOption,
    agent_of,
    current,
    host_of,
    transports,
)
from orchestrator.errors import HostError, OrchestratorError, StateError, TakenError, printable
from orchestrator.hosts.transport import Transport
from orchestrator.spec.resolved import ResolvedHost

app = typer.Typer(help="Show what the hosts of a lab are and can do, and prepare them.", no_args_is_help=True)


def register(parent: typer.Typer) -> None:
    app.command("list")(list_hosts)
    app.command()(facts)
    app.command()(doctor)
    app.command()(provision.provision)
    hostsnapshot.register(app)
    parent.add_typer(app, name="host")


# -- list ------------------------------------------------------------------------------------------------------------


def list_hosts(
    file: FileOption = None, lab_name: LabOption = None, output_format: OutputOption = Format.TABLE
) -> None:
    """List the hosts of a lab with what they have and carry."""
    lab, _ = current(file, lab_name)
    with transports(lab) as opened, ThreadPoolExecutor(max(1, len(lab.hosts)), "host") as pool:
        found = list(pool.map(_look, [opened[name] for name in lab.hosts]))
    if output_format is Format.TABLE:
        output.stdout.print(_list(found))
    else:
        output.data(found, output_format)
    if any(host["state"] == "unreachable" for host in found):
        raise typer.Exit(HostError.exit_code)


def _head(host: ResolvedHost) -> dict[str, Any]:
    return {"name": host.name, "kind": host.spec.kind, "address": str(host.spec.address or host.underlay)}


def _look(transport: Transport) -> dict[str, Any]:
    """One host as ``list`` shows it; ``host.facts`` of its agent, if that can be asked.

    :raise TakenError: a name of ours belongs to somebody else.
    :raise StateError: we lack the rights to look.
    """
    found: dict[str, Any] = {**_head(transport.host), "state": "up", "problem": None, "guests": None}
    try:
        seen = transport.facts()
        if not seen.present or seen.broken:
            state = "broken" if seen.broken else "absent"
            return found | {"state": state, "problem": "; ".join(seen.problems) or None}
        if not seen.agent:
            transport.start_agent()
        agent = transport.agent()
        return found | {"guests": len(agent.call("guest.facts")), **agent.call("host.facts")}
    except (TakenError, StateError):
        raise
    except OrchestratorError as error:
        return found | {"state": "unreachable", "problem": str(error)}


def _list(found: list[dict[str, Any]]) -> RenderableType:
    rows = [
        [
            host["name"],
            host["kind"],
            host["address"],
            (output.good if host["state"] == "up" else output.bad)(host["state"]),
            _shown(host.get("cpus")),
            _size(host.get("memory")),
            _size(host.get("memory_available")),
            _shown(host.get("accel")),
            _shown(host["guests"]),
        ]
        for host in found
    ]
    lines: list[RenderableType] = [
        output.table(["HOST", "KIND", "ADDRESS", "STATE", "CPUS", "MEMORY", "AVAILABLE", "ACCEL", "GUESTS"], rows)
    ]
    for host in found:
        if host["problem"]:
            lines += ["", output.bad(f"{host['name']}: {host['problem']}")]
    return Group(*lines)


# -- facts -----------------------------------------------------------------------------------------------------------


def facts(
    host: HostArgument,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Show what a host is: processors, memory, PCI devices, NICs, and what its kernel offers."""
    lab, _ = current(file, lab_name)
    wanted = host_of(lab, host)
    with transports(lab) as opened, agent_of(opened[host]) as agent:
        found = {**_head(wanted), **agent.call("host.inventory")}
    if output_format is Format.TABLE:
        output.stdout.print(_facts(found))
    else:
        output.data(found, output_format)


def _facts(found: dict[str, Any]) -> RenderableType:
    sections = [_host(found), _cpu(found), _memory(found["memory"]), _kernel(found["kernel"])]
    sections += [_numa(found["numa"]), _pci(found["pci"]), _nics(found["nics"])]
    lines = [line for section in sections for line in (section, "")]
    return Group(*lines[:-1])


def _section(title: str, facts: dict[str, str]) -> RenderableType:
    return output.table([title, ""], [[escape(name), fact] for name, fact in facts.items()])


def _host(found: dict[str, Any]) -> RenderableType:
    return _section(
        "HOST",
        {
            "name": _shown(found["name"]),
            "kind": _shown(found["kind"]),
            "address": _shown(found["address"]),
            "system": _shown(found["os"]),
            "accelerator": f"{_shown(found['accel']['kind'])}: {_shown(found['accel']['reason'])}",
        },
    )


def _cpu(found: dict[str, Any]) -> RenderableType:
    cpu, kvm = found["cpu"], found["kvm"]
    return _section(
        "CPU",
        {
            "model": f"{_shown(cpu['model'])} ({_shown(cpu['vendor'])}, {_shown(cpu['architecture'])})",
            "sockets, cores, threads": ", ".join(_shown(cpu[key]) for key in ("sockets", "cores", "threads")),
            "virtualization": _shown(cpu["virtualization"]),
            "flags": _words(cpu["flags"]),
            "/dev/kvm": _shown(kvm["device"]),
            "KVM modules": _words(kvm["modules"]),
            "nested KVM": _shown(kvm["nested"]),
            "nested paging": _shown(kvm["two_dimensional_paging"]),
        },
    )


def _memory(memory: dict[str, Any]) -> RenderableType:
    def free(part: Any, whole: Any) -> str:
        return f"{part} of {whole}"

    return _section(
        "MEMORY",
        {
            "available": free(_size(memory["available"]), _size(memory["total"])),
            "swap free": free(_size(memory["swap_free"]), _size(memory["swap_total"])),
            **{
                f"huge pages of {_size(pages['size'])} free": free(_shown(pages["free"]), _shown(pages["total"]))
                for pages in memory["hugepages"]
            },
            "transparent huge pages": _shown(memory["transparent_hugepages"]),
        },
    )


def _kernel(kernel: dict[str, Any]) -> RenderableType:
    return _section(
        "KERNEL",
        {
            "release": _shown(kernel["release"]),
            "BTF": _shown(kernel["btf"]),
            "cgroups": _shown(kernel["cgroup"]),
            "KSM": _shown(kernel["ksm"]),
            "IOMMUs": _words(kernel["iommus"]),
            "AppArmor": _shown(kernel["apparmor"]),
            "SELinux": _shown(kernel["selinux"]),
            "lockdown": _shown(kernel["lockdown"]),
            **{name: _shown(value) for name, value in kernel["sysctls"].items()},
        },
    )


def _numa(nodes: list[dict[str, Any]]) -> RenderableType:
    rows = [
        [_shown(node["id"]), _shown(node["cpus"]), _size(node["memory"]), _words(node["distances"])] for node in nodes
    ]
    return output.table(["NUMA", "CPUS", "MEMORY", "DISTANCES"], rows)


def _pci(devices: list[dict[str, Any]]) -> RenderableType:
    """Bus masters are marked: ``yes (off)`` could be one, but is not enabled as one now."""
    rows = []
    for device in devices:
        master = device["bus_master"]
        mark = {True: "yes", False: "no", None: "?"}[master["capable"]]
        if master["capable"]:
            mark = output.good(mark) if master["enabled"] else output.warn(f"{mark} (off)")
        rows.append(
            [
                _shown(device["address"]),
                f"{_shown(device['vendor'])}:{_shown(device['device'])}",
                _shown(device["class_name"]),
                _shown(device["driver"]),
                _shown(device["iommu_group"]),
                _shown(device["numa_node"]),
                mark,
                _shown(device["name"]),
            ]
        )
    return output.table(["PCI", "ID", "CLASS", "DRIVER", "IOMMU", "NUMA", "BUS MASTER", "NAME"], rows)


def _nics(nics: list[dict[str, Any]]) -> RenderableType:
    rows = [
        [
            _shown(nic["name"]),
            _shown(nic["kind"]),
            _shown(nic["state"]),
            _shown(nic["mac"]),
            _shown(nic["mtu"]),
            "-" if nic["speed"] is None else f"{nic['speed']} Mbit/s",
            _shown(nic["driver"]),
            _shown(nic["pci"]),
            _words(nic["addresses"]),
        ]
        for nic in nics
    ]
    return output.table(["NIC", "KIND", "STATE", "MAC", "MTU", "SPEED", "DRIVER", "PCI", "ADDRESSES"], rows)


def _shown(value: Any) -> str:
    """A fact as a cell of a table; what is not known is a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == "" else escape(printable(str(value)))


def _words(values: Iterable[Any]) -> str:
    return _shown(" ".join(map(str, values)))


def _size(value: int | None) -> str:
    """Bytes for the eye."""
    if value is None:
        return "-"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}".replace(".0 ", " ")
    return f"{value >> 10} KiB"


# -- doctor ----------------------------------------------------------------------------------------------------------


def doctor(
    host: HostArgument,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
    only: tools.OnlyOption = None,
) -> None:
    """Check by doing whether a host can carry its part of the lab, and say how to mend what cannot."""
    tools.examine_host(host, file, lab_name, output_format, only)
