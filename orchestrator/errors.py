"""The one exception tree.

Every error says what failed and, where they are known, the exact command, the last lines of the log or
console that explain it, and a hint: what the reader can do about it. Errors cross the agent's stream:
:meth:`OrchestratorError.to_wire` and :func:`from_wire` keep the class and every field.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class OrchestratorError(Exception):
    """Base of all errors that a user may see.

    :param message: one sentence: what failed.
    :param hint: what to do about it.
    :param command: the exact command, ready to paste into a shell.
    :param tail: the last lines of the output, log or console that explain the failure.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        command: str | None = None,
        tail: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.command = command
        self.tail = tuple(tail)

    def to_wire(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "command": self.command,
            "tail": list(self.tail),
        }


class SpecError(OrchestratorError):
    """The lab file is wrong; the message lists every problem with its place."""

    exit_code = 3


class HostError(OrchestratorError):
    """A host does not answer or cannot do what was asked."""

    exit_code = 4


class LockedError(OrchestratorError):
    """Another command is changing the same lab."""

    exit_code = 5


class TakenError(OrchestratorError):
    """A name, port or address that we need belongs to somebody else."""


class CommandError(OrchestratorError):
    """A program that we ran was not found, was ended by a signal, or failed."""


class ImageError(OrchestratorError):
    """An image is missing, damaged or could not be built."""


class NetworkError(OrchestratorError):
    """A link, address or route could not be made."""


class GuestError(OrchestratorError):
    """A guest could not be started, changed, reached or stopped."""


class StateError(OrchestratorError):
    """The thing exists but its present state does not allow what was asked."""


class NotFoundError(OrchestratorError):
    """There is no guest, host, snapshot or image of that name."""


class ProtocolError(OrchestratorError):
    """A peer sent something that the protocol does not allow."""


class CancelledError(OrchestratorError):
    """The work was given up because the user or the caller asked for it."""

    exit_code = 130


class PartialError(OrchestratorError):
    """Some operations failed; everything that did not depend on them was carried out."""


def _tree(base: type[OrchestratorError]) -> dict[str, type[OrchestratorError]]:
    found = {base.__name__: base}
    for child in base.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(data: dict[str, Any]) -> OrchestratorError:
    """The error that a peer described; an unknown kind becomes the base class."""
    cls = _tree(OrchestratorError).get(str(data.get("kind")), OrchestratorError)
    tail = data.get("tail")
    return cls(
        str(data.get("message", "the peer reported an error without a message")),
        hint=data.get("hint"),
        command=data.get("command"),
        tail=[str(line) for line in tail] if isinstance(tail, list) else (),
    )
