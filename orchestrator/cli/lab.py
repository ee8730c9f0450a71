"""``plan``, ``up``, ``down``: the commands that look at a whole lab and change it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.markup import escape

from orchestrator.apply import NEEDS_KEYS, Executor, Outcome, apply
from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.progress import Progress
from orchestrator.cli.session import (
    FileOption,
    LabOption,
    OutputOption,
    current,
    look,
    refuse_other_file,
    transports,
    wished,
)
from orchestrator.errors import (
    CancelledError,
    HostError,
    OrchestratorError,
    PartialError,
    StateError,
)
from orchestrator.guests.control import CONTENTS_REMOVED
from orchestrator.plan import power
from orchestrator.plan.build import build, build_removal
from orchestrator.plan.observe import observe
from orchestrator.plan.operations import MIGRATE, Impact, Operation, Plan
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.state import LabState

COLORS = {
    Impact.CREATE: "green",
    Impact.LIVE: "cyan",
    Impact.RESTART: "yellow",
    Impact.RECREATE: "bold red",
    Impact.REMOVE: "red",
}
SIGNS = {Impact.CREATE: "+", Impact.LIVE: "~", Impact.RESTART: "↻", Impact.RECREATE: "±", Impact.REMOVE: "-"}

JobsOption = Annotated[
    int, typer.Option("--jobs", "-j", min=1, max=256, help="How many operations may be under way at once.")
]
DEFAULT_JOBS = 8


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.command()(up)
    app.command()(down)


def show_plan(made: Plan) -> None:
    for operation in made.operations:
        color = COLORS[operation.impact]
        where = f" on {operation.host}" if operation.host and operation.subject != f"host {operation.host}" else ""
        output.stdout.print(
            f"[{color}]{SIGNS[operation.impact]} {operation.impact.value:<8}[/] "
            f"{escape(operation.subject)}{escape(where)}: {escape(operation.summary)}"
        )
        for line in operation.detail:
            output.stdout.print(output.dim(f"             {line}"))
    for problem in made.unreachable.values():
        output.stdout.print(f"[red]! unreachable[/] {escape(problem.message)}")


def plan(
    file: FileOption = None,
    output_format: OutputOption = Format.TABLE,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with status 10 if there are changes.")] = False,
) -> None:
    """Show what [bold]up[/] would do, and change nothing.

    Each line says what it means for what runs: create, live, restart, recreate (contents are lost) or remove.
    """
    lab, state = wished(file)
    with transports(_with_former(lab, state.load())) as hosts:
        made = build(lab, observe(lab, hosts.values()))
    if output_format is not Format.TABLE:
        output.data(made.to_json(), output_format)
    elif made or made.unreachable:
        show_plan(made)
    else:
        output.note(f"lab {lab.lab} is as its file says")
    _say_where_moved(lab)
    if made.unreachable:
        raise typer.Exit(HostError.exit_code)
    if exit_code and made:
        raise typer.Exit(10)


class _Interrupts:
    """Ctrl-C while a plan is carried out: asks once on a terminal, stops at once elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._pressed = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def press(*_: object) -> None:
            self._pressed = True

        before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> bool:
        if not self._pressed:
            return False
        self._pressed = False
        if not (sys.stdin.isatty() and output.stderr.is_terminal):
            output.note("stopping: what is half-made is rolled back, what is whole stays")
            return True
        self._progress.pause()
        try:
            return self._asked("\nStop? What is half-made is rolled back, what is whole stays. [y/N] ")
        finally:
            self._progress.resume()

    def _asked(self, question: str) -> bool:
        """Yes, also by another Ctrl-C or the end of input.

        Not ``input()``: that one waits on when the signal comes between its question and its read.
        """
        sys.stderr.write(question)
        sys.stderr.flush()
        while not self._pressed:
            if select.select([sys.stdin], [], [], 0.1)[0]:
                answer = sys.stdin.readline()
                return not answer or answer.strip().lower() in ("y", "yes")
        self._pressed = False
        return True


def carry_out(
    made: Plan,
    executor: Executor,
    jobs: int = DEFAULT_JOBS,
    done: Callable[[Operation], None] = lambda _: None,
) -> Outcome:
    """Carry a plan out, and show how it goes."""
    with Progress() as progress:
        interrupts = _Interrupts(progress)
        with interrupts.watching():
            return apply(made, executor, progress, jobs=jobs, stop=interrupts.stop, done=done)


def conclude(outcome: Outcome, made: Plan) -> None:
    """Say what went wrong, if anything.

    :raise OrchestratorError: with the exit status that the command ends with.
    """
    for operation, failure in outcome.failed:
        output.note("")
        output.error(failure)
        dependents = [other.subject for other in outcome.skipped if operation.id in other.needs]
        if dependents:
            output.note(f"  not done because of this: {', '.join(dict.fromkeys(dependents))}")
    for problem in made.unreachable.values():
        output.error(problem)
    if outcome.cancelled:
        for operation in outcome.rolled_back:
            output.note(f"rolled back: {operation.subject}: {operation.summary}")
        raise CancelledError("stopped by the user", hint="`orchestrator up` goes on, `orchestrator down` removes")
    if outcome.failed:
        count = len(outcome.failed)
        raise PartialError(
            f"{output.counted(count, 'operation')} failed, {len(outcome.done)} done, "
            f"{len(outcome.skipped)} not tried",
            hint="mend the cause and run the command again: it does only what is missing",
        )
    if made.unreachable:
        silent = list(made.unreachable)
        raise HostError(
            f"{output.counted(len(silent), 'host')} did not answer: {', '.join(silent)}",
            hint="all the others are done; when the cause is mended, run the command again",
        )


SAYING = {"host.ensure", "network.ensure", *NEEDS_KEYS}
"""Methods whose result is what the user has to know, if anything."""


def _say_what_hosts_lack(outcome: Outcome) -> None:
    """Once for each reason: which hosts are emulated or not, which hosts' guests do not run under KVM, which cannot
    have the switch."""
    hosts: dict[str, list[str]] = {}
    for operation in outcome.done:
        if operation.method in SAYING and (reason := outcome.results.get(operation.id)):
            hosts.setdefault(str(reason), []).append(operation.host)
    for reason, names in hosts.items():
        output.note(f"{', '.join(sorted(set(names)))}: {reason}")


def up(
    file: FileOption = None,
    jobs: JobsOption = DEFAULT_JOBS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Also do what loses contents of disks.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Let this file take over a lab of the same name.")
    ] = False,
) -> None:
    """Make the lab true: create what is missing, change what differs, remove what should not be.

    Run it again at any time: it does only what is missing. Ctrl-C asks once, rolls back what is half-made and keeps
    what is whole.
    """
    began = time.monotonic()
    lab, state = wished(file)
    with state.lock(), transports(before := _with_former(lab, state.load())) as hosts:
        refuse_other_file(state, lab, take_over)
        made = build(lab, look(lab, hosts))
        if not made and not made.unreachable:
            state.save(lab)
            output.note(f"lab {lab.lab} is as its file says: nothing to do ({time.monotonic() - began:.1f} s)")
            return
        confirm(made, yes)
        moving = Moving(before, made, state)
        state.save(moving.lab)
        outcome = carry_out(made, Executor(lab, hosts, [state.public_key()]), jobs, moving.done)
        cleared = {operation.host for operation in outcome.done if operation.method == "host.remove"}
        former = {name: host for name, host in before.former_hosts.items() if name not in cleared}
        state.save(moving.lab.model_copy(update={"former_hosts": former}))
        _say_what_hosts_lack(outcome)
        conclude(outcome, made)
    output.note(
        f"lab {lab.lab} is up: "
        f"{output.counted(len(lab.guests), 'guest')} on {output.counted(len(lab.hosts), 'host')} "
        f"({time.monotonic() - began:.1f} s)"
    )


class Moving:
    """Keeps the state true while guests move: each is where it was until it has moved, so that other commands find
    it, and so that the next ``up`` goes on should this one be killed.

    :ivar lab: the lab as wished, with each guest where it is.
    """

    def __init__(self, lab: ResolvedLab, made: Plan, state: LabState) -> None:
        self.lab, self._after, self._state = lab, lab, state
        for operation in made.operations:
            if operation.method == MIGRATE:
                guest = lab.guests[str(operation.params["guest"])]
                # As if the file had said so: what it says now is then another host, and wins.
                self.lab = self.lab.with_guest(
                    guest.model_copy(update={"host": operation.host, "home": operation.host})
                )

    def done(self, operation: Operation) -> None:
        if operation.method == MIGRATE:
            self.lab = self.lab.with_guest(self._after.guests[str(operation.params["guest"])])
            self._state.save(self.lab)


def _say_where_moved(lab: ResolvedLab) -> None:
    for guest in lab.guests.values():
        if guest.host != guest.home:
            output.note(f"guest {guest.name} was moved to {guest.host}; the file says {guest.home}")


def _with_former(lab: ResolvedLab, before: ResolvedLab | None) -> ResolvedLab:
    """``lab`` with the hosts that are no longer in it but may still carry something."""
    if before is None:
        return lab
    known = {**before.former_hosts, **before.hosts}
    gone = {name: host for name, host in known.items() if name not in lab.hosts}
    return lab.model_copy(update={"former_hosts": gone})


def confirm(made: Plan, yes: bool) -> None:
    """:raise StateError: contents would be lost, and nobody said yes."""
    losing = [
        operation
        for operation in made.operations
        if operation.impact is Impact.RECREATE or any(line.endswith(CONTENTS_REMOVED) for line in operation.detail)
    ]
    if not losing or yes:
        return
    show_plan(Plan(tuple(losing)))
    subjects = ", ".join(dict.fromkeys(operation.subject for operation in losing))
    if sys.stdin.isatty() and typer.confirm(f"The disks of {subjects} are lost. Go on?", default=False):
        return
    raise StateError(f"{subjects}: contents of disks would be lost, as shown above", hint="add --yes")


def down(
    file: FileOption = None,
    lab_name: LabOption = None,
    jobs: JobsOption = DEFAULT_JOBS,
    forget: Annotated[
        bool, typer.Option("--forget", help="Forget the lab even where a host does not answer.")
    ] = False,
    halt: Annotated[
        bool, typer.Option("--halt", help="Only shut guests down and power Vagrant hosts off; all of it stays.")
    ] = False,
) -> None:
    """Remove everything that belongs to the lab, and nothing else. Images stay in the cache.

    Hosts of kind vagrant are destroyed; with --halt nothing is removed, and the next [bold]up[/] starts it all again.
    """
    began = time.monotonic()
    try:
        lab, state = current(file, lab_name)
    except OrchestratorError:
        if lab_name is not None:
            raise
        lab, state = wished(file)  # nothing is remembered: look whether something is there all the same
    with state.lock(), transports(lab) as hosts:
        observed = look(lab, hosts, leaving=not halt)
        if halt:
            made = power.halt(lab, observed)
            conclude(carry_out(made, Executor(lab, hosts, []), jobs), made)
            output.note(f"lab {lab.lab} is off ({time.monotonic() - began:.1f} s): `orchestrator up` starts it again")
            return
        made = build_removal(lab, observed)
        if made:
            outcome = carry_out(made, Executor(lab, hosts, [state.public_key()]), jobs)
            if not outcome.failed and not outcome.cancelled and (forget or not made.unreachable):
                state.remove()
            conclude(outcome, made if not forget else Plan(()))
        elif made.unreachable and not forget:
            conclude(Outcome(), made)
        else:
            state.remove()
    output.note(f"lab {lab.lab} is down ({time.monotonic() - began:.1f} s)")
