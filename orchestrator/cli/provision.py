"""``host provision``: make lab hosts of machines."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.progress import Progress
from orchestrator.cli.session import (
    DEFAULT_FILE,
    FileOption,
    LabOption,
    OutputOption,
    complete_hosts,
    current,
    host_of,
    wished,
)
from orchestrator.errors import HostError, StateError
from orchestrator.hosts.model import SshHost
from orchestrator.hosts.opening import open_host
from orchestrator.plan.operations import Impact, Operation
from orchestrator.spec.resolved import ResolvedLab

if TYPE_CHECKING:
    from orchestrator.hosts.provision import Result

NamesArgument = Annotated[list[str], typer.Argument(help="Names of the hosts.", autocompletion=complete_hosts)]
CheckOption = Annotated[bool, typer.Option("--check", help="Change nothing, show what would be changed.")]

SUMMARY = {False: "provision", True: "see what would be changed"}


def provision(
    names: NamesArgument,
    check: CheckOption = False,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Turn machines that SSH reaches into lab hosts: packages, kernel settings, the toolkit and its service.

    A machine that is one already is left as it is. One that fails does not hold up the others.
    """
    from orchestrator.hosts.provision import provision as carry_out  # paramiko takes 0.2 s to import

    from_file = lab_name is None and (file is not None or DEFAULT_FILE.exists())
    lab = wished(file)[0] if from_file else current(None, lab_name)[0]
    targets = {name: _reach(lab, name) for name in names}
    steps = {name: Operation(name, name, f"host {name}", SUMMARY[check], Impact.CREATE, "") for name in targets}
    began = time.monotonic()
    with Progress() as progress, _interruptible() as cancel:
        for step in steps.values():
            progress.begin(step)
        results = carry_out(
            targets, check=check, progress=lambda name, text: progress.progress(steps[name], text), cancel=cancel
        )
        for name, result in results.items():
            progress.end(steps[name], time.monotonic() - began, result.error)
    if output_format is not Format.TABLE:
        output.data([result.to_json() for result in results.values()], output_format)
    else:
        rows = [
            [escape(result.host), _state(result, check), str(result.ok), str(len(result.changes))]
            for result in results.values()
        ]
        output.stdout.print(output.table(["HOST", "STATE", "OK", "CHANGED"], rows))
        for result in results.values():
            for change in result.changes:
                output.stdout.print(f"{output.warn('~')} {escape(result.host)}: {escape(change)}")
    failed = [result.error for result in results.values() if result.error]
    for error in failed:
        output.error(error)
    if failed:
        raise typer.Exit(HostError.exit_code)


def _state(result: Result, check: bool) -> str:
    if result.error:
        return output.bad("failed")
    if check and result.changes:
        return output.warn("would be changed")
    return output.good("ready")


def _reach(lab: ResolvedLab, name: str) -> SshHost:
    """:raise StateError: it is no machine that can be provisioned."""
    host = host_of(lab, name)
    if isinstance(host.spec, SshHost):
        return host.spec
    if host.spec.kind == "local":
        raise StateError(
            f"host {name} is a network namespace of this machine",
            hint="`orchestrator doctor` says what this machine lacks",
        )
    from orchestrator.hosts.vagrant import VagrantTransport

    transport = open_host(lab, name)
    assert isinstance(transport, VagrantTransport)
    with contextlib.closing(transport):
        return transport.reached_by_ssh()


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets."""
    pressed = threading.Event()

    def press(*_: object) -> None:
        if not pressed.is_set():
            output.note("stopping")
        pressed.set()

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
