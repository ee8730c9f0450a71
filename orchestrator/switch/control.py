"""Networks: what of the wish is not so, and the operations that make it so."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab, ResolvedNetwork
from orchestrator.switch.membership import Listed, Membership, NetworkFacts, differences


def membership(
    lab: ResolvedLab, network: ResolvedNetwork, host: str, still: Mapping[str, str] | None = None
) -> Membership:
    """How ``host`` takes part in ``network``.

    :param still: guest → host that it is on for now, of those that are about to move.
    """
    local = lab.hosts[host].spec.kind == "local"
    return Membership(
        network=network,
        local=lab.hosts[host].underlay,
        peers=tuple(lab.hosts[other].underlay for other in network.hosts if other != host),
        forward=("all" if local else "bridge") if network.uplink else "no",
        listed=tuple(_listed(lab, network.name, still or {})),
    )


def _listed(lab: ResolvedLab, network: str, still: Mapping[str, str]) -> Iterator[Listed]:
    known = {**lab.former_hosts, **lab.hosts}
    for guest in lab.guests.values():
        host = known.get(still.get(guest.name, guest.host))
        if host is not None:
            yield from (Listed(guest.name, host.underlay, nic) for nic in guest.nics if nic.network == network)


def wanted(lab: ResolvedLab, host: str, still: Mapping[str, str] | None = None) -> Iterator[Membership]:
    """How ``host`` takes part in each network that it carries; ``still`` as for :func:`membership`."""
    for network in lab.networks.values():
        if host in network.hosts:
            yield membership(lab, network, host, still)


def unwanted(lab: ResolvedLab, host: str, observed: Sequence[NetworkFacts]) -> list[str]:
    """Networks that are on the host and should not be."""
    names = {member.network.name for member in wanted(lab, host)} if host in lab.hosts else set()
    return [facts.name for facts in observed if facts.name not in names]


def changes(member: Membership, observed: Sequence[NetworkFacts]) -> list[str] | None:
    """Differences; None where the network is not there at all."""
    for facts in observed:
        if facts.name == member.network.name:
            return differences(facts, member)
    return None


def ports_missing(guest: ResolvedGuest, lab: ResolvedLab, observed: Sequence[NetworkFacts]) -> list[str]:
    """Taps that the guest should have and has not."""
    have = {tap for facts in observed for tap in facts.ports}
    return [nic.tap for nic in guest.nics if nic.tap not in have]


def ports_left(guest: str, keep: Sequence[str], observed: Sequence[NetworkFacts]) -> list[str]:
    """Taps of ``guest`` on a host that are not in ``keep``."""
    return [
        tap
        for facts in observed
        for tap, owner in facts.ports.items()
        if owner.partition("/")[0] == guest and tap not in keep
    ]
