"""Collects what is wrong in a lab file, so that everything can be told at once."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import Place, Problem, SpecError
from orchestrator.spec.node import Keys, Node

_SHOWN = 40
_FEW = 20
_LOOKED_AT = 1000  # names among which a near one is looked for


class Report:
    """The problems of one lab file and of what it includes.

    One problem is kept per place: what follows from a wrong value, or is found again through another guest
    that shares a default, adds nothing.

    :ivar sources: the lines of each file that was read, in the order of reading.
    """

    def __init__(self) -> None:
        self.sources: dict[Path, list[str]] = {}
        self._problems: list[Problem] = []
        self._seen: set[object] = set()

    def problem(self, node: Node, message: str, *, expected: str | None = None, hint: str | None = None) -> Problem:
        """A problem with ``node`` and the line of the file beside it; it is not kept."""
        place = node.place
        lines = self.sources.get(place.file, [])
        source = lines[place.line - 1] if place.line <= len(lines) else None
        value = None if isinstance(node.value, (dict, list)) else show(node.value)
        return Problem(place, spell(node.keys), message, value, expected, hint, source)

    def add(
        self,
        node: Node,
        message: str,
        *,
        expected: str | None = None,
        hint: str | None = None,
        beside_others: bool = False,
    ) -> None:
        """Keep a problem with ``node``, unless there is one at its place.

        :param beside_others: several of the kind may have one place, as missing keys have that of the mapping.
        """
        identity = (node.place, message) if beside_others else node.place
        if identity not in self._seen:
            self._seen.add(identity)
            self._problems.append(self.problem(node, message, expected=expected, hint=hint))

    def wrong(self, node: Node, expected: str, hint: str | None = None) -> None:
        """Keep that the value of ``node`` is not what was expected."""
        self.add(node, wrong(node.value, expected), expected=expected, hint=hint)

    def unknown(self, node: Node, known: Collection[str]) -> None:
        """Keep that ``node`` is written under a key that nobody knows."""
        key = replace(node, value=node.keys[-1], place=node.key or node.place)
        self.add(key, "unknown key", expected=", ".join(sorted(known)), hint=nearest_or_all(key.value, known))

    def silence(self, place: Place) -> None:
        """Say nothing about the value at ``place``: it is not known."""
        self._seen.add(place)

    def check(self) -> None:
        """:raise SpecError: there are problems. They come in the order of the files and of their lines."""
        if self._problems:
            order = {file: index for index, file in enumerate(self.sources)}
            raise SpecError.of(sorted(self._problems, key=lambda p: (order.get(p.place.file, 0), p.place)))


def spell(keys: Keys) -> str:
    """``("guests", "web", "nics", 0)`` → ``guests.web.nics[0]``."""
    steps = (f"[{key}]" if isinstance(key, int) else f".{shorten(key)}" for key in keys)
    return "".join(steps).removeprefix(".")


def shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def show(value: Any) -> str:
    """A value of the file as a message names it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    return repr(shorten(value if isinstance(value, str) else str(value).lower()))


def wrong(value: Any, expected: str) -> str:
    """The sentence for a value that is not what was expected."""
    if value is None or isinstance(value, (dict, list)):
        return f"expected {expected}, found {show(value)}"
    return f"{show(value)} is not {expected}"


def nearest(word: object, known: Iterable[str]) -> str | None:
    """A hint with the nearest of ``known``, if one is near."""
    found = difflib.get_close_matches(word, list(known)[:_LOOKED_AT], n=1) if isinstance(word, str) else []
    return f"did you mean {found[0]!r}?" if found else None


def nearest_or_all(word: object, known: Collection[str]) -> str | None:
    """A hint with the nearest of ``known``, or with all of them where they are few."""
    few = 0 < len(known) <= _FEW
    return nearest(word, known) or (f"known: {', '.join(sorted(known))}" if few else None)
