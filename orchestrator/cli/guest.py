"""The commands for one guest: console, exec, ssh, logs, snapshots, its power and its place."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from orchestrator import render
from orchestrator.agent.connect import carry
from orchestrator.apply import Executor
from orchestrator.cli import output
from orchestrator.cli.migrate import migrate
from orchestrator.cli.output import Format
from orchestrator.cli.progress import waiting
from orchestrator.cli.session import (
    FileOption,
    GuestArgument,
    GuestSession,
    LabOption,
    OutputOption,
    current,
    transports,
)
from orchestrator.errors import GuestError, HostError, OrchestratorError
from orchestrator.hosts.rpc import STEP_SECONDS, Stream, read_some
from orchestrator.hosts.transport import client
from orchestrator.spec.base import format_size

ESCAPE = b"\x1d"  # Ctrl-]

TimeoutOption = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait.")]
guest_app = typer.Typer(help="The same as without the word `guest`.", no_args_is_help=True)
snapshot_app = typer.Typer(help="Save a guest's memory and disks, and go back to them.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command()(console)
    app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(execute)
    app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(ssh)
    for command in (connect, logs, events, pause, resume, start, stop, restart, migrate):
        app.command()(command)
    guest_app.command()(migrate)
    app.add_typer(guest_app, name="guest", hidden=True)
    snapshot_app.command("save")(snapshot_save)
    snapshot_app.command("restore")(snapshot_restore)
    snapshot_app.command("list")(snapshot_list)
    snapshot_app.command("delete")(snapshot_delete)
    app.add_typer(snapshot_app, name="snapshot")


# -- console -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSANOW)  # keys typed ahead are kept
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _converse(stream: Stream) -> bool:
    """Keyboard to stream and back, until Ctrl-] (True) or the stream's end (False)."""
    poller = select.poll()
    poller.register(0, select.POLLIN | select.POLLHUP)
    poller.register(stream.fileno(), select.POLLIN | select.POLLHUP)
    while True:
        for fd, _ in poller.poll():
            data = os.read(0, 4096) if fd == 0 else stream.recv(1 << 16)
            if fd == 0:
                before, escape, _ = data.partition(ESCAPE)
                stream.sendall(before)
                if escape:
                    return True
                if not data:
                    poller.unregister(0)
            elif data:
                while data:
                    data = data[os.write(1, data) :]
            else:
                return False


def console(
    guest: GuestArgument,
    file: FileOption = None,
    lab: LabOption = None,
    force: Annotated[bool, typer.Option("--force", help="Take it over from somebody else.")] = False,
) -> None:
    """Sit at the guest's serial console. Leave with Ctrl-]."""
    with GuestSession(guest, file, lab) as session:
        stream = session.open("guest.console", force=force)
        output.note(f"console of {guest}; leave with Ctrl-]")
        try:
            with _raw_terminal():
                left = _converse(stream)
        finally:
            stream.close()
        output.note("" if left else "\nthe console ended: the guest stopped, or somebody took it over")


# -- running things ----------------------------------------------------------------------------------------------


def execute(
    guest: GuestArgument,
    command: Annotated[list[str], typer.Argument(help="The program and its arguments.")],
    file: FileOption = None,
    lab: LabOption = None,
    stdin: Annotated[bool, typer.Option("--stdin", "-i", help="Pass our standard input on.")] = False,
    timeout: TimeoutOption = 60,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Run a program in the guest by its guest agent; ends with the program's own status.

    Example: orchestrator exec web -- ip addr
    """
    command = command[1:] if command[0] == "--" else command
    feed = sys.stdin.buffer.read() if stdin else b""
    with GuestSession(guest, file, lab) as session:
        result = session.call("guest.exec", argv=command, feed=base64.b64encode(feed).decode(), timeout=timeout)
    stdout, stderr = base64.b64decode(result["stdout"]), base64.b64decode(result["stderr"])
    if output_format is Format.TABLE:
        sys.stdout.buffer.write(stdout)
        sys.stdout.flush()
        sys.stderr.buffer.write(stderr)
        if result["truncated"]:
            output.note("the guest agent cut the output short")
    else:
        data = {"status": result["status"], "stdout": stdout.decode(errors="replace")}
        output.data(data | {"stderr": stderr.decode(errors="replace")}, output_format)
    raise typer.Exit(result["status"])


def ssh(
    guest: GuestArgument,
    command: Annotated[list[str] | None, typer.Argument(help="A command; without it, a shell.")] = None,
    file: FileOption = None,
    lab: LabOption = None,
    user: Annotated[str, typer.Option("--user", "-u", help="The user to log in as.")] = "root",
) -> None:
    """Log in to the guest by SSH, through its host's agent; no route to the guest is needed."""
    with GuestSession(guest, file, lab) as session:
        options = render.ssh_arguments(session.guest, session.state) | {"User": user}
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        try:
            os.execvp("ssh", ["ssh", *flags, guest, *(command or [])])
        except FileNotFoundError as error:
            raise GuestError("ssh: not found", hint="install openssh-client") from error


def connect(
    guest: GuestArgument,
    port: Annotated[int, typer.Argument(min=1, max=65535, help="TCP port in the guest.")],
    file: FileOption = None,
    lab: LabOption = None,
) -> None:
    """Carry standard input and output to a TCP port of the guest."""
    with GuestSession(guest, file, lab) as session:
        addresses = [address for nic in session.guest.nics for address in nic.addresses]
        carry(session.open_host("network.connect", {"addresses": addresses, "port": port}))


# -- looking -----------------------------------------------------------------------------------------------------


def logs(
    guest: GuestArgument,
    file: FileOption = None,
    lab: LabOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-F", help="Go on as the guest writes.")] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=0, help="Only the last lines.")] = None,
) -> None:
    """Print the guest's console log since it was last started."""
    with GuestSession(guest, file, lab) as session:
        stream = session.open("guest.log", lines=lines, follow=follow)
        try:
            while data := read_some(stream):
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass
        finally:
            stream.close()


def events(
    file: FileOption = None,
    lab_name: LabOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-F", help="Go on until Ctrl-C.")] = False,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Show what happens to the guests of the lab: starts, stops, crashes, devices. JSON is one object a line."""
    lab, _ = current(file, lab_name)
    lock = threading.Lock()
    ended = threading.Event()
    failures: list[OrchestratorError] = []

    def show(host: str, event: dict[str, Any]) -> None:
        with lock:
            if output_format is Format.TABLE:
                clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
                detail = f" ({event['detail']})" if event["detail"] else ""
                output.stdout.print(f"{clock} {host:<10} {event['guest']:<16} {event['event']}{detail}", markup=False)
            else:
                sys.stdout.write(json.dumps({"host": host, **event}) + "\n")
                sys.stdout.flush()

    def listen(host: str, agent: Any) -> None:
        after = 0
        try:
            while True:
                answer = agent.call("guest.events", {"after": after, "timeout": 30 if follow else 0})
                after = answer["seq"]
                for event in answer["events"]:
                    show(host, event)
                if not follow:
                    return
        except OrchestratorError as error:
            failures.append(error)
            ended.set()

    with transports(lab) as hosts, contextlib.ExitStack() as stack:
        threads = []
        for name, transport in hosts.items():
            agent = stack.enter_context(client(transport))
            threads.append(threading.Thread(target=listen, args=(name, agent), daemon=True))
            threads[-1].start()
        signal.signal(signal.SIGINT, lambda *_: ended.set())
        if follow:
            while not ended.wait(STEP_SECONDS):
                pass
        else:
            for thread in threads:
                thread.join()
    if failures and not isinstance(failures[0], HostError):
        raise failures[0]


# -- power -------------------------------------------------------------------------------------------------------


def pause(guest: GuestArgument, file: FileOption = None, lab: LabOption = None) -> None:
    """Stop the guest's vCPUs; its memory stays."""
    with GuestSession(guest, file, lab) as session:
        session.call("guest.pause")
    output.note(f"guest {guest} is paused")


def resume(guest: GuestArgument, file: FileOption = None, lab: LabOption = None) -> None:
    """Let a paused guest go on."""
    with GuestSession(guest, file, lab) as session:
        session.call("guest.resume")
    output.note(f"guest {guest} goes on")


def _start_call(session: GuestSession, method: str, progress: Any, **params: Any) -> None:
    wish = session.guest
    keys = [session.state.public_key()]
    executor = Executor(session.lab, {wish.host: session.transport}, keys)
    image = asdict(executor.image(wish.image, wish.host, progress))
    data = {"guest": wish.model_dump(mode="json"), "image": image, "keys": keys, **params}
    executor.call(wish.host, method, data, progress)


def start(guest: GuestArgument, file: FileOption = None, lab: LabOption = None) -> None:
    """Start a guest that is off, and wait until it is ready."""
    with GuestSession(guest, file, lab) as session, session.state.lock(), waiting(f"starting {guest}") as progress:
        _start_call(session, "guest.start", progress)
    output.note(f"guest {guest} is up")


def stop(
    guest: GuestArgument,
    file: FileOption = None,
    lab: LabOption = None,
    timeout: TimeoutOption = 20,
    hard: Annotated[bool, typer.Option("--hard", help="Do not ask the guest.")] = False,
) -> None:
    """Shut the guest down; stop it hard when it has not gone after the timeout."""
    with GuestSession(guest, file, lab) as session, session.state.lock(), waiting(f"stopping {guest}") as progress:
        how = session.call("guest.stop", progress, timeout=timeout, hard=hard)
    output.note(f"guest {guest}: {how}")


def restart(
    guest: GuestArgument,
    file: FileOption = None,
    lab: LabOption = None,
    timeout: TimeoutOption = 20,
    hard: Annotated[bool, typer.Option("--hard", help="Do not ask the guest.")] = False,
) -> None:
    """Stop the guest, start it again and wait until it is ready."""
    with GuestSession(guest, file, lab) as session, session.state.lock(), waiting(f"restarting {guest}") as progress:
        _start_call(session, "guest.restart", progress, timeout=timeout, hard=hard)
    output.note(f"guest {guest} is up")


# -- snapshots ---------------------------------------------------------------------------------------------------

SnapshotArgument = Annotated[str, typer.Argument(help="Name of the snapshot.")]


def snapshot_save(
    guest: GuestArgument,
    name: SnapshotArgument,
    file: FileOption = None,
    lab: LabOption = None,
    description: Annotated[str, typer.Option("--description", "-d", help="What it is for.")] = "",
) -> None:
    """Save the guest's memory and disks; it stands still for as long as that takes, then goes on."""
    with (
        GuestSession(guest, file, lab) as session,
        session.state.lock(),
        waiting(f"snapshot {name} of {guest}") as progress,
    ):
        saved = session.call("guest.snapshot_save", progress, name=name, description=description)
    output.note(f"snapshot {name} of {guest}: {saved['size'] >> 20} MiB of memory, {len(saved['disks'])} disks")


def snapshot_restore(
    guest: GuestArgument, name: SnapshotArgument, file: FileOption = None, lab: LabOption = None
) -> None:
    """Put the guest back to where it was; what it did since then is lost."""
    with (
        GuestSession(guest, file, lab) as session,
        session.state.lock(),
        waiting(f"snapshot {name} of {guest}") as progress,
    ):
        session.call("guest.snapshot_restore", progress, name=name)
    output.note(f"guest {guest} is back at {name}")


def snapshot_list(
    guest: GuestArgument,
    file: FileOption = None,
    lab: LabOption = None,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """List the guest's snapshots, oldest first."""
    with GuestSession(guest, file, lab) as session:
        found = session.call("guest.snapshots")
    if output_format is not Format.TABLE:
        output.data(found, output_format)
        return
    rows = [
        [
            snapshot["name"],
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["created"])),
            format_size(snapshot["size"] >> 20 << 20),
            " ".join(snapshot["disks"]),
            snapshot["description"],
        ]
        for snapshot in found
    ]
    output.stdout.print(output.table(["SNAPSHOT", "SAVED", "MEMORY", "DISKS", "DESCRIPTION"], rows))


def snapshot_delete(
    guest: GuestArgument, name: SnapshotArgument, file: FileOption = None, lab: LabOption = None
) -> None:
    """Remove a snapshot."""
    with GuestSession(guest, file, lab) as session:
        session.call("guest.snapshot_delete", name=name)
    output.note(f"snapshot {name} of {guest} is removed")
