"""Wish and facts → plan. A pure function: the tests give it both as data."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.guests import control as guests
from orchestrator.guests.domain import GuestFacts
from orchestrator.plan.operations import Impact, ObservedHost, ObservedLab, Operation, Plan, Undo
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab
from orchestrator.switch import control as switch

NOTHING = ObservedHost()


def build(lab: ResolvedLab, observed: ObservedLab) -> Plan:
    """The operations that make ``lab`` true.

    :param observed: of every host of ``lab``, and of every host that the lab had before.
    """
    planner = _Planner(lab, observed)
    for seen in observed.guests():
        planner.remove_guest_if_unwanted(seen)
    for host in observed.hosts:
        planner.drop_orphan_ports(host)
    for host in lab.hosts:
        planner.host(host)
        planner.networks(host)
    for image in dict.fromkeys(guest.image for guest in lab.guests.values()):
        planner.image(image)
    for guest in lab.guests.values():
        planner.guest(guest)
    for host in observed.hosts:
        planner.leave(host)
    return Plan(
        operations=tuple(planner.operations),
        unreachable={name: host.problem for name, host in observed.hosts.items() if host.problem},
    )


def build_removal(lab: ResolvedLab, observed: ObservedLab) -> Plan:
    """The operations that remove everything of ``lab``."""
    empty = lab.model_copy(update={"hosts": {}, "networks": {}, "guests": {}})
    return build(empty, observed)


class _Planner:
    def __init__(self, lab: ResolvedLab, observed: ObservedLab) -> None:
        self.lab = lab
        self.observed = observed
        self.operations: list[Operation] = []
        self._ids: set[str] = set()

    def _add(self, operation: Operation) -> str:
        self.operations.append(operation)
        self._ids.add(operation.id)
        return operation.id

    def _those(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Of ``ids``, those that are in the plan: what needs no change need not be waited for."""
        return tuple(name for name in ids if name in self._ids)

    def _seen(self, host: str) -> ObservedHost:
        return self.observed.hosts.get(host, NOTHING)

    def _reachable(self, host: str) -> bool:
        return self._seen(host).problem is None

    # -- hosts, networks, images ---------------------------------------------------------------------------------

    def host(self, name: str) -> None:
        if not self._reachable(name):
            return
        facts = self._seen(name).facts
        if facts.present and facts.agent and not facts.problems:
            return
        self._add(
            Operation(
                id=f"host {name}",
                host=name,
                subject=f"host {name}",
                summary="create" if not facts.present else "start its agent" if not facts.agent else "change",
                impact=Impact.LIVE if facts.present else Impact.CREATE,
                method="host.ensure",
                detail=facts.problems,
            )
        )

    def networks(self, host: str) -> None:
        if not self._reachable(host):
            return
        observed = self._seen(host).networks
        for member in switch.wanted(self.lab, host):
            differences = switch.changes(member, observed)
            if differences == []:
                continue
            name = member.network.name
            self._add(
                Operation(
                    id=f"network {name} on {host}",
                    host=host,
                    subject=f"network {name}",
                    summary="create" if differences is None else "change",
                    impact=Impact.CREATE if differences is None else Impact.LIVE,
                    method="network.ensure",
                    params={
                        "network": member.network.model_dump(mode="json"),
                        "local": member.local,
                        "peers": list(member.peers),
                        "forward": member.forward,
                    },
                    needs=self._those([f"host {host}"]),
                    detail=tuple(differences or ()),
                    undo=Undo("network.remove", {"name": name}) if differences is None else None,
                )
            )

    def image(self, name: str) -> None:
        if self.observed.images.get(name) is None:
            self._add(
                Operation(
                    id=f"image {name}",
                    host="",
                    subject=f"image {name}",
                    summary="build or fetch",
                    impact=Impact.CREATE,
                    method="image.ensure",
                    params={"name": name},
                )
            )

    # -- guests --------------------------------------------------------------------------------------------------

    def remove_guest_if_unwanted(self, facts: GuestFacts) -> None:
        wish = self.lab.guests.get(facts.name)
        if wish is not None and wish.host == facts.host:
            return
        if wish is not None and not self._reachable(wish.host):
            return  # it would have nowhere to go
        moved = wish is not None
        removed = self._add(
            Operation(
                id=f"guest {facts.name} off {facts.host}",
                host=facts.host,
                subject=f"guest {facts.name}",
                summary=f"remove from {facts.host}" if moved else "remove",
                impact=Impact.RECREATE if moved else Impact.REMOVE,
                method="guest.remove",
                params={"guest": facts.name},
                detail=(f"host: {facts.host} → {wish.host}",) if wish is not None else (),
            )
        )
        self._drop_ports(facts.name, facts.host, [], removed)

    def drop_orphan_ports(self, host: str) -> None:
        """Taps whose guest is not there: left by a command that was killed."""
        there = {facts.name for facts in self._seen(host).guests}
        wanted = [nic.tap for guest in self.lab.guests_of(host) for nic in guest.nics]
        owners = {owner.partition("/")[0] for facts in self._seen(host).networks for owner in facts.ports.values()}
        for guest in sorted(owners - there):
            taps = switch.ports_left(guest, wanted, self._seen(host).networks)
            self._drop_taps(guest, host, taps, None, Impact.REMOVE)

    def _drop_ports(self, guest: str, host: str, keep: list[str], after: str | None) -> None:
        taps = switch.ports_left(guest, keep, self._seen(host).networks)
        self._drop_taps(guest, host, taps, after, Impact.LIVE if keep else Impact.REMOVE)

    def _drop_taps(self, guest: str, host: str, taps: list[str], after: str | None, impact: Impact) -> None:
        if taps:
            self._add(
                Operation(
                    id=f"ports of {guest} off {host}",
                    host=host,
                    subject=f"guest {guest}",
                    summary="remove its taps" if impact is Impact.LIVE else f"remove its taps from {host}",
                    impact=impact,
                    method="port.remove",
                    params={"guest": guest, "taps": taps},
                    needs=(after,) if after else (),
                )
            )

    def guest(self, wish: ResolvedGuest) -> None:
        host = wish.host
        if not self._reachable(host):
            return
        facts = next((seen for seen in self._seen(host).guests if seen.name == wish.name), None)
        ports = self._ports(wish)
        needs = self._those([f"host {host}", f"image {wish.image}", f"guest {wish.name} off {self._elsewhere(wish)}"])
        needs += ports
        params = {"guest": wish.model_dump(mode="json")}
        subject = f"guest {wish.name}"

        def add(summary: str, impact: Impact, method: str, detail: tuple[str, ...] = (), **extra: object) -> str:
            return self._add(
                Operation(
                    id=f"{subject} on {host}",
                    host=host,
                    subject=subject,
                    summary=summary,
                    impact=impact,
                    method=method,
                    params={**params, **extra},
                    needs=needs,
                    detail=detail,
                    image=wish.image,
                    undo=Undo("guest.remove", {"guest": wish.name}) if facts is None else None,
                )
            )

        taps = [nic.tap for nic in wish.nics]
        if facts is None:
            add("create", Impact.CREATE, "guest.start")
            return
        difference = guests.compare(
            wish,
            facts,
            self.observed.images.get(wish.image),
            image_has_disk=facts.wish.get("image") != "tiny" or wish.image != "tiny",
        )
        everything = difference.recreate + difference.restart + difference.live
        done: str | None = None
        if facts.state not in ("running", "paused"):
            if difference.recreate:
                done = add("start", Impact.RECREATE, "guest.restart", everything, fresh=True, hard=True)
            else:
                why = f"{facts.state}: {facts.reason}" if facts.reason else facts.state
                done = add(
                    "start", Impact.RESTART, "guest.restart", (f"state: {why} → running", *everything), hard=True
                )
        elif difference.recreate:
            done = add("recreate", Impact.RECREATE, "guest.restart", everything, fresh=True)
        elif difference.restart:
            done = add("restart", Impact.RESTART, "guest.restart", everything)
        elif self._lost_taps(wish, facts):
            done = add("restart", Impact.RESTART, "guest.restart", ("tap: lost → made anew",))
        elif difference.live:
            done = add("change", Impact.LIVE, "guest.update", everything)
        elif facts.state == "paused":
            done = self._add(
                Operation(
                    id=f"{subject} on {host}",
                    host=host,
                    subject=subject,
                    summary="resume",
                    impact=Impact.LIVE,
                    method="guest.resume",
                    params={"guest": wish.name},
                    detail=("state: paused → running",),
                    needs=needs,
                )
            )
        elif not facts.ready:
            done = add("wait until it is ready", Impact.LIVE, "guest.wait")
        self._drop_ports(wish.name, host, taps, done)

    def _lost_taps(self, wish: ResolvedGuest, facts: GuestFacts) -> bool:
        """A NIC that is plugged has lost its tap: QEMU holds on to one that is no longer there."""
        missing = switch.ports_missing(wish, self.lab, self._seen(wish.host).networks)
        return any(nic.tap in missing and nic.mac in facts.nics for nic in wish.nics)

    def _elsewhere(self, wish: ResolvedGuest) -> str:
        return next((seen.host for seen in self.observed.guests() if seen.name == wish.name), "")

    def _ports(self, wish: ResolvedGuest) -> tuple[str, ...]:
        host = wish.host
        missing = switch.ports_missing(wish, self.lab, self._seen(host).networks)
        if not missing:
            return ()
        networks = list(dict.fromkeys(nic.network for nic in wish.nics))
        return (
            self._add(
                Operation(
                    id=f"ports of {wish.name} on {host}",
                    host=host,
                    subject=f"guest {wish.name}",
                    summary="make its taps",
                    impact=Impact.CREATE,
                    method="port.ensure",
                    params={
                        "guest": wish.name,
                        "nics": [nic.model_dump(mode="json") for nic in wish.nics if nic.tap in missing],
                        "bridges": {name: self.lab.networks[name].bridge for name in networks},
                    },
                    needs=self._those([f"host {host}", *(f"network {name} on {host}" for name in networks)]),
                    undo=Undo("port.remove", {"guest": wish.name, "taps": missing}),
                )
            ),
        )

    # -- what should not be --------------------------------------------------------------------------------------

    def _staying(self, host: str) -> list[GuestFacts]:
        """Guests that should be elsewhere but stay on ``host``, as their new host does not answer."""
        return [
            facts
            for facts in self._seen(host).guests
            if (wish := self.lab.guests.get(facts.name)) and wish.host != host and not self._reachable(wish.host)
        ]

    def leave(self, host: str) -> None:
        """Networks that the host should not carry, and a host that is no longer in the lab."""
        if not self._reachable(host):
            return
        seen = self._seen(host)
        staying = self._staying(host)
        guests_here = [operation.id for operation in self.operations if operation.host == host]
        removed = [
            self._add(
                Operation(
                    id=f"network {name} off {host}",
                    host=host,
                    subject=f"network {name}",
                    summary="remove",
                    impact=Impact.REMOVE,
                    method="network.remove",
                    params={"name": name},
                    needs=tuple(guests_here),
                )
            )
            for name in switch.unwanted(self.lab, host, seen.networks)
            if not any(nic["network"] == name for guest in staying for nic in guest.wish.get("nics", []))
        ]
        if host not in self.lab.hosts and seen.facts.present and not staying:
            self._add(
                Operation(
                    id=f"host {host} off",
                    host=host,
                    subject=f"host {host}",
                    summary="remove",
                    impact=Impact.REMOVE,
                    method="host.remove",
                    needs=(*guests_here, *removed),
                )
            )
