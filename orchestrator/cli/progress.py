"""How work under way is shown: live lines on a terminal, one line per finished step elsewhere."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from orchestrator.cli import output
from orchestrator.errors import CancelledError, OrchestratorError
from orchestrator.patience import every
from orchestrator.plan.operations import Operation

REMIND_SECONDS = 10.0
QUIET_SECONDS = 60.0
"""After which a line says again what it said before."""


def _name(operation: Operation) -> str:
    where = f" on {operation.host}" if operation.host and operation.subject != f"host {operation.host}" else ""
    return f"{operation.subject}{where}: {operation.summary}"


@dataclass
class _Work:
    """Something under way. ``text`` is what it does now, ``told`` what a line last said that it does."""

    name: str
    began: float = field(default_factory=time.monotonic)
    text: str = ""
    told: str = ""
    reminded: float = field(default_factory=time.monotonic)

    def reminder(self) -> str | None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self.reminded < (REMIND_SECONDS if self.text != self.told else QUIET_SECONDS):
            return None
        self.reminded, self.told = now, self.text
        return f"… {self.name}{': ' + self.text if self.text else ''} ({now - self.began:.0f} s)"


def _reminding(works: Callable[[], Iterable[_Work]]) -> contextlib.AbstractContextManager[None]:
    """Where nothing can be shown live, write a line about work that takes long."""

    def remind() -> None:
        for line in [work.reminder() for work in works()]:
            if line:
                output.note(line)

    return every(1, remind)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """One piece of work and what it does: a line on a terminal, elsewhere a line when it takes long."""
    if output.stderr.is_terminal and not output.stderr.quiet:
        with output.stderr.status(what) as line:
            yield lambda text: line.update(f"{what}: {text}")
        return
    work = _Work(what)

    def note(text: str) -> None:
        work.text = text

    with _reminding(lambda: [work]):
        yield note


class Progress:
    """Shows operations; a context manager. On a terminal each running one has a line that says what it waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, _Work] = {}
        self._live: Live | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        if output.stderr.is_terminal and not output.stderr.quiet:
            self._live = Live(
                console=output.stderr, get_renderable=self._render, refresh_per_second=8, transient=True
            )
            self._live.start()
        else:
            self._open.enter_context(_reminding(self._works))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()
        self._open.close()

    def pause(self) -> None:
        """Take the live lines away, so that something else can be shown."""
        if self._live:
            self._live.stop()

    def resume(self) -> None:
        if self._live:
            self._live.start()

    def _works(self) -> list[_Work]:
        with self._lock:
            return list(self._running.values())

    def _render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for work in self._works():
            grid.add_row(
                Spinner("dots", style="cyan"),
                escape(work.name),
                output.dim(f"{work.text} ({time.monotonic() - work.began:.0f} s)"),
            )
        return Group(grid)

    def begin(self, operation: Operation) -> None:
        with self._lock:
            self._running[operation.id] = _Work(_name(operation))

    def progress(self, operation: Operation, text: str) -> None:
        with self._lock:
            if work := self._running.get(operation.id):
                work.text = text

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
