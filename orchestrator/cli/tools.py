"""``doctor``, ``schema`` and ``agent``."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.session import FileOption, LabOption, OutputOption, current
from orchestrator.errors import NotFoundError
from orchestrator.hosts.opening import open_host
from orchestrator.hosts.transport import client


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(schema)


def doctor(
    host: Annotated[str | None, typer.Argument(help="A host of a lab that is up; without it, this machine.")] = None,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this check; may be repeated.")] = None,
    list_checks: Annotated[
        bool, typer.Option("--list", envvar="ORCHESTRATOR_DOCTOR_LIST", help="List the checks.")
    ] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Remove what dead labs left behind.")] = False,
) -> None:
    """Check by doing whether this machine can carry a lab, and say how to mend what cannot."""
    from orchestrator import doctor as checks
    from orchestrator.doctor import Finding

    if list_checks:
        rows = [[name, description] for name, description in checks.list_probes()]
        output.stdout.print(output.table(["CHECK", "WHAT"], rows))
        return
    if clean:
        found = checks.leftovers()
        for line in checks.clean(found):
            output.stdout.print(line, markup=False)
        output.note(f"{len(found)} left-overs")
        return
    unknown = set(only or ()) - {name for name, _ in checks.list_probes()}
    if unknown:
        raise NotFoundError(f"there is no check {', '.join(sorted(unknown))}", hint="orchestrator doctor --list")
    if host is None:
        findings = checks.checkup(only=only)
    else:
        lab, _ = current(file, lab_name)
        if host not in lab.hosts:
            raise NotFoundError(f"lab {lab.lab} has no host {host}", hint=f"its hosts: {', '.join(lab.hosts)}")
        transport = open_host(lab, host)
        with client(transport) as agent:
            findings = [Finding.from_json(data) for data in agent.call("host.doctor", {"only": only})]
        transport.close()
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
