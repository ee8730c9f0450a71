"""A value of a YAML file that knows its place."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.errors import Place

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Node:
    """One value.

    :param value: a ``dict[str, Node]``, a ``list[Node]`` or a plain scalar.
    :param place: of the value; of its key where the value is a mapping or a list.
    :param keys: how the value is reached in the file that it is written in.
    :param key: the place of the key that it is written under.
    """

    value: Any
    place: Place
    keys: Keys
    key: Place | None = None

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def places(self, keys: Keys = ()) -> Iterator[tuple[Keys, Place]]:
        """The place of every value below and including this one, which is at ``keys``."""
        yield keys, self.place
        if isinstance(self.value, (dict, list)):
            for key, node in self.value.items() if isinstance(self.value, dict) else enumerate(self.value):
                yield from node.places((*keys, key))

    def nearest(self, keys: Keys) -> tuple[Node, Keys]:
        """The value at ``keys``, or the nearest that contains it and the keys that are left."""
        node = self
        for index, key in enumerate(keys):
            below = node._child(key)
            if below is None:
                return node, keys[index:]
            node = below
        return node, ()

    def _child(self, key: str | int) -> Node | None:
        if isinstance(self.value, list):
            return self.value[key] if isinstance(key, int) and 0 <= key < len(self.value) else None
        return self.value.get(key) if isinstance(self.value, dict) else None

    def filled(self) -> Node:
        """An empty mapping in place of nothing: ``hosts:`` with nothing below it, ``a:`` without settings."""
        return replace(self, value={}) if self.value is None else self

    def merged(self, over: Node) -> Node:
        """This value with ``over`` laid over it: mappings are merged deep, everything else is replaced."""
        if not isinstance(self.value, dict):
            return over
        if over.value is None:  # `guests:` with nothing below it takes nothing away
            return self
        if not isinstance(over.value, dict):
            return over
        value = dict(self.value)
        for key, node in over.value.items():
            value[key] = value[key].merged(node) if key in value else node
        return replace(over, value=value)
