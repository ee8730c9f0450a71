"""``doctor``, ``schema`` and ``agent``."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.session import (
    FileOption,
    LabOption,
    OutputOption,
    agent_of,
    complete_hosts,
    current,
    host_of,
)
from orchestrator.errors import NotFoundError
from orchestrator.hosts.opening import open_host

if TYPE_CHECKING:
    from orchestrator.doctor import Finding

OnlyOption = Annotated[list[str] | None, typer.Option("--only", help="Only this check; may be repeated.")]


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(schema)


def doctor(
    host: Annotated[
        str | None,
        typer.Argument(help="A host of a lab that is up; without it, this machine.", autocompletion=complete_hosts),
    ] = None,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
    only: OnlyOption = None,
    list_checks: Annotated[
        bool, typer.Option("--list", envvar="ORCHESTRATOR_DOCTOR_LIST", help="List the checks.")
    ] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Remove what dead labs left behind.")] = False,
) -> None:
    """Check by doing whether this machine can carry a lab, and say how to mend what cannot."""
    from orchestrator import doctor as checks

    if list_checks:
        rows = [[name, description] for name, description in checks.list_probes()]
        output.stdout.print(output.table(["CHECK", "WHAT"], rows))
        return
    if clean:
        found = checks.leftovers()
        for line in checks.clean(found):
            output.stdout.print(line, markup=False)
        output.note(output.counted(len(found), "left-over"))
        return
    if host is not None:
        examine_host(host, file, lab_name, output_format, only)
        return
    _check_names(only)
    _report(checks.checkup(only=only), output_format)


def examine_host(
    host: str, file: Path | None, lab_name: str | None, output_format: Format, only: list[str] | None
) -> None:
    """Run the checks on a host of a lab that is up, and report what they find."""
    from orchestrator.doctor import Finding

    _check_names(only)
    lab, _ = current(file, lab_name)
    transport = open_host(lab, host_of(lab, host).name)
    try:
        with agent_of(transport) as agent:
            findings = [Finding.from_json(data) for data in agent.call("host.doctor", {"only": only})]
    finally:
        transport.close()
    _report(findings, output_format)


def _check_names(only: list[str] | None) -> None:
    """:raise NotFoundError: there is no check of such a name."""
    from orchestrator.doctor import list_probes

    unknown = set(only or ()) - {name for name, _ in list_probes()}
    if unknown:
        raise NotFoundError(f"there is no check {', '.join(sorted(unknown))}", hint="orchestrator doctor --list")


def _report(findings: list[Finding], output_format: Format) -> None:
    """Print what was found.

    :raise typer.Exit: with status 1, if something does not work.
    """
    if output_format is not Format.TABLE:
        output.data([finding.to_json() for finding in findings], output_format)
    else:
        for finding in findings:
            sign = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]?[/]"}[finding.ok]
            output.stdout.print(f"{sign} {finding.name:<14} {escape(finding.summary)}")
            for line in finding.detail:
                output.stdout.print(output.dim(f"    {line}"))
            if finding.fix:
                output.stdout.print(f"    [cyan]fix:[/] {escape(finding.fix)}")
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


def schema() -> None:
    """Print the JSON schema of the lab file, for editors."""
    from orchestrator.spec.schema import schema as make

    output.data(make(), Format.JSON)
