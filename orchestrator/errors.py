"""The one exception tree.

Every error says what failed and, where they are known, the exact command, the last lines of the log or
console that explain it, and a hint: what the reader can do about it. Errors cross the agent's stream:
:meth:`OrchestratorError.to_wire` and :func:`from_wire` keep the class and every field.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

_SHOWN_WIDTH = 100
_SHOWN_PROBLEMS = 50


def printable(text: str) -> str:
    """``text`` on one line and without anything that a terminal would act on."""
    return "".join(
        char if char.isprintable() else " " if char == "\t" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


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

    @classmethod
    def more_from_wire(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The arguments that this class takes beside those of the base class, read from ``data``."""
        return {}


@dataclass(frozen=True, order=True)
class Place:
    """A place in a file. Lines and columns count from 1, columns in characters."""

    file: Path
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a lab file. As text: a block in the style of compilers.

    :param path: the value as ``guests.web.nics[0].ipv4``; empty for the file as a whole.
    :param message: a sentence that says what was found and what was expected.
    :param value: the value that was found, short.
    :param source: the line of the file, to be shown with a caret.
    """

    place: Place
    path: str
    message: str
    value: str | None = None
    expected: str | None = None
    hint: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        lines = [printable(": ".join(filter(None, (str(self.place), self.path, self.message))))]
        if self.source and self.source.strip():
            skipped = max(0, self.place.column - _SHOWN_WIDTH * 3 // 4)
            shown = printable(self.source)[skipped : skipped + _SHOWN_WIDTH].rstrip()
            lines += [
                f"{self.place.line:5} | {shown}",
                f"{'':5} | {' ' * (self.place.column - 1 - skipped)}^",
            ]
        if self.hint:
            lines.append(printable(f"  hint: {self.hint}"))
        return "\n".join(lines)

    def to_wire(self) -> dict[str, Any]:
        place = {"file": str(self.place.file), "line": self.place.line, "column": self.place.column}
        return {**vars(self), "place": place}

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Problem:
        place = data["place"]
        return cls(**{**data, "place": Place(Path(place["file"]), place["line"], place["column"])})


class SpecError(OrchestratorError):
    """The lab file is wrong; the message lists every problem with its place.

    :param problems: the problems one by one; empty where the file could not be read at all.
    """

    exit_code = 3

    def __init__(self, message: str, *, problems: Sequence[Problem] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> SpecError:
        """The error that reports ``problems``."""
        blocks = [str(problem) for problem in problems[:_SHOWN_PROBLEMS]]
        if len(problems) > _SHOWN_PROBLEMS:
            blocks.append(f"... and {len(problems) - _SHOWN_PROBLEMS} more problems")
        return cls("\n".join(blocks), problems=problems)

    def to_wire(self) -> dict[str, Any]:
        return {**super().to_wire(), "problems": [problem.to_wire() for problem in self.problems]}

    @classmethod
    def more_from_wire(cls, data: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"problems": [Problem.from_wire(problem) for problem in data.get("problems", [])]}
        except (KeyError, TypeError):  # the message says it all the same
            return {}


class HostError(OrchestratorError):
    """A host does not answer or cannot do what was asked."""

    exit_code = 4


class HostKeyError(HostError):
    """A host shows another SSH key than the one that is known: it may not be the host that it was."""


class HostLostError(HostError):
    """The connection to a host, or to its agent, broke, or nobody is at the other end."""


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


def from_wire(data: Any) -> OrchestratorError:
    """The error that a peer described; an unknown kind becomes the base class."""
    if not isinstance(data, dict):
        return OrchestratorError(f"the peer reported an error that is none: {str(data)[:200]}")
    cls = _tree(OrchestratorError).get(str(data.get("kind")), OrchestratorError)
    tail, hint, command = data.get("tail"), data.get("hint"), data.get("command")
    return cls(
        str(data.get("message", "the peer reported an error without a message")),
        hint=None if hint is None else str(hint),
        command=None if command is None else str(command),
        tail=[str(line) for line in tail] if isinstance(tail, list) else (),
        **cls.more_from_wire(data),
    )
