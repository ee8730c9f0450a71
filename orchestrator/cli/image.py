"""``image``: what guests boot from."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator import paths
from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.progress import waiting
from orchestrator.cli.session import DEFAULT_FILE, FileOption, OutputOption
from orchestrator.errors import NotFoundError
from orchestrator.images import disk, store
from orchestrator.images.model import ImageSpec
from orchestrator.spec.load import load
from orchestrator.state import LabState, all_labs

app = typer.Typer(help="Build, list and remove images.", no_args_is_help=True)


def register(parent: typer.Typer) -> None:
    app.command("list")(list_images)
    app.command("build")(build)
    app.command("prune")(prune)
    parent.add_typer(app, name="image")


def list_images(output_format: OutputOption = Format.TABLE) -> None:
    """List the images in the cache."""
    images = store.all_images()
    if output_format is not Format.TABLE:
        output.data([image.to_json() for image in images], output_format)
        return
    used = _in_use()
    rows = [
        [image.id, image.name, f"{image.size >> 20}M", image.created, "in use" if image.id in used else ""]
        for image in images
    ]
    output.stdout.print(output.table(["IMAGE", "NAME", "SIZE", "MADE", ""], rows))


def _named(name: str, file: Path | None) -> tuple[ImageSpec | None, Path]:
    if name in store.BUILT_IN:
        return None, Path.cwd()
    if file is None and not DEFAULT_FILE.exists():
        raise NotFoundError(
            f"there is no image {name}", hint=f"{', '.join(store.BUILT_IN)}, or a name from a lab file given by -f"
        )
    loaded = load(file or DEFAULT_FILE)
    if name not in loaded.spec.images:
        raise NotFoundError(f"{loaded.file} has no image {name}", hint=f"it has: {', '.join(loaded.spec.images)}")
    return loaded.spec.images[name], loaded.file.parent


def build(
    name: Annotated[str, typer.Argument(help="tiny, debian, or a name under `images` of the lab file.")],
    file: FileOption = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Build it anew even if it is there.")] = False,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Build or fetch an image, so that [bold]up[/] need not."""
    spec, base = _named(name, file)
    with waiting(f"image {name}") as progress:
        image = store.ensure(name, spec, base=base, progress=progress, refresh=refresh)
    if output_format is Format.TABLE:
        output.stdout.print(image.id, markup=False)
    else:
        output.data(image.to_json(), output_format)


def _in_use() -> set[str]:
    """Ids of the images that labs with a state may use, for their guests or for their Vagrant hosts."""
    from orchestrator import boxes
    from orchestrator.hosts.vagrantcli import OUR_BOXES

    names = set()
    for name in all_labs():
        lab = LabState(name).load()
        if lab:
            for guest in lab.guests.values():
                image = store.find(guest.image, lab.images.get(guest.image), lab.file.parent)
                if image:
                    names.add(image.id)
    for root in (paths.state() / "labs").glob("*/hosts/*/guests/*/root.qcow2"):
        if base := disk.backing_file(root):  # what a disk lies on may be older than what would be used now
            names.add(base.parent.name)
    return names | {box.removeprefix(OUR_BOXES) for box in boxes.in_use()}


def prune(
    everything: Annotated[
        bool, typer.Option("--all", envvar="ORCHESTRATOR_IMAGE_PRUNE_ALL", help="Also those that are not old.")
    ] = False,
    days: Annotated[float, typer.Option("--days", min=0, help="Remove what is older than this.")] = 30,
) -> None:
    """Remove images that no lab uses, and what broken builds left."""
    removed = store.prune(_in_use(), older_than=None if everything else days * 86400)
    output.removed({image.id: image.size for image in removed}, "image")
