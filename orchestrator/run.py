"""The gateway to other programs: every process that we start is started here.

A failure tells *not found*, *ended by a signal* and *non-zero exit* apart, and carries the command as a
line that can be pasted into a shell.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from orchestrator.errors import CancelledError, CommandError, OrchestratorError
from orchestrator.patience import Deadline

log = logging.getLogger(__name__)

TAIL_LINES = 15
END_SECONDS = 15.0
NOT_FOUND = 127  # what setpriv exits with when there is no such program, as a shell does

Args = Sequence[str | os.PathLike[str]]


def shell_line(args: Args, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """``args`` as one copy-pasteable shell line, with the variables that were added to the environment."""
    words = [f"{key}={shlex.quote(value)}" for key, value in (env or {}).items()]
    words += [shlex.quote(os.fspath(arg)) for arg in args]
    line = " ".join(words)
    return f"cd {shlex.quote(str(cwd))} && {line}" if cwd else line


def tail_of(text: str | bytes, lines: int = TAIL_LINES) -> list[str]:
    """The last ``lines`` non-empty lines."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def _not_found(args: Args, line: str, hint: str | None) -> CommandError:
    program = os.fspath(args[0])
    return CommandError(f"{program}: not found", command=line, hint=hint or f"install {program}")


def run(
    args: Args,
    *,
    feed: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = 120,
    check: bool = True,
    hint: str | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end and return it with ``stdout`` and ``stderr`` (bytes).

    :param feed: bytes for its standard input.
    :param env: variables added to the environment.
    :param timeout: seconds; the process is killed when they have passed.
    :param check: raise if the program exits with anything but 0.
    :raise CommandError: not found, timed out, ended by a signal, or failed (with ``check``).
    """
    line = shell_line(args, env, cwd)
    log.info("run: %s", line)
    try:
        done = subprocess.run(
            [os.fspath(arg) for arg in args],
            input=feed,
            stdin=subprocess.DEVNULL if feed is None else None,
            capture_output=True,
            env={**os.environ, **env} if env else None,
            cwd=cwd,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        if cwd is not None and not cwd.is_dir():
            raise CommandError(f"{cwd}: no such folder", command=line) from error
        raise _not_found(args, line, hint) from error
    except OSError as error:
        raise CommandError(f"{os.fspath(args[0])}: {str(error.strerror).lower()}", command=line, hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(
            f"{os.fspath(args[0])} did not end within {timeout:.0f} s",
            command=line,
            tail=tail_of((error.stderr or b"") or (error.stdout or b"")),
            hint=hint,
        ) from error
    if check and done.returncode:
        raise CommandError(
            f"{os.fspath(args[0])} {describe_exit(done.returncode)}",
            command=line,
            tail=tail_of(done.stderr or done.stdout),
            hint=hint,
        )
    return done


def describe_exit(code: int) -> str:
    """``failed with exit status N`` or ``was ended by SIGNAME``."""
    if code >= 0:
        return f"failed with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"


def spawn(
    args: Args,
    *,
    env: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    detach: bool = False,
    cwd: Path | None = None,
    hint: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program and return at once.

    :param detach: give it a session of its own, so that it outlives us and our terminal.
    :param cwd: its folder; ours, or ``/`` where it is detached.
    :raise CommandError: the program was not found or may not be run.
    """
    line = shell_line(args, env, cwd)
    log.info("spawn: %s", line)
    try:
        return subprocess.Popen(
            [os.fspath(arg) for arg in args],
            env={**os.environ, **env} if env else None,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=detach,
            cwd=cwd or (Path("/") if detach else None),
        )
    except FileNotFoundError as error:
        raise _not_found(args, line, hint) from error
    except OSError as error:
        raise CommandError(f"{os.fspath(args[0])}: {str(error.strerror).lower()}", command=line, hint=hint) from error


def follow(
    args: Args,
    on_line: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float,
    cancel: threading.Event | None = None,
    hint: str | None = None,
) -> None:
    """Run a program that takes long, and pass on each line that it prints, errors too, as it comes.

    It runs in a session of its own, so that Ctrl-C on our terminal reaches us and not it; with its children it is
    ended, first by SIGINT and after :data:`END_SECONDS` by SIGKILL, when it is cancelled or the time is over.

    :raise CommandError: not found, timed out, ended by a signal, or failed.
    :raise CancelledError: ``cancel`` was set.
    """
    line = shell_line(args, env, cwd)
    # Should we be killed, it is told to end: the kernel does that.
    process = spawn(
        ["setpriv", "--pdeathsig=INT", *args],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        detach=True,
        hint=hint,
    )
    assert process.stdout is not None
    last: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    deadline = Deadline(timeout)
    why: OrchestratorError | None = None
    partial = b""
    with process.stdout as output:
        while why is None:
            ready, _, _ = select.select([output], [], [], 0.2)
            data = os.read(output.fileno(), 1 << 16) if ready else b""
            *lines, partial = (partial + data).split(b"\n")
            for text in (raw.decode(errors="replace").rstrip() for raw in lines):
                if text:
                    last.append(text)
                    on_line(text)
            if not data and (ready or process.poll() is not None):
                break
            if cancel is not None and cancel.is_set():
                why = CancelledError(f"{os.fspath(args[0])} was given up")
            elif deadline.passed:
                message = f"{os.fspath(args[0])} did not end within {timeout:.0f} s"
                why = CommandError(message, command=line, tail=list(last), hint=hint)
    if why is not None:
        _end_group(process)
        raise why
    if code := process.wait():
        if code == NOT_FOUND and shutil.which(os.fspath(args[0])) is None:
            raise _not_found(args, line, hint)
        message = f"{os.fspath(args[0])} {describe_exit(code)}"
        raise CommandError(message, command=line, tail=list(last), hint=hint)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):  # the second one also for children that do not listen
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
