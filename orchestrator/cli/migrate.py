"""``migrate``: move a guest to another host as it runs."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from orchestrator.apply import Executor
from orchestrator.cli import output
from orchestrator.cli.lab import carry_out, conclude, confirm
from orchestrator.cli.output import Format
from orchestrator.cli.session import (
    FileOption,
    GuestArgument,
    HostArgument,
    LabOption,
    OutputOption,
    current,
    guest_of,
    host_of,
    look,
    transports,
)
from orchestrator.errors import StateError
from orchestrator.hosts.transport import Transport
from orchestrator.plan.build import build
from orchestrator.plan.moves import hindrance, whereabouts
from orchestrator.plan.operations import MIGRATE, ObservedLab, Operation, Plan
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.state import LabState

ARRIVE, DISCARD = "migration.arrive", "migration.discard"


def migrate(
    guest: GuestArgument,
    host: HostArgument,
    file: FileOption = None,
    lab_name: LabOption = None,
    bandwidth: Annotated[
        int, typer.Option("--bandwidth", min=0, help="MiB/s that it may take at most; 0: no limit.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Lose the guest's snapshots: they cannot move.")] = False,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Move a running guest to another host, with its memory and disks; it goes on as it was.

    It stays there, also after the next [bold]up[/], until the lab file names another host for it than now.
    """
    _, state = current(file, lab_name)
    with state.lock():
        lab = state.get()
        wish = guest_of(lab, guest)
        host_of(lab, host)
        wanted = lab.with_guest(wish.model_copy(update={"host": host}))
        with transports(lab) as hosts:
            observed = look(lab, hosts)
            made = _part_of(build(wanted, observed), guest, host)
            if made is None:
                _check_there(wanted, observed, guest)
                state.save(wanted)
                report = None
            else:
                confirm(made, yes)
                report = _carry_out(made, wanted, state, hosts, bandwidth)
    if output_format is not Format.TABLE:
        output.data(report or {"guest": guest, "target": host}, output_format)
    else:
        output.note(_sentence(report) if report else f"guest {guest} is on host {host}")


def _part_of(made: Plan, guest: str, host: str) -> Plan | None:
    """Of a plan what moves the guest, what that needs, and what tidies up behind it; None where nothing does."""

    def moves(operation: Operation) -> bool:
        there = operation.method == MIGRATE or (operation.method == ARRIVE and operation.host == host)
        return there and operation.params["guest"] == guest

    if not any(moves(operation) for operation in made.operations):
        return None
    part = made.only(moves, after=lambda operation: operation.method.startswith(("port.", "network.")))
    return Plan(part.operations)


def _check_there(lab: ResolvedLab, observed: ObservedLab, guest: str) -> None:
    """:raise OrchestratorError: the guest is not on its host, and cannot get there."""
    host, places = lab.guests[guest].host, whereabouts(observed)
    problems = {name: seen.problem for name, seen in observed.hosts.items() if seen.problem}
    if host in problems:
        raise problems[host]
    unseen = "; ".join(problem.message for problem in problems.values())
    if any(facts.name == guest for facts in places.unclear):
        raise StateError(
            f"guest {guest}: an earlier move was cut short, and its hosts cannot both be asked now: "
            f"{unseen or 'they are still at it'}",
            hint="bring them back, then try again",
        )
    facts = next((facts for facts in places.there if facts.name == guest), None)
    if facts is None:
        raise StateError(f"guest {guest} is nowhere{': ' + unseen if unseen else ''}", hint="orchestrator up")
    if facts.host != host:
        raise StateError(
            f"guest {guest} cannot move as it runs: {hindrance(lab, observed, facts) or 'it is on both hosts'}",
            hint="or change its `host:` in the lab file: `orchestrator up --yes` makes it anew there, from its image",
        )


def _carry_out(
    made: Plan, wanted: ResolvedLab, state: LabState, hosts: Mapping[str, Transport], bandwidth: int
) -> dict[str, Any] | None:
    """How the migration went; None where it only had to be brought to its end.

    :raise OrchestratorError: it failed, or was stopped by the user.
    """
    before = state.get()
    last = [operation for operation in made.operations if operation.method in (MIGRATE, ARRIVE)][-1]

    def done(operation: Operation) -> None:
        if operation is last:
            state.save(wanted)

    executor = Executor(wanted, hosts, [state.public_key()], bandwidth=bandwidth)
    outcome = carry_out(made, executor, done=done)
    if last not in outcome.done:
        _tidy(before, last.params["guest"], state, hosts)
    elif last.method == ARRIVE:
        _tidy(wanted, last.params["guest"], state, hosts)  # what the command that was killed could not
    conclude(outcome, made)
    report: dict[str, Any] | None = outcome.results[last.id] if last.method == MIGRATE else None
    return report


def _tidy(lab: ResolvedLab, guest: str, state: LabState, hosts: Mapping[str, Transport]) -> None:
    """Remove what a guest that is where ``lab`` says needs no longer, on this host or another; what cannot be removed
    now, the next ``up`` removes."""
    subjects = {f"guest {guest}", *(f"network {nic.network}" for nic in lab.guests[guest].nics)}
    made = build(lab, look(lab, hosts)).alone(
        lambda operation: (
            operation.subject in subjects
            and operation.method in (DISCARD, "port.remove", "network.remove", "network.ensure")
        )
    )
    if made:
        carry_out(made, Executor(lab, hosts, [state.public_key()]))


def _sentence(report: Mapping[str, Any]) -> str:
    memory, disks = report["memory_bytes"] >> 20, report["disk_bytes"] >> 20
    sent = f"{memory} MiB of memory in {report['passes']} passes" + (f", {disks} MiB of disks" if disks else "")
    return (
        f"guest {report['guest']} went from {report['source']} to {report['target']} in {report['seconds']:.1f} s "
        f"and stood still for {report['downtime_seconds'] * 1000:.0f} ms; sent: {sent}"
    )
