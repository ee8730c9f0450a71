"""The exception tree, its exit codes, and its way over the agent's stream."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import errors
from orchestrator.errors import OrchestratorError, Place, Problem, SpecError, from_wire, printable

EXIT_CODES = {
    "SpecError": 3,
    "HostError": 4,
    "HostKeyError": 4,
    "HostLostError": 4,
    "LockedError": 5,
    "CancelledError": 130,
}  # all others: 1


def tree(base: type[OrchestratorError] = OrchestratorError) -> list[type[OrchestratorError]]:
    """Our classes; those that tests derive are none."""
    mine = [base] if base.__module__ == errors.__name__ else []
    return mine + [cls for child in base.__subclasses__() for cls in tree(child)]


CLASSES = tree()


def problem(**changes: Any) -> Problem:
    values = {
        "place": Place(Path("lab.yaml"), 3, 5),
        "path": "guests.web.host",
        "message": "'alpah' is not the name of a host",
        "value": "'alpah'",
        "expected": "the name of a host",
        "hint": "did you mean 'alpha'?",
        "source": "    host: alpah",
    }
    return Problem(**values | changes)


def over_the_wire(error: OrchestratorError) -> OrchestratorError:
    return from_wire(json.loads(json.dumps(error.to_wire())))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_class_has_a_docstring_and_the_documented_exit_code(cls: type[OrchestratorError]) -> None:
    assert cls.__doc__
    assert cls.exit_code == EXIT_CODES.get(cls.__name__, 1)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_of_each_class_survives_the_wire(cls: type[OrchestratorError]) -> None:
    error = cls("it broke", hint="mend it", command="qemu -x 'a b'", tail=["one", "two"])

    there = over_the_wire(error)

    assert type(there) is cls
    assert str(there) == "it broke"
    assert (there.message, there.hint, there.command, there.tail) == (
        "it broke",
        "mend it",
        "qemu -x 'a b'",
        ("one", "two"),
    )


def test_error_without_more_than_a_message_survives_the_wire() -> None:
    there = over_the_wire(OrchestratorError("it broke"))

    assert (there.message, there.hint, there.command, there.tail) == ("it broke", None, None, ())


def test_problems_of_a_lab_file_survive_the_wire() -> None:
    error = SpecError.of([problem(), problem(path="", source=None, hint=None)])

    there = over_the_wire(error)

    assert isinstance(there, SpecError)
    assert there.problems == error.problems
    assert str(there) == str(error)


def test_unknown_kind_becomes_the_base_class() -> None:
    there = from_wire({"kind": "FutureError", "message": "from a newer agent"})

    assert type(there) is OrchestratorError
    assert str(there) == "from a newer agent"


@pytest.mark.parametrize("data", [{}, {"kind": None}, {"kind": ["GuestError"], "tail": "text"}, {"tail": None}])
def test_fields_that_are_missing_or_malformed_are_left_out(data: dict[str, Any]) -> None:
    there = from_wire(data)

    assert there.message == "the peer reported an error without a message"
    assert (there.hint, there.command, there.tail) == (None, None, ())


@pytest.mark.parametrize("problems", [None, 1, "text", [1], [{}], [{"place": {}}], [{"place": "x", "nonsense": 1}]])
def test_malformed_problems_are_left_out(problems: Any) -> None:
    there = from_wire({"kind": "SpecError", "message": "wrong", "problems": problems})

    assert isinstance(there, SpecError)
    assert there.problems == ()


@pytest.mark.parametrize("field", ["hint", "command"])
def test_fields_of_another_type_become_text(field: str) -> None:
    there = from_wire({"message": "wrong", field: 7})

    assert getattr(there, field) in (None, "7")


FIELDS = st.none() | st.integers() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.integers())


@given(
    st.dictionaries(
        st.sampled_from(["kind", "message", "hint", "command", "tail", "problems"]),
        FIELDS | st.sampled_from([cls.__name__ for cls in CLASSES]),
    )
)
def test_whatever_a_peer_says_becomes_an_error_of_ours(data: dict[str, Any]) -> None:
    there = from_wire(data)

    assert type(there) in CLASSES
    assert isinstance(there.message, str)
    assert all(isinstance(line, str) for line in there.tail)


# -- problems --------------------------------------------------------------------------------------------------------


def test_problem_reads_like_a_compilers() -> None:
    assert str(problem()).splitlines() == [
        "lab.yaml:3:5: guests.web.host: 'alpah' is not the name of a host",
        "    3 |     host: alpah",
        "      |     ^",
        "  hint: did you mean 'alpha'?",
    ]


def test_caret_stays_under_its_column_in_a_long_line() -> None:
    line = "x" * 300 + "HERE" + "x" * 300
    shown, caret = str(problem(place=Place(Path("f"), 1, 301), source=line)).splitlines()[1:3]

    assert len(shown) < 120
    assert shown[caret.index("^") :].startswith("HERE")


def test_many_problems_are_counted_not_listed() -> None:
    error = SpecError.of([problem(place=Place(Path("f"), line, 1)) for line in range(1, 61)])

    assert len(error.problems) == 60
    assert str(error).endswith("... and 10 more problems")


@given(st.text())
def test_printable_text_is_one_line_without_terminal_control(text: str) -> None:
    shown = printable(text)

    assert len(shown) == len(text)
    assert shown.isprintable()
    assert printable(shown) == shown
