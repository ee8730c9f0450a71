"""How work under way is shown: live lines on a terminal, one line per finished step elsewhere."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from orchestrator.cli import output
from orchestrator.errors import CancelledError, OrchestratorError
from orchestrator.plan.operations import Operation

REMIND_SECONDS = 10.0


def _name(operation: Operation) -> str:
    where = f" on {operation.host}" if operation.host and operation.subject != f"host {operation.host}" else ""
    return f"{operation.subject}{where}: {operation.summary}"


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """One piece of work and what it does: a line on a terminal, elsewhere a line when it takes long."""
    if output.stderr.is_terminal and not output.stderr.quiet:
        with output.stderr.status(what) as line:
            yield lambda text: line.update(f"{what}: {text}")
        return
    began = reminded = time.monotonic()

    def note(text: str) -> None:
        nonlocal reminded
        now = time.monotonic()
        if now - reminded > REMIND_SECONDS:
            reminded = now
            output.note(f"… {what}: {text} ({now - began:.0f} s)")

    yield note


class Progress:
    """Shows operations; a context manager. On a terminal each running one has a line that says what it waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Operation, float, str]] = {}
        self._reminded: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if output.stderr.is_terminal and not output.stderr.quiet:
            self._live = Live(
                console=output.stderr, get_renderable=self._render, refresh_per_second=8, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Take the live lines away, so that something else can be shown."""
        if self._live:
            self._live.stop()

    def resume(self) -> None:
        if self._live:
            self._live.start()

    def _render(self) -> RenderableType:
        with self._lock:
            running = list(self._running.values())
        grid = Table.grid(padding=(0, 1))
        for operation, began, text in running:
            grid.add_row(
                Spinner("dots", style="cyan"),
                escape(_name(operation)),
                output.dim(f"{text} ({time.monotonic() - began:.0f} s)"),
            )
        return Group(grid)

    def begin(self, operation: Operation) -> None:
        with self._lock:
            self._running[operation.id] = (operation, time.monotonic(), "")
            self._reminded[operation.id] = time.monotonic()

    def progress(self, operation: Operation, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            if operation.id not in self._running:
                return
            _, began, _ = self._running[operation.id]
            self._running[operation.id] = (operation, began, text)
            remind = self._live is None and now - self._reminded[operation.id] > REMIND_SECONDS
            if remind:
                self._reminded[operation.id] = now
        if remind:
            output.note(f"… {_name(operation)}: {text} ({now - began:.0f} s)")

    def end(self, operation: Operation, seconds: float, error: OrchestratorError | None) -> None:
        with self._lock:
            self._running.pop(operation.id, None)
        name = escape(_name(operation))
        if error is None:
            output.stderr.print(f"[green]✓[/] {name} {output.dim(f'{seconds:.1f} s')}")
        elif isinstance(error, CancelledError):
            output.stderr.print(f"[yellow]↺[/] {name} {output.dim('given up')}")
        else:
            output.stderr.print(f"[red]✗[/] {name} {output.dim(f'{seconds:.1f} s')}")
