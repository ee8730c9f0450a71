"""Facts: what every host of a lab says, asked in parallel."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from orchestrator.errors import OrchestratorError, StateError, TakenError
from orchestrator.guests.domain import GuestFacts
from orchestrator.hosts.transport import HostFacts, Transport, client
from orchestrator.images import store
from orchestrator.plan.operations import ObservedHost, ObservedLab
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.switch.bridge import NetworkFacts


def observe(lab: ResolvedLab, transports: Iterable[Transport], *, settle: bool = False) -> ObservedLab:
    """What there is now. A host that does not answer is noted, and the others are asked all the same.

    :param settle: wait first for calls that commands killed a moment ago have left; for who holds the lab alone.

    :raise TakenError: a name of ours belongs to somebody else.
    """
    transports = list(transports)
    with ThreadPoolExecutor(max(1, len(transports)), "observe") as pool:
        hosts = dict(pool.map(lambda transport: (transport.host.name, observe_host(transport, settle)), transports))
    names = {guest.image for guest in lab.guests.values()}
    cached = {name: store.find(name, lab.images.get(name), lab.file.parent) for name in names}
    return ObservedLab(hosts=hosts, images={name: image.id if image else None for name, image in cached.items()})


def observe_host(transport: Transport, settle: bool) -> ObservedHost:
    """One host: itself, then by its agent the networks and guests. An agent that has died is started again, as only
    it can tell."""
    try:
        facts = transport.facts()
        if not facts.present or facts.broken:
            return ObservedHost(facts)
        if not facts.agent:
            transport.start_agent()
            facts = HostFacts(present=True, agent=True, problems=facts.problems)
        with client(transport) as agent:
            if settle:
                agent.call("guest.settle")
            return ObservedHost(
                facts=facts,
                networks=tuple(NetworkFacts.from_json(data) for data in agent.call("network.facts")),
                guests=tuple(GuestFacts.from_json(data) for data in agent.call("guest.facts")),
            )
    except (TakenError, StateError):
        raise
    except OrchestratorError as error:
        return ObservedHost(problem=str(error))
