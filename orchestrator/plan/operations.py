"""The plan as data: operations that read no state and change nothing until they are carried out."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.guests.domain import GuestFacts
from orchestrator.hosts.transport import HostFacts
from orchestrator.switch.membership import NetworkFacts


class Impact(StrEnum):
    """What carrying an operation out means for what runs."""

    CREATE = "create"
    LIVE = "live"
    RESTART = "restart"
    RECREATE = "recreate"
    REMOVE = "remove"


MIGRATE = "guest.migrate"
"""Move a guest as it runs, from the operation's host: ``{guest, target, image, lose}``, where ``image`` is the id of
the one that it runs from and ``lose`` names snapshots that may be lost."""


@dataclass(frozen=True)
class Undo:
    """The call that takes an operation back."""

    method: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """One step.

    :param id: unique in its plan; ``needs`` of others refer to it.
    :param subject: what it is about, such as ``guest web``; what belongs together is rolled back together.
    :param method: a call of the host's agent; ``host.ensure``, ``host.halt``, ``host.remove``,
        ``image.ensure`` and :data:`MIGRATE`, which takes two hosts, are carried out by the command line.
    :param image: name of the image whose files the call gets as its parameter ``image``.
    :param detail: what differs, one line each, ``key: observed → wished``.
    """

    id: str
    host: str
    subject: str
    summary: str
    impact: Impact
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    detail: tuple[str, ...] = ()
    image: str | None = None
    undo: Undo | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "host": self.host,
            "subject": self.subject,
            "summary": self.summary,
            "impact": self.impact.value,
            "method": self.method,
            "needs": list(self.needs),
            "detail": list(self.detail),
        }


@dataclass(frozen=True)
class ObservedHost:
    """Everything observed of one host. ``problem``, which names the host, is set where it did not answer;
    ``migrates`` says whether it can send and receive guests as they run, and is None where nobody could be asked
    yet."""

    facts: HostFacts = field(default_factory=HostFacts)
    networks: tuple[NetworkFacts, ...] = ()
    guests: tuple[GuestFacts, ...] = ()
    problem: OrchestratorError | None = None
    migrates: bool | None = None


@dataclass(frozen=True)
class ObservedLab:
    """Everything observed. ``images``: name → the cached image's id, None where it must be built or fetched."""

    hosts: Mapping[str, ObservedHost] = field(default_factory=dict)
    images: Mapping[str, str | None] = field(default_factory=dict)

    def guests(self) -> Iterable[GuestFacts]:
        for host in self.hosts.values():
            yield from host.guests


@dataclass(frozen=True)
class Plan:
    """Operations in an order that respects their needs, and the hosts that could not be asked."""

    operations: tuple[Operation, ...]
    unreachable: Mapping[str, OrchestratorError] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.operations)

    def only(self, wanted: Callable[[Operation], bool], after: Callable[[Operation], bool]) -> Plan:
        """The operations that are ``wanted`` with all that they need, and of those that need them the ones that are
        to come ``after`` them and need nothing else."""
        following = {operation.id for operation in self.operations if wanted(operation)}
        chosen = set(following)
        for operation in reversed(self.operations):
            if operation.id in chosen:
                chosen.update(operation.needs)
        for operation in self.operations:
            if after(operation) and following.intersection(operation.needs) and chosen.issuperset(operation.needs):
                following.add(operation.id)
                chosen.add(operation.id)
        return Plan(tuple(operation for operation in self.operations if operation.id in chosen), self.unreachable)

    def alone(self, wanted: Callable[[Operation], bool]) -> Plan:
        """Of the operations that are ``wanted`` those that need no others."""
        chosen: dict[str, Operation] = {}
        for operation in self.operations:
            if wanted(operation) and chosen.keys() >= set(operation.needs):
                chosen[operation.id] = operation
        return Plan(tuple(chosen.values()), self.unreachable)

    def to_json(self) -> dict[str, Any]:
        return {
            "operations": [operation.to_json() for operation in self.operations],
            "unreachable": {host: error.message for host, error in self.unreachable.items()},
        }
