"""Reachability, shown by doing: every guest asks every other guest on the networks that they share."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab

PINGS = 2
SECONDS_PER_PING = 5
_AVERAGE = re.compile(r"= [0-9.]+/([0-9.]+)/")

Execute = Callable[[ResolvedGuest, list[str], float], Mapping[str, Any]]


@dataclass(frozen=True)
class Reached:
    """One answer, or none. ``milliseconds`` is the mean round-trip time."""

    source: str
    target: str
    network: str
    address: str
    across_hosts: bool
    milliseconds: float | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pairs(lab: ResolvedLab) -> list[tuple[ResolvedGuest, ResolvedGuest, str, str]]:
    """``(source, target, network, address of the target)`` for each two guests with a network in common."""
    return [
        (source, target, nic.network, address)
        for source in lab.guests.values()
        for target in lab.guests.values()
        if source.name != target.name
        for nic in target.nics
        if any(own.network == nic.network for own in source.nics)
        for address in nic.addresses
    ]


def check(lab: ResolvedLab, execute: Execute) -> list[Reached]:
    """Ping along every pair; guests work in parallel, each one's questions one after the other.

    :param execute: runs a command in a guest, as the agent's ``guest.exec``.
    """
    by_source: dict[str, list[tuple[ResolvedGuest, ResolvedGuest, str, str]]] = {}
    for pair in pairs(lab):
        by_source.setdefault(pair[0].name, []).append(pair)
    with ThreadPoolExecutor(max(1, len(by_source)), "reach") as pool:
        found = pool.map(lambda mine: [_ping(execute, *pair) for pair in mine], by_source.values())
    return [one for some in found for one in some]


def _ping(execute: Execute, source: ResolvedGuest, target: ResolvedGuest, network: str, address: str) -> Reached:
    milliseconds: float | None = None
    problem: str | None = None
    argv = ["ping", "-c", str(PINGS), "-i", "0.2", "-W", str(SECONDS_PER_PING), address]
    try:
        result = execute(source, argv, PINGS * SECONDS_PER_PING + 10.0)
        text = base64.b64decode(result["stdout"]).decode(errors="replace")
        match = _AVERAGE.search(text)
        if result["status"] == 0 and match:
            milliseconds = float(match[1])
        else:
            errors = base64.b64decode(result["stderr"]).decode(errors="replace").strip()
            problem = errors.splitlines()[-1] if errors else "no answer"
    except OrchestratorError as error:
        problem = str(error)
    return Reached(
        source=source.name,
        target=target.name,
        network=network,
        address=address,
        across_hosts=source.host != target.host,
        milliseconds=milliseconds,
        problem=problem,
    )
