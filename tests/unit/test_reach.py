"""Who is asked for whom, and what counts as an answer."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import threading
from typing import Any

import pytest

from orchestrator.errors import GuestError
from orchestrator.reach import Reached, check, pairs
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab
from tests.unit.labs import demo, resolved

ANSWER = """\
PING 10.10.0.2 (10.10.0.2): 56 data bytes
64 bytes from 10.10.0.2: seq=0 ttl=64 time=0.500 ms

2 packets transmitted, 2 packets received, 0% packet loss
round-trip min/avg/max = 0.400/1.250/2.100 ms
"""
ANSWER_OF_IPUTILS = "rtt min/avg/max/mdev = 0.400/1.250/2.100/0.010 ms\n"


def result(status: int = 0, stdout: str = ANSWER, stderr: str = "") -> dict[str, Any]:
    return {
        "status": status,
        "stdout": base64.b64encode(stdout.encode()).decode(),
        "stderr": base64.b64encode(stderr.encode()).decode(),
    }


def two() -> ResolvedLab:
    """``ann`` and ``bob`` share ``lan``; ``eve`` is alone on ``wan``; ``dan`` has no NIC."""
    guests = {
        "ann": {"host": "alpha", "nics": ["lan"]},
        "bob": {"host": "beta", "nics": ["lan", "lan"]},
        "eve": {"host": "beta", "nics": ["wan"]},
        "dan": {"host": "beta"},
    }
    networks = {"lan": {"ipv4": "10.1.0.0/24", "ipv6": "fd01::/64"}, "wan": {"ipv4": "10.2.0.0/24"}}
    return resolved({"lab": "two", "hosts": {"alpha": {}, "beta": {}}, "networks": networks, "guests": guests})


def test_each_guest_asks_each_other_by_every_address_on_a_network_of_both() -> None:
    found = [(source.name, target.name, network, address) for source, target, network, address in pairs(two())]

    assert found == [
        ("ann", "bob", "lan", "10.1.0.3"),
        ("ann", "bob", "lan", "fd01::3"),
        ("ann", "bob", "lan", "10.1.0.4"),
        ("ann", "bob", "lan", "fd01::4"),
        ("bob", "ann", "lan", "10.1.0.2"),
        ("bob", "ann", "lan", "fd01::2"),
    ]


def test_lab_without_two_guests_on_a_network_asks_nothing() -> None:
    assert check(resolved({"lab": "none", "hosts": {"alpha": {}}}), lambda *_: result()) == []


def test_everybody_is_asked_and_answers_are_told() -> None:
    asked: list[tuple[str, str]] = []
    lock = threading.Lock()

    def execute(guest: ResolvedGuest, argv: list[str], timeout: float) -> dict[str, Any]:
        with lock:
            asked.append((guest.name, argv[-1]))
        return result()

    found = check(demo(), execute)

    assert len(found) == len(asked) == 4 * 3 * 2
    assert {one.milliseconds for one in found} == {1.25}
    assert sum(one.across_hosts for one in found) == 2 * 2 * 2 * 2
    assert found[0] == Reached("ann", "bob", "lan", "10.10.0.3", False, 1.25, None)


def test_question_has_more_time_than_its_pings() -> None:
    given: list[tuple[list[str], float]] = []

    check(two(), lambda guest, argv, timeout: given.append((argv, timeout)) or result())

    argv, timeout = given[0]
    assert argv[0] == "ping"
    assert timeout > int(argv[argv.index("-c") + 1]) * int(argv[argv.index("-W") + 1])


@pytest.mark.parametrize(
    ("answer", "milliseconds", "problem"),
    [
        (result(), 1.25, None),
        (result(stdout=ANSWER_OF_IPUTILS), 1.25, None),
        (result(1, ""), None, "no answer"),
        (result(1), None, "no answer"),
        (result(0, "nothing to see"), None, "no answer"),
        (result(2, "", "first\nping: sendto: Network unreachable\n"), None, "ping: sendto: Network unreachable"),
        (result(0, "\xff" + ANSWER), 1.25, None),
    ],
)
def test_answer_is_read_from_ping(answer: dict[str, Any], milliseconds: float | None, problem: str | None) -> None:
    found = check(two(), lambda *_: answer)

    assert {(one.milliseconds, one.problem) for one in found} == {(milliseconds, problem)}


def test_guest_that_cannot_be_asked_is_told_and_spares_the_others() -> None:
    def execute(guest: ResolvedGuest, argv: list[str], timeout: float) -> dict[str, Any]:
        if guest.name == "ann":
            raise GuestError("guest ann: its guest agent is not connected")
        return result()

    found = check(two(), execute)

    assert {(one.source, one.problem) for one in found} == {
        ("ann", "guest ann: its guest agent is not connected"),
        ("bob", None),
    }
    assert found[0].to_json()["milliseconds"] is None
