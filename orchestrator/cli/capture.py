"""``switch capture``: the frames at a guest's NIC, as pcapng."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.session import FileOption, GuestArgument, GuestSession, LabOption, OutputOption
from orchestrator.errors import HostLostError, NotFoundError, StateError
from orchestrator.hosts.rpc import STEP_SECONDS, Stream
from orchestrator.spec.resolved import ResolvedNic
from orchestrator.switch.pcapng import MAX_SNAP, PACKET, STATISTICS, Blocks, Statistics

STANDARD_OUTPUT = Path("-")
LEAST_SNAP = 64


def capture(
    guest: GuestArgument,
    file: FileOption = None,
    lab_name: LabOption = None,
    nic: Annotated[int, typer.Option("--nic", min=0, help="Number of the NIC, from 0.")] = 0,
    write: Annotated[
        Path, typer.Option("--write", "-w", help="The file to write; -: standard output, for a pipe.")
    ] = STANDARD_OUTPUT,
    count: Annotated[int | None, typer.Option("--count", "-c", min=1, help="End after so many frames.")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0.1, help="End after so long.")] = None,
    snap: Annotated[
        int, typer.Option("--snap", min=LEAST_SNAP, max=MAX_SNAP, help="Bytes of each frame that are kept.")
    ] = MAX_SNAP,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Write what a guest sends and gets as pcapng, until Ctrl-C.

    Example: orchestrator switch capture web | wireshark -k -i -
    """
    if write == STANDARD_OUTPUT and sys.stdout.isatty():
        raise StateError(
            "a capture is no text: it is not written to a terminal",
            hint="name a file with -w, or pipe it: | wireshark -k -i -",
        )
    with GuestSession(guest, file, lab_name) as session:
        tap = _nic(session, nic).tap
        stream = session.open_host(
            "switch.capture",
            {"guest": guest, "tap": tap, "snap": snap, "count": count, "seconds": seconds},
        )
        output.note(f"capturing at {tap} of {guest}; end with Ctrl-C")
        with contextlib.closing(stream), _sink(write) as sink:
            frames, ended = _receive(stream, sink)
    if ended is None:
        output.note(f"{output.counted(frames, 'frame')}; whoever read them has gone")
        return
    if output_format is not Format.TABLE and write != STANDARD_OUTPUT:
        data = {"guest": guest, "tap": tap, "file": str(write), "frames": frames}
        output.data({**data, "dropped": ended.dropped, "ended": ended.comment}, output_format)
    lost = f"; {ended.dropped} more were lost, as they came too fast" if ended.dropped else ""
    output.note(f"{output.counted(frames, 'frame')}: {ended.comment}{lost}")


def _nic(session: GuestSession, number: int) -> ResolvedNic:
    """:raise NotFoundError: the guest has fewer."""
    nics = session.guest.nics
    if number >= len(nics):
        hint = ", ".join(f"{each}: {nic.network}" for each, nic in enumerate(nics)) or "none"
        raise NotFoundError(f"guest {session.guest.name} has no NIC {number}", hint=f"its NICs: {hint}")
    return nics[number]


@contextlib.contextmanager
def _sink(file: Path) -> Iterator[int]:
    """A file descriptor to write to.

    :raise StateError: the file cannot be made.
    """
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        sink = os.dup(1) if file == STANDARD_OUTPUT else os.open(file, flags, 0o666)
    except OSError as error:
        raise _unwritable(error) from error
    try:
        yield sink
    finally:
        os.close(sink)


def _unwritable(error: OSError) -> StateError:
    return StateError(f"the capture cannot be written: {error.strerror}")


@contextlib.contextmanager
def _interrupted() -> Iterator[int]:
    """A file descriptor that can be read after the first Ctrl-C; the second one is as always."""
    readable, writable = os.pipe()

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(writable, b".")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield readable
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(readable)
        os.close(writable)


def _receive(stream: Stream, sink: int) -> tuple[int, Statistics | None]:
    """Write whole blocks as they come: how many frames, and what the host says at the end (None: nobody reads what is
    written).

    :raise HostLostError: the agent ended.
    :raise StateError: there is no room for what comes.
    """
    blocks, frames, ended = Blocks(), 0, None
    poller = select.poll()
    with _interrupted() as interrupted:
        poller.register(interrupted, select.POLLIN)
        poller.register(stream.fileno(), select.POLLIN | select.POLLHUP)
        while True:
            ready = {fd for fd, _ in poller.poll(STEP_SECONDS * 1000)}
            if interrupted in ready:
                poller.unregister(interrupted)
                stream.sendall(b".")  # it answers with the rest
            if stream.fileno() not in ready:
                continue
            data = stream.recv(1 << 18)
            if not data:
                break
            whole = blocks.feed(data)
            frames += sum(block.kind == PACKET for block in whole)
            ended = next((Statistics.of(block) for block in whole if block.kind == STATISTICS), ended)
            try:
                _write(sink, b"".join(block.raw for block in whole))
            except BrokenPipeError:
                return frames, None
            except OSError as error:
                raise _unwritable(error) from error
    if ended is None:
        raise HostLostError("the agent ended during the capture", hint="what has come is written")
    return frames, ended


def _write(sink: int, data: bytes) -> None:
    while data:
        data = data[os.write(sink, data) :]
