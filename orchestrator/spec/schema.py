"""The JSON schema of the lab file as users write it, for editors and other programs.

It knows keys and the shape of values. It demands less than :func:`orchestrator.spec.load.load`, since what must be
there may come from ``include`` or ``defaults``, and any value may be a variable.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from orchestrator.spec.defaults import DEFAULTS, SECTIONS
from orchestrator.spec.model import LabSpec

Schema = dict[str, Any]

_VARIABLE: Schema = {"$ref": "#/$defs/Variable"}
_NOTHING: Schema = {"type": "null"}


class _WithoutTitles(GenerateJsonSchema):
    """Titles made from names say nothing that the names do not."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> Schema:
    """The JSON schema, draft 2020-12."""
    made = LabSpec.model_json_schema(schema_generator=_WithoutTitles)
    definitions = made.pop("$defs")
    in_lists = {ref for definition in definitions.values() for ref in _item_refs(definition)}
    for name, definition in definitions.items():
        definition.pop("title", None)
        if f"#/$defs/{name}" not in in_lists:  # lists are replaced; mappings may be completed from elsewhere
            definition.pop("required", None)
    sections = {key: _as_written(value) for key, value in made["properties"].items()}
    entries = {}
    for section in SECTIONS:
        pattern, entry = next(iter(sections[section].pop("patternProperties").items()))
        entries[section] = entry
        sections[section] |= {
            "type": ["object", "null"],
            "patternProperties": {pattern: {"anyOf": [entry, _NOTHING]}},
            "additionalProperties": False,
        }
    text = {"type": "string"}
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "Lab file",
        "description": "A lab: hosts, networks, and guests with where their resources come from.",
        "type": "object",
        "properties": {
            "include": {
                "description": "files that this one is laid over, a later one over an earlier one",
                "anyOf": [text, {"type": "array", "items": text}, _NOTHING],
            },
            "defaults": {
                "description": "settings of every guest, network or host that does not say otherwise",
                "type": ["object", "null"],
                "properties": {
                    name: {
                        "description": f"laid under every entry of `{section}`",
                        "anyOf": [entries[section], _NOTHING],
                    }
                    for name, section in DEFAULTS.items()
                },
                "additionalProperties": False,
            },
            **sections,
        },
        "additionalProperties": False,
        "$defs": {
            "Variable": {
                "description": "text with ${NAME} or ${NAME:-default}, from the environment",
                "type": "string",
                "pattern": r"\$\{[A-Za-z_]",
            },
            **{name: _as_written(definition) for name, definition in definitions.items()},
        },
    }


def _item_refs(node: Any) -> Iterator[str]:
    """The definitions that stand for the items of lists below ``node``."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == "items":
            yield from (each["$ref"] for each in (value, *value.get("anyOf", ())) if "$ref" in each)
        yield from _item_refs(value)


def _as_written(node: Any) -> Any:
    """``node`` where a scalar that is not free text may be a variable too."""
    if isinstance(node, list):
        return [_as_written(each) for each in node]
    if not isinstance(node, dict):
        return node
    kept = {
        "anyOf" if key == "oneOf" else key: value if key in ("default", "enum") else _as_written(value)
        for key, value in node.items()
        if not (key == "default" and value in (None, {}, []))
    }
    if isinstance(kept.get("description"), str):
        kept["description"] = kept["description"].replace("``", "`")
    is_free = kept.get("type") == "string" and not {"enum", "const", "pattern", "format"} & kept.keys()
    if kept.get("type") not in ("string", "integer", "boolean") or is_free:
        return kept
    about = {key: kept.pop(key) for key in ("description", "default") if key in kept}
    return {**about, "anyOf": [kept, _VARIABLE]}
