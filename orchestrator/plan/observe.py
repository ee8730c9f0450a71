"""Facts: what every host of a lab says, asked in parallel."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from orchestrator.errors import OrchestratorError, StateError, TakenError
from orchestrator.guests.domain import GuestFacts
from orchestrator.hosts.transport import HostFacts, Transport
from orchestrator.images import labhost, store
from orchestrator.plan.operations import ObservedHost, ObservedLab
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.switch.membership import NetworkFacts

Tell = Callable[[str, str], None]


def observe(
    lab: ResolvedLab, transports: Iterable[Transport], *, holder: Tell | None = None, leaving: bool = False
) -> ObservedLab:
    """What there is now. A host that does not answer is noted, and the others are asked all the same.

    :param holder: given by who holds the lab alone, and told of a host's name and what is done there: calls that
        commands killed a moment ago have left are waited for, and a toolkit that is another than ours is replaced.
    :param leaving: the hosts will be removed: of one that goes with all that is on it nothing more is asked.
    :raise TakenError: a name of ours belongs to somebody else.
    """
    transports = list(transports)
    with ThreadPoolExecutor(max(1, len(transports)), "observe") as pool:
        found = pool.map(lambda transport: observe_host(transport, holder, leaving=leaving), transports)
        hosts = dict(zip((transport.host.name for transport in transports), found, strict=True))
    names = {guest.image for guest in lab.guests.values()}
    if any(host.spec.kind == "vagrant" for host in lab.hosts.values()):
        names.add(labhost.NAME)
    cached = {name: store.find(name, lab.images.get(name), lab.file.parent) for name in names}
    return ObservedLab(hosts=hosts, images={name: image.id if image else None for name, image in cached.items()})


def observe_host(transport: Transport, holder: Tell | None, *, leaving: bool = False) -> ObservedHost:
    """One host: itself, then by its agent the networks and guests. An agent that has died is started again, as only
    it can tell."""
    facts = HostFacts()
    try:
        facts = transport.facts()
        if not facts.present or facts.broken or (leaving and transport.disposable):
            return ObservedHost(facts)
        if facts.outdated and holder:
            transport.ensure(lambda text: holder(transport.host.name, text))
            facts = transport.facts()
        if not facts.agent:
            transport.start_agent()
            facts = replace(facts, agent=True)
        agent = transport.agent()
        if holder:
            agent.call("guest.settle")
        return ObservedHost(
            facts=facts,
            networks=tuple(NetworkFacts.from_json(data) for data in agent.call("network.facts")),
            guests=tuple(GuestFacts.from_json(data) for data in agent.call("guest.facts")),
            migrates=agent.call("migration.able"),
        )
    except (TakenError, StateError):
        raise
    except OrchestratorError as error:
        name = f"host {transport.host.name}: "
        why = error.message.removeprefix(name)
        error.message = name + (
            f"{'; '.join(facts.problems)}; `orchestrator up` mends that ({why})" if facts.outdated else why
        )
        return ObservedHost(problem=error)
