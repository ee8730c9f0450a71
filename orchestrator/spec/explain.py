"""What pydantic found wrong, in plain words and at its place in the file."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import Tag
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.spec.base import Part, format_size
from orchestrator.spec.node import Keys, Node
from orchestrator.spec.report import Report, nearest, show

#: Errors of pydantic's own → what was expected. Our validators say it themselves.
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "list_type": "a list",
    "model_type": "a mapping",
    "path_type": "a path",
    "string_type": "text",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "at least {min_length} entry",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "value_error": "{error}",
}


Alternatives = list[tuple[str | None, Any]]


def parts(annotation: Any, tag: str | None = None) -> Iterator[tuple[str | None, Any]]:
    """The alternatives of a field's type, each with the tag that chooses it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        yield from parts(inner, next((extra.tag for extra in extras if isinstance(extra, Tag)), tag))
    elif origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from parts(each, tag)
    else:
        yield tag, annotation


def fields_of(alternatives: Alternatives) -> dict[str, FieldInfo]:
    """The keys that a mapping of one of these types may have."""
    return {
        field.alias or name: field
        for _, kind in alternatives
        if isinstance(kind, type) and issubclass(kind, Part)
        for name, field in kind.model_fields.items()
    }


def _below(alternatives: Alternatives, step: str | int) -> Alternatives:
    found: Alternatives = []
    if field := fields_of(alternatives).get(str(step)):
        found += parts(field.annotation)
    for _, kind in alternatives:
        origin: Any = get_origin(kind)
        if origin in (dict, list):
            found += parts(get_args(kind)[-1])
    return found


def locate(root: Any, error: ErrorDetails) -> tuple[Keys, Mapping[str, FieldInfo]]:
    """The keys of the value, and the fields of the mapping that holds it.

    Beside keys, pydantic's location names the tags of unions and ``[key]``; the types tell which is which.
    """
    alternatives: Alternatives = list(parts(root))
    keys: list[str | int] = []
    fields: Mapping[str, FieldInfo] = {}
    last = len(error["loc"]) - 1
    for index, step in enumerate(error["loc"]):
        tagged: Alternatives = [(None, kind) for tag, kind in alternatives if tag is not None and tag == step]
        if tagged:
            alternatives = tagged
            continue
        below = _below(alternatives, step)
        if below or (index == last and error["type"] == "extra_forbidden"):
            fields = fields_of(alternatives)
            keys.append(step)
            alternatives = below
    return tuple(keys), fields


def explain(error: ErrorDetails, root: Any, tree: Node, report: Report) -> Keys:
    """Report ``error``, which came from validating ``tree`` as a ``root``; return the keys of the value."""
    keys, fields = locate(root, error)
    node, _ = tree.nearest(keys)
    if error["loc"][-1] == "[key]":
        node = replace(node, value=keys[-1], place=node.key or node.place)
    kind = error["type"]
    expected = _EXPECTED.get(kind, "").format_map(_limits(error.get("ctx", {})))
    if kind == "extra_forbidden":
        report.unknown(node, fields)
    elif kind == "missing" and isinstance(node.value, dict):
        about = fields[str(keys[-1])].description or ""
        report.add(node, f"`{keys[-1]}` is missing: {about}", expected=about, beside_others=True)
    elif kind == "union_tag_invalid":  # the lab file's unions are all told apart by `kind`
        _choice(node.nearest(("kind",))[0], expected, report)
    elif kind == "literal_error":
        _choice(node, expected, report)
    elif kind == "value_error" and isinstance(node.value, dict):
        report.add(node, f"expected {expected}", expected=expected)
    elif expected:
        is_number = kind == "string_type" and isinstance(node.value, (bool, int, float))
        report.wrong(node, expected, hint="put it in quotes" if is_number else None)
    else:
        report.add(node, f"{show(node.value)}: {error['msg']}")
    return keys


def _choice(node: Node, expected: str, report: Report) -> None:
    choices = re.findall("'([^']*)'", expected)
    report.wrong(node, f"one of {', '.join(choices)}" if len(choices) > 1 else expected, nearest(node.value, choices))


def _limits(context: Mapping[str, Any]) -> dict[str, Any]:
    """What pydantic says of the field; a size as a size: no other number of the lab file is that large."""
    return {
        name: format_size(limit) if isinstance(limit, int) and limit >= 1 << 20 else limit
        for name, limit in context.items()
    }
