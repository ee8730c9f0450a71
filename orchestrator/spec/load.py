"""Lab file → :class:`LabSpec`, with the place of every value.

Reading goes on as long as it makes sense, so that one run tells every problem: first the YAML of the file and
of what it includes, then the models, then what must hold between the parts. A problem inside ``defaults`` is
reported there, not for each guest that it reaches.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import Place, Problem, SpecError
from orchestrator.spec.check import check
from orchestrator.spec.defaults import SECTIONS, lay_under
from orchestrator.spec.explain import explain
from orchestrator.spec.model import LabSpec
from orchestrator.spec.node import Keys, Node
from orchestrator.spec.read import Reader, UnreadableError
from orchestrator.spec.report import Report

__all__ = ["LoadedLab", "Place", "Problem", "load"]


@dataclass(frozen=True)
class LoadedLab:
    """A lab file that was read and found right.

    :param file: the absolute path of the lab file. Places name files as they were given.
    :param places: the place of each value; of its key, where the value is a mapping or a list.
    """

    spec: LabSpec
    file: Path
    places: Mapping[Keys, Place] = field(repr=False)
    _tree: Node = field(repr=False, compare=False)
    _report: Report = field(repr=False, compare=False)

    def place_of(self, *keys: str | int) -> Place:
        """The place of a value, or of the nearest mapping or list that would contain it."""
        return self._tree.nearest(keys)[0].place

    def problem(
        self, *keys: str | int, message: str, expected: str | None = None, hint: str | None = None
    ) -> Problem:
        """A problem with the value at ``keys``, to be raised with :meth:`SpecError.of`."""
        return self._report.problem(self._tree.nearest(keys)[0], message, expected=expected, hint=hint)


def load(file: Path, *, environ: Mapping[str, str] = os.environ) -> LoadedLab:
    """Read a lab file.

    :param environ: the values of ``${VAR}``.
    :raise SpecError: the file cannot be read, or something in it is wrong; with all problems at once.
    """
    report = Report()
    reader = Reader(report, environ)
    try:
        root = reader.read(file, ())
    except UnreadableError as error:
        raise SpecError(f"{file}: {error.message}", hint=error.hint or "name the lab file with -f") from error
    if not reader.complete:  # the part that could not be read would seem missing everywhere
        report.check()
    tree = lay_under(root, report)
    spec = _validate(tree, report)
    report.check()
    assert spec is not None, "the report holds what kept the lab from being validated"
    return LoadedLab(spec, file.absolute(), dict(tree.places()), tree, report)


def _validate(tree: Node, report: Report) -> LabSpec | None:
    """The lab, as far as it is right in itself; None where not even that much can be told."""
    data = tree.plain()
    try:
        spec: LabSpec | None = LabSpec.model_validate(data)
    except ValidationError as error:
        spec = _rest([explain(each, LabSpec, tree, report) for each in error.errors()], data)
    if spec is not None:
        check(spec, tree, report)
    return spec


def _rest(wrong: list[Keys], data: dict[str, Any]) -> LabSpec | None:
    """The lab without what is wrong, so that the other parts can be checked against each other.

    Of a guest only the wrong settings are left out. What guests refer to is left out as a whole: a network
    without its wrong CIDR would look like one that has none.
    """
    if any(len(keys) < 2 or keys[0] not in SECTIONS for keys in wrong):
        return None
    for depth in (3, 2):
        cut = {keys[:depth] if keys[0] == "guests" else keys[:2] for keys in wrong}
        rest = {
            section: _pruned(value, (section,), cut) if section in SECTIONS else value
            for section, value in data.items()
        }
        try:
            return LabSpec.model_validate(rest)
        except ValidationError:  # a setting that must be there is wrong, or no host is left
            continue
    return None


def _pruned(value: Any, keys: Keys, cut: set[Keys]) -> Any:
    if not isinstance(value, dict) or len(keys) == 3:
        return value
    return {key: _pruned(each, (*keys, key), cut) for key, each in value.items() if (*keys, key) not in cut}
