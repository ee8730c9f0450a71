"""What the commands print: tables for people, JSON and YAML for programs, errors for both."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from ruamel.yaml import YAML

from orchestrator.errors import OrchestratorError

PIPE_WIDTH = 200  # columns of a table that goes into a pipe or a file

stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else PIPE_WIDTH)


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def configure(*, color: bool, quiet: bool) -> None:
    """Set the consoles up once the global options are known."""
    for console in (stdout, stderr):
        console.no_color = console.no_color or not color
    stderr.quiet = quiet


def data(value: Any, output: Format) -> None:
    """Print ``value`` as JSON or YAML."""
    if output is Format.JSON:
        sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
        return
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(json.loads(json.dumps(value, default=str)), text)
    sys.stdout.write(text.getvalue())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> Table:
    """A table without frames; cells are plain text unless they are marked up by :func:`good` and friends."""
    made = Table(*columns, title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for row in rows:
        made.add_row(*row)
    return made


def watch(look: Callable[[], RenderableType], every: float) -> NoReturn:
    """Show what ``look`` gives again and again until Ctrl-C: in its place on a terminal, else one below the other.

    :param every: seconds between two looks.
    """
    if stdout.is_terminal:
        with Live(look(), console=stdout, screen=True) as live:
            while True:
                time.sleep(every)
                live.update(look(), refresh=True)
    while True:
        stdout.print(look())
        time.sleep(every)


def good(text: str) -> str:
    return f"[green]{escape(text)}[/]"


def bad(text: str) -> str:
    return f"[red]{escape(text)}[/]"


def warn(text: str) -> str:
    return f"[yellow]{escape(text)}[/]"


def dim(text: str) -> str:
    return f"[dim]{escape(text)}[/]"


def note(text: str) -> None:
    """A line for the person at the terminal, beside the result."""
    stderr.print(escape(text))


def counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def removed(sizes: Mapping[str, int], noun: str, plural: str = "") -> None:
    """Say what was removed: name → size in bytes."""
    for name in sizes:
        stdout.print(f"removed {name}", markup=False)
    note(f"{counted(len(sizes), noun, plural)} removed, {sum(sizes.values()) >> 20} MiB freed")


def error(failure: OrchestratorError) -> None:
    """An error with all that it carries. Never suppressed by ``--quiet``."""
    was_quiet, stderr.quiet = stderr.quiet, False
    stderr.print(f"[bold red]error:[/] {escape(failure.message)}")
    for line in failure.tail:
        stderr.print(dim(f"  │ {line}"))
    if failure.command:
        stderr.print(f"  [dim]command:[/] {escape(failure.command)}")
    if failure.hint:
        stderr.print(f"  [cyan]hint:[/] {escape(failure.hint)}")
    stderr.quiet = was_quiet
