"""The QEMU guest agent of a guest: run commands inside.

Protocol: the QEMU Guest Agent Protocol Reference (``guest-exec``, ``guest-exec-status``, ``guest-ping``).
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import libvirt
import libvirt_qemu

from orchestrator.errors import GuestError
from orchestrator.patience import Deadline

MAX_INPUT = 4 << 20
_FIRST_POLL, _LAST_POLL = 0.01, 0.25


@dataclass(frozen=True)
class Output:
    """What a command left: its exit status (128 + N where signal N ended it) and its output."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool


def command(domain: libvirt.virDomain, name: str, arguments: dict[str, Any] | None = None, timeout: int = 20) -> Any:
    """One command of the guest agent's protocol.

    :param timeout: seconds.
    :raise GuestError: the agent is not there, does not answer, or refuses.
    """
    request: dict[str, Any] = {"execute": name}
    if arguments:
        request["arguments"] = arguments
    try:
        answer = libvirt_qemu.qemuAgentCommand(domain, json.dumps(request), timeout, 0)
    except libvirt.libvirtError as error:
        raise GuestError(
            f"guest {domain.name()}: its agent does not do {name}: {error.get_error_message()}",
            hint="the guest needs qemu-guest-agent; `orchestrator console` works without it",
        ) from error
    return json.loads(answer)["return"]


def execute(
    domain: libvirt.virDomain,
    argv: Sequence[str],
    *,
    feed: bytes = b"",
    deadline: Deadline,
    check: Callable[[], None] = lambda: None,
) -> Output:
    """Run ``argv`` in the guest and wait for its end. The protocol has no event for it, so this asks, ever
    less often.

    :param check: called before each question; raises to give up.
    :raise GuestError: no agent, the program is not found, or the deadline passed.
    """
    if len(feed) > MAX_INPUT:
        raise GuestError(f"standard input of {len(feed)} bytes; the limit is {MAX_INPUT}")
    arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
    if feed:
        arguments["input-data"] = base64.b64encode(feed).decode()
    pid = command(domain, "guest-exec", arguments)["pid"]
    pause, interval = threading.Event(), _FIRST_POLL
    while True:
        check()
        status = command(domain, "guest-exec-status", {"pid": pid})
        if status["exited"]:
            break
        if deadline.passed:
            raise GuestError(
                f"guest {domain.name()}: {argv[0]} did not end within {deadline.seconds:.0f} s (pid {pid} there)",
                hint="give it more time with --timeout",
            )
        pause.wait(min(interval, deadline.left))
        interval = min(interval * 1.5, _LAST_POLL)
    code = status.get("exitcode", 128 + int(status.get("signal", 0)))
    return Output(
        status=int(code),
        stdout=base64.b64decode(status.get("out-data", "")),
        stderr=base64.b64decode(status.get("err-data", "")),
        truncated=bool(status.get("out-truncated") or status.get("err-truncated")),
    )
