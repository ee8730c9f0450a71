"""Guests that are not where they should be: which of them go there as they run, and where each one really is."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.guests import control
from orchestrator.guests.domain import MIGRATING, GuestFacts
from orchestrator.plan.operations import ObservedHost, ObservedLab
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab


@dataclass(frozen=True)
class Whereabouts:
    """Where guests are, once migrations that were cut short are told from guests.

    :ivar there: each guest, on the host that has it.
    :ivar arrived: guests of ``there`` that only have to go on, and count as if they did: their source has handed
        them over.
    :ivar copies: what is left of migrations whose guest is still on its source.
    :ivar unclear: what may be either, as the source does not answer, or is just at it.
    """

    there: tuple[GuestFacts, ...]
    arrived: tuple[GuestFacts, ...]
    copies: tuple[GuestFacts, ...]
    unclear: tuple[GuestFacts, ...]


def whereabouts(observed: ObservedLab) -> Whereabouts:
    there, arrived, copies, unclear = [], [], [], []
    settled = {(facts.name, facts.host): facts for facts in observed.guests() if facts.arriving_from is None}
    for facts in observed.guests():
        if facts.arriving_from is None:
            continue
        source = observed.hosts.get(facts.arriving_from, ObservedHost())
        kept = settled.get((facts.name, facts.arriving_from))
        if source.problem or (kept or facts).reason == MIGRATING:
            unclear.append(facts)
        elif kept:
            copies.append(facts)
        else:
            state = "running" if facts.state == "paused" else facts.state
            arrived.append(replace(facts, arriving_from=None, state=state, ready=state == "running"))
    doubtful = {facts.name for facts in unclear}
    there = [facts for facts in (*settled.values(), *arrived) if facts.name not in doubtful]
    return Whereabouts(tuple(there), tuple(arrived), tuple(copies), tuple(unclear))


def hindrance(lab: ResolvedLab, observed: ObservedLab, facts: GuestFacts) -> str | None:
    """Why a guest cannot go as it runs to the host where ``lab`` wants it; None where it can."""
    wish = lab.guests[facts.name]
    for name in (facts.host, wish.host):
        if not _migrates(lab, observed.hosts, name):
            return f"host {name} has no libvirtd"
    if not facts.is_on:
        return f"it is {facts.state}"
    if any(nic.get("vhost_user") for nic in facts.wish.get("nics", [])) or any(nic.vhost_user for nic in wish.nics):
        return "a NIC of it is served by vhost-user"
    difference = compare(wish, facts, observed.images)
    if difference.recreate:
        return "its disk is made anew"
    return None


def _migrates(lab: ResolvedLab, hosts: Mapping[str, ObservedHost], name: str) -> bool:
    """A host that is not made yet is taken at its word."""
    seen = hosts.get(name, ObservedHost())
    if seen.migrates is not None:
        return seen.migrates
    host = lab.hosts.get(name) or lab.former_hosts.get(name)
    return host is not None and host.spec.kind != "local" and getattr(host.spec, "libvirt", "system") != "embed"


def compare(wish: ResolvedGuest, facts: GuestFacts, images: Mapping[str, str | None]) -> control.Difference:
    has_disk = facts.wish.get("image") != "tiny" or wish.image != "tiny"
    return control.compare(wish, facts, images.get(wish.image), image_has_disk=has_disk)


def without_unplugged(wish: ResolvedGuest, facts: GuestFacts) -> tuple[GuestFacts, list[str], list[str]]:
    """The guest after the NICs and disks that it is not to keep were unplugged, and which these are: they need not be
    moved first."""
    nics = {nic.mac for nic in wish.nics}
    disks = {disk.name for disk in wish.disks}
    after = replace(
        facts,
        nics=[mac for mac in facts.nics if mac in nics],
        disks=[name for name in facts.disks if name in disks],
    )
    gone = ([mac for mac in facts.nics if mac not in nics], [name for name in facts.disks if name not in disks])
    return after, *gone
