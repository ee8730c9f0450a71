"""``status``, ``inspect``, ``graph``, ``inventory``, ``ssh-config``: the commands that only look."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType

from orchestrator import reach as reachability
from orchestrator import render
from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.session import (
    EveryOption,
    FileOption,
    GuestSession,
    LabOption,
    OutputOption,
    WatchOption,
    current,
    transports,
    wished,
)
from orchestrator.errors import HostError, NotFoundError
from orchestrator.hosts.opening import reached_by_ssh
from orchestrator.hosts.transport import client
from orchestrator.plan.build import build
from orchestrator.plan.observe import observe
from orchestrator.plan.operations import ObservedLab
from orchestrator.render import GraphFormat
from orchestrator.spec.base import format_size
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab


def register(app: typer.Typer) -> None:
    app.command()(status)
    app.command()(inspect)
    app.command()(reach)
    app.command()(graph)
    app.command()(inventory)
    app.command("ssh-config")(ssh_config)


def _status(lab: ResolvedLab) -> tuple[ObservedLab, dict[str, Any]]:
    with transports(lab) as hosts:
        observed = observe(lab, hosts.values())
    return observed, render.status(lab, observed, build(lab, observed))


def _tables(lab: ResolvedLab, data: dict[str, Any]) -> RenderableType:
    hosts = output.table(
        ["HOST", "KIND", "UNDERLAY", "STATE", "GUESTS"],
        [
            [
                host["name"],
                host["kind"],
                host["underlay"],
                output.good(host["state"]) if host["state"] == "up" else output.bad(host["state"]),
                str(host["guests"]),
            ]
            for host in data["hosts"]
        ],
    )
    guests = output.table(
        ["GUEST", "HOST", "STATE", "VCPUS", "MEMORY", "ACCEL", "IMAGE", "ADDRESSES", "UP"],
        [
            [
                guest["name"],
                guest["host"] if guest["host"] == guest["home"] else f"{guest['host']} (file: {guest['home']})",
                _colored(guest["state"]),
                str(guest["vcpus"]),
                format_size(guest["memory"]),
                guest["accel"],
                guest["image"],
                " ".join(guest["addresses"]),
                _since(guest["since"]),
            ]
            for guest in data["guests"]
        ],
    )
    lines: list[RenderableType] = [hosts, "", guests]
    for guest in data["guests"]:
        if guest["tail"]:
            lines += ["", f"[red]{guest['name']}[/] {guest['reason']}; the end of its console:"]
            lines += [output.dim(f"  │ {line}") for line in guest["tail"]]
    for host in data["hosts"]:
        if host["problem"]:
            lines += ["", output.bad(f"{host['name']}: {host['problem']}")]
    if data["changes"]:
        lines += ["", output.warn(f"{data['changes']} change(s) pending: orchestrator plan")]
    return Group(*lines)


def _colored(state: str) -> str:
    if state == "running":
        return output.good(state)
    return output.warn(state) if state in ("paused", "starting", "off") else output.bad(state)


def _since(moment: float | None) -> str:
    if moment is None:
        return ""
    seconds = int(time.time() - moment)
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


def status(
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
    watch: WatchOption = False,
    every: EveryOption = 2.0,
) -> None:
    """Show the hosts and guests of a lab as they are now."""
    lab, _ = current(file, lab_name)
    if watch and output_format is Format.TABLE:
        output.watch(lambda: _tables(lab, _status(lab)[1]), every)
    observed, data = _status(lab)
    if output_format is not Format.TABLE:
        output.data(data, output_format)
    else:
        output.stdout.print(_tables(lab, data))
    problems = [host.problem for host in observed.hosts.values() if host.problem]
    if output_format is not Format.TABLE:  # which shows them
        for problem in problems:
            output.error(problem)
    if problems:
        raise typer.Exit(HostError.exit_code)


def reach(file: FileOption = None, lab_name: LabOption = None, output_format: OutputOption = Format.TABLE) -> None:
    """Show that the guests reach each other: each one pings each other one, by every address."""
    lab, _ = current(file, lab_name)
    with transports(lab) as hosts, contextlib.ExitStack() as stack:
        agents = {name: stack.enter_context(client(transport)) for name, transport in hosts.items()}

        def execute(guest: ResolvedGuest, argv: list[str], timeout: float) -> Any:
            params = {"guest": guest.name, "argv": argv, "timeout": timeout}
            return agents[guest.host].call("guest.exec", params)

        found = reachability.check(lab, execute)
    if output_format is not Format.TABLE:
        output.data([one.to_json() for one in found], output_format)
    else:
        rows = [
            [
                one.source,
                one.target,
                one.network,
                one.address,
                "across hosts" if one.across_hosts else "same host",
                output.good(f"{one.milliseconds:.1f} ms")
                if one.milliseconds is not None
                else output.bad(one.problem or "no answer"),
            ]
            for one in found
        ]
        output.stdout.print(output.table(["FROM", "TO", "NETWORK", "ADDRESS", "WHERE", "ANSWER"], rows))
    missing = sum(one.milliseconds is None for one in found)
    output.note(f"{len(found) - missing} of {len(found)} answered")
    if missing:
        raise typer.Exit(1)


def inspect(
    guest: Annotated[str | None, typer.Argument(help="A guest; without it the whole lab is shown.")] = None,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.YAML,
    xml: Annotated[bool, typer.Option("--xml", help="The domain's XML as libvirt has it.")] = False,
) -> None:
    """Show everything that is known: the resolved wish and what is observed."""
    if guest is None:
        lab, _ = current(file, lab_name)
        _, data = _status(lab)
        output.data({"wish": lab.model_dump(mode="json"), "observed": data}, _structured(output_format))
        return
    with GuestSession(guest, file, lab_name) as session:
        if xml:
            output.stdout.print(session.call("guest.xml"), markup=False)
            return
        _, data = _status(session.lab)
        observed = next((seen for seen in data["guests"] if seen["name"] == guest), None)
        output.data({"wish": session.guest.model_dump(mode="json"), "observed": observed}, _structured(output_format))


def _structured(chosen: Format) -> Format:
    return Format.YAML if chosen is Format.TABLE else chosen


def graph(
    file: FileOption = None,
    lab_name: LabOption = None,
    kind: Annotated[
        GraphFormat, typer.Option("--format", envvar="ORCHESTRATOR_GRAPH_FORMAT", help="mermaid, dot or svg.")
    ] = GraphFormat.MERMAID,
) -> None:
    """Draw the lab: hosts, networks and guests."""
    try:
        lab, _ = current(file, lab_name)
    except NotFoundError:
        if lab_name is not None:
            raise
        lab, _ = wished(file)
    output.stdout.print(render.graph(lab, kind), markup=False)


def inventory(file: FileOption = None, lab_name: LabOption = None) -> None:
    """Print an Ansible inventory (YAML) of the lab's hosts and guests."""
    lab, state = current(file, lab_name)
    output.data(render.inventory(lab, state, reached_by_ssh(lab)), Format.YAML)


def ssh_config(file: FileOption = None, lab_name: LabOption = None) -> None:
    """Print an ssh_config by which [bold]ssh NAME[/] reaches the guests, and hosts that are machines of their own.

    Use it with: ssh -F <(orchestrator ssh-config) NAME
    """
    lab, state = current(file, lab_name)
    output.stdout.print(render.ssh_config(lab, state, reached_by_ssh(lab)), markup=False)
