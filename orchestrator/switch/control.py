"""Networks: what of the wish is not so, and the operations that make it so."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab, ResolvedNetwork
from orchestrator.switch.membership import Membership, NetworkFacts, differences


def membership(lab: ResolvedLab, network: ResolvedNetwork, host: str) -> Membership:
    """How ``host`` takes part in ``network``."""
    local = lab.hosts[host].spec.kind == "local"
    return Membership(
        network=network,
        local=lab.hosts[host].underlay,
        peers=tuple(lab.hosts[other].underlay for other in network.hosts if other != host),
        forward=("all" if local else "bridge") if network.uplink else "no",
    )


def wanted(lab: ResolvedLab, host: str) -> Iterator[Membership]:
    for network in lab.networks.values():
        if host in network.hosts:
            yield membership(lab, network, host)


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
