"""What a probe is, and what it finds."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """The answer of one probe.

    :param name: the probe's name; the checkup fills it in.
    :param ok: True: works. False: does not. None: cannot be told or does not matter here; ``summary`` says why.
    :param summary: one sentence.
    :param fix: what to do about it. With ``ok`` True: what would make it better still.
    :param detail: further facts, one a line.
    """

    name: str
    ok: bool | None
    summary: str
    fix: str | None = None
    detail: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        """:raise TypeError: a key is missing or unknown."""
        return cls(**data)


@dataclass(frozen=True)
class Probe:
    """One row of the table of probes.

    :param about: one line that says what is tried.
    :param look: tries it. What it raises becomes a finding with ``ok`` None.
    :param isolated: run in a process of its own, because it changes namespaces, may hang in the kernel, or starts
        threads that nobody ends.
    :param seconds: deadline on a quiet machine.
    """

    name: str
    about: str
    look: Callable[[], Finding]
    isolated: bool = False
    seconds: float = 30.0


def good(summary: str, *detail: str, fix: str | None = None) -> Finding:
    return Finding("", True, summary, fix, list(detail))


def bad(summary: str, fix: str, *detail: str) -> Finding:
    return Finding("", False, summary, fix, list(detail))


def unknown(summary: str, *detail: str, fix: str | None = None) -> Finding:
    return Finding("", None, summary, fix, list(detail))
