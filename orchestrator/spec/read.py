"""A file and the files that it includes → one tree."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from orchestrator.errors import Place
from orchestrator.spec.node import Node
from orchestrator.spec.report import Report, show, wrong
from orchestrator.spec.yamltree import Budget, Builder, MalformedError, position, split_lines

MAX_BYTES = 1 << 20
MAX_INCLUDE_DEPTH = 16
MAX_FILES = 256


class UnreadableError(Exception):
    """A file cannot be read; the message does not name it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Reader:
    """Reads a file and what it includes into one tree.

    :ivar complete: False when something could not be read or was malformed.
    """

    def __init__(self, report: Report, environ: Mapping[str, str]) -> None:
        self.complete = True
        self._report = report
        self._environ = environ
        self._budget = Budget()
        self._files = 0

    def read(self, file: Path, chain: tuple[Path, ...]) -> Node:
        """The tree of ``file`` laid over those that it includes.

        :param chain: the files that led here.
        :raise UnreadableError: there is no such file, or it is one too many.
        """
        self._files += 1
        if os.path.realpath(file) in map(os.path.realpath, chain):
            loop = " -> ".join(str(each) for each in (*chain, file))
            raise UnreadableError(f"the files include each other: {loop}")
        if self._files > MAX_FILES or len(chain) >= MAX_INCLUDE_DEPTH:
            raise UnreadableError(f"more than {MAX_FILES} files, or includes deeper than {MAX_INCLUDE_DEPTH}")
        raw = _read_bytes(file)
        self._report.sources.setdefault(file, split_lines(raw.decode("utf-8-sig", errors="replace")))
        whole = Node({}, Place(file, 1, 1), ())
        try:
            root = Builder(file, _decode(raw), self._report, self._environ, self._budget).build()
        except MalformedError as error:
            place = Place(file, error.line, error.column)
            return self._skip(replace(whole, place=place), error.message, error.hint)
        if root is None:
            return self._skip(whole, "the file is empty", "a lab has at least `lab:` and `hosts:`")
        if not isinstance(root.value, dict):
            return self._skip(root, wrong(root.value, "a mapping that begins with `lab: NAME`"))
        include = root.value.pop("include", None)
        for node in _each(include):
            if not isinstance(node.value, str):
                self._skip(node, wrong(node.value, "the path of a file"))
                continue
            try:
                whole = whole.merged(self.read(file.parent / node.value, (*chain, file)))
            except UnreadableError as error:
                self._skip(node, f"cannot include {show(node.value)}: {error.message}", error.hint)
        return whole.merged(root)

    def _skip(self, node: Node, message: str, hint: str | None = None) -> Node:
        self.complete = False
        self._report.add(node, message, hint=hint)
        return replace(node, value={})


def _each(include: Node | None) -> list[Node]:
    if include is None or include.value is None:
        return []
    return include.value if isinstance(include.value, list) else [include]


def _read_bytes(file: Path) -> bytes:
    """:raise UnreadableError: the file does not exist, is no file, may not be read, or is too large."""
    try:
        with open(file, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UnreadableError("no such file", _nearby(file.parent, file.name)) from error
    except IsADirectoryError as error:
        raise UnreadableError("is a folder, not a file", _nearby(file, "lab.yaml")) from error
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise UnreadableError(f"larger than {MAX_BYTES >> 20} MiB")
    return raw


def _nearby(folder: Path, name: str) -> str | None:
    """A hint: the YAML file in ``folder`` that was perhaps meant."""
    try:
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    except OSError:
        found = []
    near = difflib.get_close_matches(name, found, n=1) or found[:1]
    return f"did you mean {str(folder / near[0])!r}?" if near else None


def _decode(raw: bytes) -> str:
    """:raise MalformedError: not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig")
        message = f"not UTF-8: the byte 0x{raw[error.start]:02x}"
        raise MalformedError(message, *position(before, len(before)), "save the file as UTF-8") from error
