"""``box``: what Vagrant hosts are made from."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.progress import waiting
from orchestrator.cli.session import OutputOption

app = typer.Typer(help="Build, list and remove the boxes that Vagrant hosts are made from.", no_args_is_help=True)


def register(parent: typer.Typer) -> None:
    app.command("list")(list_boxes)
    app.command("build")(build)
    app.command("prune")(prune)
    parent.add_typer(app, name="box")


def list_boxes(output_format: OutputOption = Format.TABLE) -> None:
    """List the boxes that are there."""
    from orchestrator import boxes

    found, used = boxes.all_boxes(), boxes.in_use()
    if output_format is not Format.TABLE:
        output.data([{**box.to_json(), "in_use": box.name in used} for box in found], output_format)
        return
    current = boxes.find()
    rows = []
    for box in found:
        notes = ["newest" if box.name == current else "", "in use" if box.name in used else ""]
        notes.append("" if box.known else "not yet known to Vagrant")
        rows.append([box.name, f"{box.size >> 20}M", box.created, ", ".join(filter(None, notes))])
    output.stdout.print(output.table(["BOX", "SIZE", "MADE", ""], rows))


def build(
    refresh: Annotated[bool, typer.Option("--refresh", help="Build it anew, with the newest packages.")] = False,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Build the box from this machine's packages, so that [bold]up[/] need not.

    It has what a lab host needs and nothing else: a kernel with KVM, QEMU, libvirt, an SSH server. It is built once
    for each content; hosts that are there keep the box that they were made from. Needs root, mmdebstrap and Vagrant
    with its libvirt plugin.
    """
    from orchestrator import boxes

    with waiting("box") as progress:
        name = boxes.ensure(progress, refresh=refresh)
    if output_format is Format.TABLE:
        output.stdout.print(name, markup=False)
    else:
        output.data(next(box for box in boxes.all_boxes() if box.name == name).to_json(), output_format)


def prune(
    everything: Annotated[
        bool, typer.Option("--all", envvar="ORCHESTRATOR_BOX_PRUNE_ALL", help="Also the newest one.")
    ] = False,
) -> None:
    """Remove boxes that no host was made from, with their copies in libvirt's storage; the newest one stays."""
    from orchestrator import boxes

    keep = boxes.in_use()
    if not everything and (newest := boxes.find()):
        keep.add(newest)
    output.removed({box.name: box.size for box in boxes.prune(keep)}, "box", "boxes")
