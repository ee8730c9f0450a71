"""YAML text → a tree of :class:`Node`.

Nothing here knows what a lab is. Variables are replaced while the tree is made, so a value that came from the
environment is always text and never YAML. The bounds on nodes and depth hold for what aliases make of the
text too, and are checked on the way.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from orchestrator.errors import Place
from orchestrator.spec.node import Keys, Node
from orchestrator.spec.report import Report, show

MAX_NODES = 100_000
MAX_DEPTH = 64

_NEWLINE = re.compile("\r\n|[\n\r]")
# Beside what YAML itself forbids: line ends and a byte order mark that the parser does not count consistently.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_VARIABLE = re.compile(r"\$(?:\$|\{[^}]*\}?)")
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-((?:(?!\$\{).)*))?\}", re.DOTALL)
_MAX_DIGITS = 18  # of a number that fits 64 bits
_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}  # a date is text to us


class MalformedError(Exception):
    """The text is not YAML, or more than we read.

    :param line: from 1, as ``column``.
    """

    def __init__(self, message: str, line: int, column: int, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column
        self.hint = hint


@dataclass
class Budget:
    """How many values may still be made."""

    nodes: int = MAX_NODES

    def spend(self, mark: Any) -> None:
        self.nodes -= 1
        if self.nodes < 0:
            raise _malformed(mark, f"more than {MAX_NODES} values (an alias counts each time it is used)")


class _BoundedComposer(Composer):
    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False  # YAML allows it
        self._budget = Budget()

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._budget.spend(self.parser.peek_event().start_mark)
        return super().compose_node(parent, index)


def compose(text: str) -> Any:
    """The parser's own tree of the one document in ``text``; None where there is none.

    The safe loader's composer does: its nodes carry their marks, and nothing is constructed from tags.

    :raise MalformedError: the text is not YAML 1.2, or exceeds the bounds.
    """
    if odd := _FORBIDDEN.search(text):
        raise MalformedError(f"the character {odd[0]!r} is not allowed", *position(text, odd.start()))
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    yaml.max_depth = MAX_DEPTH
    try:
        return yaml.compose(text)
    except MaxDepthExceededError as error:
        raise _malformed(error.problem_mark, f"nested deeper than {MAX_DEPTH} levels") from error
    except MarkedYAMLError as error:
        raise _explain(error) from error


def position(text: str, index: int) -> tuple[int, int]:
    """Line and column, from 1, of the character at ``index``."""
    lines = split_lines(text[:index])
    return len(lines), len(lines[-1]) + 1


def split_lines(text: str) -> list[str]:
    return _NEWLINE.split(text)


def _malformed(mark: Any, message: str, hint: str | None = None) -> MalformedError:
    return MalformedError(message, mark.line + 1, mark.column + 1, hint)


def _explain(error: MarkedYAMLError) -> MalformedError:
    """The parser's complaint in words for somebody who writes YAML and does not parse it."""
    problem = str(error.problem).replace(r"'\x00'", "the end of the file")
    mark = error.problem_mark or error.context_mark
    hint = None
    if "'\\t' that cannot start" in problem:
        problem, hint = "a tab cannot indent", "use spaces"
    elif match := re.match("found character (.+) that cannot start any token", problem):
        problem, hint = f"{match[1]} cannot start a value", "put the text in quotes"
    elif "mapping values are not allowed" in problem:
        problem, hint = "a ':' does not fit here", "check the indentation; text that contains ': ' needs quotes"
    elif match := re.match("expected ',' or '(.)', but got '(?!<stream end)", problem):
        problem = f"expected ',' or '{match[1]}' before this"
        hint = f"what begins in line {error.context_mark.line + 1} may not be closed"
        if mark.buffer[mark.pointer - 1 : mark.pointer + 1] == "${":
            hint = "between { } or [ ], put ${...} in quotes"
    elif "end of stream" in problem or "stream end" in problem:
        problem, mark = "what begins here is never closed", error.context_mark or mark
    elif "expected <block end>" in problem:
        problem, hint = "this does not line up with what is above", "check the indentation"
    elif match := re.match("found undefined alias (.+)", problem):
        problem = f"the alias {match[1]} has no anchor above it"
    elif "another document" in problem:
        problem, hint = "a second document begins here", "a file has one; remove the '---'"
    return _malformed(mark, f"malformed YAML: {problem}", hint)


class Builder:
    """Makes the tree of one file.

    :param text: the content of the file.
    :param environ: the values of variables.
    :param budget: shared by the files of one lab.
    """

    def __init__(self, file: Path, text: str, report: Report, environ: Mapping[str, str], budget: Budget) -> None:
        self._file = file
        self._text = text
        self._report = report
        self._environ = environ
        self._budget = budget

    def build(self) -> Node | None:
        """The tree; None for an empty document.

        Duplicate keys, unset variables and the like are reported, and the tree is made nevertheless.

        :raise MalformedError: see :func:`compose`.
        """
        raw = compose(self._text)
        return None if raw is None else self._node(raw, (), None)

    def _node(self, raw: Any, keys: Keys, key: Place | None) -> Node:
        self._budget.spend(raw.start_mark)
        if len(keys) > MAX_DEPTH:
            raise _malformed(raw.start_mark, f"nested deeper than {MAX_DEPTH} levels")
        place = self._place(raw)
        if isinstance(raw, ScalarNode):
            value = self._scalar(raw, Node(raw.value, place, keys))
            if value is None and key and not raw.value:  # nothing has no place: the parser names what follows
                place = key
            return Node(value, place, keys, key)
        if raw.tag != _TAG + ("map" if isinstance(raw, MappingNode) else "seq"):
            self._report.add(Node({}, place, keys), f"the tag {raw.tag} is not supported")
        if isinstance(raw, SequenceNode):
            value = [self._node(item, (*keys, index), None) for index, item in enumerate(raw.value)]
        else:
            value = self._mapping(raw, keys)
        return Node(value, key or place, keys, key)

    def _mapping(self, raw: MappingNode, keys: Keys) -> dict[str, Node]:
        inherited: dict[str, Node] = {}
        own: dict[str, Node] = {}
        for raw_key, raw_value in raw.value:
            place = self._place(raw_key)
            if not isinstance(raw_key, ScalarNode):
                self._report.add(Node({}, place, keys), "a key must be text")
                continue
            key = raw_key.value
            node = self._node(raw_value, (*keys, key), place)
            if raw_key.tag == _TAG + "merge":
                inherited = {**self._merge_key(node), **inherited}
            elif key in own:
                twin = Node(key, place, node.keys)
                self._report.add(twin, f"the key {show(key)} is here twice; first at {own[key].key}")
            else:
                own[key] = node
        return {**inherited, **own}

    def _merge_key(self, node: Node) -> dict[str, Node]:
        """What ``<<: *anchor`` brings; of several mappings the first wins."""
        merged: dict[str, Node] = {}
        for each in node.value if isinstance(node.value, list) else [node]:
            if isinstance(each.value, dict):
                merged = {**each.value, **merged}
            else:
                self._report.wrong(each, "a mapping to merge")
        return merged

    def _scalar(self, raw: ScalarNode, node: Node) -> Any:
        text, kind = raw.value, str(raw.tag).removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() in ("true", "yes", "on", "y")
            if kind in ("int", "float"):
                return self._number(kind, node)
        except ValueError:
            return text  # a forced tag on text that is no number: the model says what it wants
        if raw.tag not in _TEXT_TAGS:
            self._report.add(node, f"the tag {raw.tag} is not supported")
        # JSON, which is YAML, may write one character as the escapes of two surrogates
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        text = _VARIABLE.sub(lambda match: self._variable(match[0], raw, node), text)
        if odd := _FORBIDDEN.search(text):
            self._report.add(node, f"the character {odd[0]!r} is not allowed")
        return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)

    def _number(self, kind: str, node: Node) -> int | float:
        digits = node.value.replace("_", "").lower()
        if kind == "float":
            return float(digits.replace(".inf", "inf").replace(".nan", "nan"))
        if len(digits) > _MAX_DIGITS:
            self._report.add(node, "the number is too large")
            return 0
        return int(digits, 0 if digits.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)

    def _variable(self, reference: str, raw: ScalarNode, node: Node) -> str:
        """What stands for ``${NAME}``, ``${NAME:-default}`` or ``$$``."""
        if reference == "$$":
            return "$"
        if match := _REFERENCE.fullmatch(reference):
            name, default = match.groups()
            value = self._environ.get(name)
            if default is not None:
                return value or default.replace("$$", "$")
            if value is not None:
                return value
            message = f"the variable {name} is not set"
            hint = f"export {name}, or write ${{{name}:-default}}; $$ gives a dollar sign"
        else:
            message = f"{show(reference)} is not a variable"
            hint = "write ${NAME} or ${NAME:-default}; $$ gives a dollar sign"
        index = self._text.find(reference, raw.start_mark.index, raw.end_mark.index)
        at = Place(self._file, *position(self._text, index)) if index >= 0 else node.place
        self._report.add(replace(node, place=at), message, hint=hint)
        self._report.silence(node.place)
        return ""

    def _place(self, raw: Any) -> Place:
        return Place(self._file, raw.start_mark.line + 1, raw.start_mark.column + 1)
