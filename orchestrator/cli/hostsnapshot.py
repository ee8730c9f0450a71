"""``host snapshot``: Vagrant hosts as a whole, to try something and be back in seconds."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.progress import waiting
from orchestrator.cli.session import (
    FileOption,
    LabOption,
    OutputOption,
    agent_of,
    complete_hosts,
    current,
    host_of,
)
from orchestrator.errors import OrchestratorError, StateError
from orchestrator.guests.domain import GuestFacts
from orchestrator.hosts.opening import open_host
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.state import LabState

if TYPE_CHECKING:
    import libvirt

    from orchestrator.hosts.vagrant import VagrantTransport

T = TypeVar("T")

app = typer.Typer(help="Save, restore, list and delete snapshots of Vagrant hosts.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of the snapshot.")]
HostsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Hosts of kind vagrant. Default: all of the lab.", autocompletion=complete_hosts),
]


def register(parent: typer.Typer) -> None:
    app.command()(save)
    app.command()(restore)
    app.command("list")(list_snapshots)
    app.command()(delete)
    parent.add_typer(app, name="snapshot")


@contextlib.contextmanager
def _machines(
    names: Sequence[str] | None, file: Path | None, lab_name: str | None
) -> Iterator[tuple[list[VagrantTransport], LabState]]:
    lab, state = current(file, lab_name)
    with contextlib.ExitStack() as stack:
        opened = [open_host(lab, name) for name in _chosen(lab, names)]
        for transport in opened:
            stack.callback(transport.close)
        yield opened, state  # type: ignore[misc] # _chosen lets only these pass


def _chosen(lab: ResolvedLab, names: Sequence[str] | None) -> list[str]:
    """:raise StateError: a host, or every one, is of another kind."""
    if names:
        for name in names:
            kind = host_of(lab, name).spec.kind
            if kind != "vagrant":
                raise StateError(f"host {name} is of kind {kind}: only hosts of kind vagrant have snapshots")
        return list(names)
    found = [name for name, host in lab.hosts.items() if host.spec.kind == "vagrant"]
    if not found:
        raise StateError(f"lab {lab.lab} has no host of kind vagrant, and only those have snapshots")
    return found


def _each(machines: Sequence[VagrantTransport], action: Callable[[VagrantTransport], T]) -> list[T]:
    with ThreadPoolExecutor(len(machines), "host") as pool:
        return list(pool.map(action, machines))


def _pause_guests(machine: VagrantTransport, dom: libvirt.virDomain, paused: list[str]) -> None:
    """Pause every guest that runs, where a snapshot needs that; ``paused`` tells which, also of a broken-off run."""
    from orchestrator.hosts import machinesnapshots

    if not machinesnapshots.needs_guests_paused(dom):
        return
    with agent_of(machine) as agent:
        for guest in map(GuestFacts.from_json, agent.call("guest.facts")):
            if guest.state == "running":
                paused.append(guest.name)
                agent.call("guest.pause", {"guest": guest.name})


def _resume_guests(machine: VagrantTransport, paused: Sequence[str]) -> None:
    if paused:
        with agent_of(machine) as agent:
            for guest in paused:
                agent.call("guest.resume", {"guest": guest})


def save(name: NameArgument, hosts: HostsArgument = None, file: FileOption = None, lab: LabOption = None) -> None:
    """Take a snapshot of hosts with everything that runs on them; they stand still meanwhile, all at once."""
    from orchestrator.hosts import machinesnapshots

    with _machines(hosts, file, lab) as (machines, state), state.lock(), contextlib.ExitStack() as stack:
        with waiting(f"snapshot {name}") as progress:
            domains = {each.host.name: stack.enter_context(each.machine()) for each in machines}
            for host, dom in domains.items():
                machinesnapshots.check_free(host, dom, name)
            paused: dict[str, list[str]] = {host: [] for host in domains}
            stack.callback(_each, machines, lambda each: _resume_guests(each, paused[each.host.name]))
            progress("pausing guests where that is needed")
            _each(machines, lambda each: _pause_guests(each, domains[each.host.name], paused[each.host.name]))
            try:
                for dom in domains.values():
                    if dom.isActive():
                        dom.suspend()
                progress("saving")
                _each(
                    machines,
                    lambda each: machinesnapshots.save(
                        each.host.name, domains[each.host.name], name, paused[each.host.name]
                    ),
                )
            except BaseException:  # of all hosts, or of none
                for host, dom in domains.items():
                    with contextlib.suppress(OrchestratorError):
                        machinesnapshots.delete(host, dom, name)
                raise
            finally:
                for dom in domains.values():
                    if dom.isActive():
                        dom.resume()
        output.note(f"saved {name} of {', '.join(domains)}")


def restore(name: NameArgument, hosts: HostsArgument = None, file: FileOption = None, lab: LabOption = None) -> None:
    """Put hosts back to a snapshot. What has happened on them since then is lost."""
    with _machines(hosts, file, lab) as (machines, state), state.lock():
        with waiting(f"snapshot {name}") as progress:
            _each(machines, lambda each: _resume_guests(each, each.reset(name, progress)))
        output.note(f"{', '.join(each.host.name for each in machines)}: back at {name}")


def list_snapshots(
    hosts: HostsArgument = None,
    file: FileOption = None,
    lab: LabOption = None,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """List the snapshots of hosts, the oldest first."""
    from orchestrator.hosts import machinesnapshots

    found = []
    with _machines(hosts, file, lab) as (machines, _):
        for each in machines:
            with each.machine() as dom:
                found += machinesnapshots.listed(each.host.name, dom)
    if output_format is not Format.TABLE:
        output.data([one.to_json() for one in found], output_format)
        return
    rows = [[one.host, one.name, datetime.fromtimestamp(one.created).isoformat(sep=" "), one.state] for one in found]
    output.stdout.print(output.table(["HOST", "SNAPSHOT", "MADE", "STATE"], rows))


def delete(name: NameArgument, hosts: HostsArgument = None, file: FileOption = None, lab: LabOption = None) -> None:
    """Delete a snapshot of hosts."""
    from orchestrator.hosts import machinesnapshots

    with _machines(hosts, file, lab) as (machines, state), state.lock():
        for each in machines:
            with each.machine() as dom:
                machinesnapshots.delete(each.host.name, dom, name)
        output.note(f"deleted {name} of {', '.join(each.host.name for each in machines)}")
