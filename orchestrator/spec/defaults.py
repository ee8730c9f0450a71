"""``defaults``: what every guest, network or host has unless it says otherwise."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.spec.explain import explain, fields_of, locate, parts
from orchestrator.spec.model import LabSpec
from orchestrator.spec.node import Node
from orchestrator.spec.report import Report

#: A key under ``defaults`` → the section whose entries it is laid under.
DEFAULTS = {"guest": "guests", "network": "networks", "host": "hosts"}

#: The parts of the lab file whose entries have names.
SECTIONS = [name for name, field in LabSpec.model_fields.items() if get_origin(field.annotation) is dict]


def entry_type(section: str) -> Any:
    """What the entries of a section are: the ``GuestSpec`` of ``dict[Name, GuestSpec]``."""
    return get_args(LabSpec.model_fields[section].annotation)[-1]


def lay_under(root: Node, report: Report) -> Node:
    """The lab without ``defaults``, which are in its entries instead."""
    parts_of_lab = dict(root.value)
    defaults = _defaults(parts_of_lab.pop("defaults", None), report)
    for section in SECTIONS:
        if section not in parts_of_lab:
            continue
        node = parts_of_lab[section].filled()
        if isinstance(node.value, dict):
            default = defaults.get(section)
            entries = {name: _laid(default, entry.filled(), section) for name, entry in node.value.items()}
            node = replace(node, value=entries)
        parts_of_lab[section] = node
    return replace(root, value=parts_of_lab)


def _defaults(node: Node | None, report: Report) -> dict[str, Node]:
    """The checked defaults by section."""
    found: dict[str, Node] = {}
    if node is None or node.value is None:
        return found
    if not isinstance(node.value, dict):
        report.wrong(node, "a mapping")
        return found
    for name, default in node.value.items():
        default = default.filled()
        if name not in DEFAULTS:
            report.unknown(default, DEFAULTS)
        elif not isinstance(default.value, dict):
            report.wrong(default, "a mapping")
        else:
            found[DEFAULTS[name]] = default
            _check(default, entry_type(DEFAULTS[name]), report)
    return found


def _check(default: Node, kind: Any, report: Report) -> None:
    """Report keys that no ``kind`` has, and values that are right for none, whether an entry uses them or not."""
    alternatives = list(parts(kind))
    for key, node in default.value.items():
        holders = [tag for tag, each in alternatives if key in fields_of([(tag, each)])]
        if not holders:
            report.unknown(node, fields_of(alternatives))
            continue
        tries = [{"kind": tag, key: node.plain()} if tag else {key: node.plain()} for tag in holders]
        found = [_errors(kind, data, key) for data in tries]
        for error in found[0] if all(found) else ():
            explain(error, kind, default, report)


def _errors(kind: Any, data: dict[str, Any], key: str) -> list[ErrorDetails]:
    """What is wrong with the value of ``key``; that other keys are missing is not."""
    try:
        TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        return [
            each for each in error.errors() if each["type"] != "missing" and locate(kind, each)[0][:1] in ((key,), ())
        ]
    return []


def _laid(default: Node | None, entry: Node, section: str) -> Node:
    if default is None or not isinstance(entry.value, dict):
        return entry
    alternatives = list(parts(entry_type(section)))
    chosen = default.merged(entry).value.get("kind")
    tag = chosen.value if chosen else alternatives[0][0]
    fields = fields_of([each for each in alternatives if each[0] == tag] or alternatives)
    fitting = {key: node for key, node in default.value.items() if key in fields}
    return replace(default, value=fitting).merged(entry)
