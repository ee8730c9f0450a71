"""Wish and facts → plan. A pure function: the tests give it both as data."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from orchestrator.guests.control import CONTENTS_REMOVED
from orchestrator.guests.domain import GuestFacts
from orchestrator.images import labhost
from orchestrator.plan import moves, power
from orchestrator.plan.operations import MIGRATE, Impact, ObservedHost, ObservedLab, Operation, Plan, Undo
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab
from orchestrator.switch import control as switch
from orchestrator.switch.membership import Membership

NOTHING = ObservedHost()


def build(lab: ResolvedLab, observed: ObservedLab) -> Plan:
    """The operations that make ``lab`` true.

    :param observed: of every host of ``lab``, and of every host that the lab had before.
    """
    planner = _Planner(lab, observed)
    planner.conclude_migrations()
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
    for host in lab.hosts:
        planner.forget_left_hosts(host)
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
        self.operations: list[Operation] = []
        self._ids: set[str] = set()
        self._stops: dict[str, list[str]] = {}
        self.observed = observed = self._shut_down_what_restarts(observed)
        self._guests = moves.whereabouts(observed)
        self._unclear = {facts.name for facts in self._guests.unclear}
        self._moves = {facts.name: facts for facts in self._guests.there if self._goes_live(facts)}

    def _add(self, operation: Operation) -> str:
        self.operations.append(operation)
        self._ids.add(operation.id)
        return operation.id

    def _shut_down_what_restarts(self, observed: ObservedLab) -> ObservedLab:
        """What there will be when hosts that must restart have done so."""
        hosts = dict(observed.hosts)
        for name, seen in observed.hosts.items():
            if seen.facts.restart and name in self.lab.hosts:
                self._stops[name] = [self._add(operation) for operation in power.stop_guests(name, seen)]
                hosts[name] = power.after_restart(seen)
        return replace(observed, hosts=hosts)

    def _those(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Of ``ids``, those that are in the plan: what needs no change need not be waited for."""
        return tuple(name for name in ids if name in self._ids)

    def _seen(self, host: str) -> ObservedHost:
        return self.observed.hosts.get(host, NOTHING)

    def _reachable(self, host: str) -> bool:
        return self._seen(host).problem is None

    def _on(self, host: str, name: str) -> GuestFacts | None:
        """The guest of that name, if ``host`` has it."""
        return next((facts for facts in self._guests.there if (facts.name, facts.host) == (name, host)), None)

    def _goes_live(self, facts: GuestFacts) -> bool:
        wish = self.lab.guests.get(facts.name)
        if wish is None or wish.host == facts.host or not self._reachable(wish.host):
            return False
        return self._on(wish.host, wish.name) is None and moves.hindrance(self.lab, self.observed, facts) is None

    # -- hosts, networks, images ---------------------------------------------------------------------------------

    def host(self, name: str) -> None:
        if not self._reachable(name):
            return
        facts, spec = self._seen(name).facts, self.lab.hosts[name].spec
        if facts.present and facts.agent and not facts.problems:
            return
        if not facts.present and spec.kind == "vagrant" and spec.box is None:
            self.image(labhost.NAME)
        if not facts.present:
            summary, impact = "create", Impact.CREATE
        elif facts.restart:
            summary, impact = "restart", Impact.RESTART
        elif facts.broken:
            summary, impact = "mend", Impact.LIVE
        else:
            summary, impact = "change" if facts.agent else "start its agent", Impact.LIVE
        self._add(
            Operation(
                id=f"host {name}",
                host=name,
                subject=f"host {name}",
                summary=summary,
                impact=impact,
                method="host.ensure",
                needs=self._those([f"image {labhost.NAME}", *self._stops.get(name, [])]),
                detail=facts.problems,
            )
        )

    def networks(self, host: str) -> None:
        if not self._reachable(host):
            return
        observed = self._seen(host).networks
        for member in self._until_moved(host):
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
                    params=member.to_json(),
                    needs=self._those([f"host {host}"]),
                    detail=tuple(differences or ()),
                    undo=Undo("network.remove", {"name": name}) if differences is None else None,
                )
            )

    def _uses(self, guest: str, network: str) -> bool:
        return guest in self.lab.guests and any(nic.network == network for nic in self.lab.guests[guest].nics)

    def _keeping(self, member: Membership, host: str, sources: Iterable[str | None]) -> Membership:
        """``member`` with those of the present peers of ``host`` that are ``sources`` of guests: they are needed for
        as long as a guest may be there."""
        known = {**self.lab.former_hosts, **self.lab.hosts}
        needed = {known[name].underlay for name in sources if name in known} - {*member.peers, member.local}
        seen = next((facts for facts in self._seen(host).networks if facts.name == member.network.name), None)
        more = needed.intersection(seen.peers) if seen else set()
        return replace(member, peers=tuple(sorted({*member.peers, *more}))) if more else member

    def _at_last(self, member: Membership, host: str) -> Membership:
        """``member`` as far as that can be reached now."""
        unclear = self._guests.unclear
        return self._keeping(
            member, host, [facts.arriving_from for facts in unclear if self._uses(facts.name, member.network.name)]
        )

    def _held(self, host: str) -> dict[str, str]:
        """Guest → host that it is on for now, of guests that cannot go where they should; where that is not clear,
        what ``host`` takes it to be."""
        found = {facts.name: name for name in self.observed.hosts for facts in self._staying(name)}
        known = {each.underlay: each.name for each in {**self.lab.former_hosts, **self.lab.hosts}.values()}
        for name in self._unclear & self.lab.guests.keys():
            nics = self.lab.guests[name].nics
            taken = (facts.where(nic.mac) for facts in self._seen(host).networks for nic in nics)
            where = next((address for address in taken if address is not None), None)
            if where is not None:
                found[name] = known.get(where, host) if where else host
        return found

    def _until_moved(self, host: str) -> Iterator[Membership]:
        """How ``host`` takes part in its networks until guests have moved."""
        moving = {name: facts.host for name, facts in self._moves.items()}
        for member in switch.wanted(self.lab, host, {**self._held(host), **moving}):
            sources = [where for name, where in moving.items() if self._uses(name, member.network.name)]
            yield self._keeping(self._at_last(member, host), host, sources)

    def forget_left_hosts(self, host: str) -> None:
        """When guests have left a host: take it from the peers of ``host``."""
        if not self._reachable(host):
            return
        last = switch.wanted(self.lab, host, self._held(host))
        for before, wanted in zip(self._until_moved(host), last, strict=True):
            member, name = self._at_last(wanted, host), wanted.network.name
            if before == member:
                continue
            moved = [
                f"guest {each} to {self.lab.guests[each].host}" for each in self._moves if self._uses(each, name)
            ]
            self._add(
                Operation(
                    id=f"network {name} on {host} afterwards",
                    host=host,
                    subject=f"network {name}",
                    summary="change",
                    impact=Impact.LIVE,
                    method="network.ensure",
                    params=member.to_json(),
                    needs=self._those([f"network {name} on {host}", *moved]),
                    detail=tuple(_changed(before, member)),
                )
            )

    def image(self, name: str) -> None:
        if self.observed.images.get(name) is None and f"image {name}" not in self._ids:
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

    def conclude_migrations(self) -> None:
        """What commands that were killed while a guest moved have left: guests that only have to go on, and copies of
        guests that have stayed."""
        arrived, copies = self._guests.arrived, self._guests.copies
        for facts in (each for each in arrived if each.name in self.lab.guests):
            self._add(
                Operation(
                    id=f"guest {facts.name} arrives on {facts.host}",
                    host=facts.host,
                    subject=f"guest {facts.name}",
                    summary="go on after its move",
                    impact=Impact.LIVE,
                    method="migration.arrive",
                    params={"guest": facts.name},
                )
            )
        for facts in (each for each in copies if each.name in self.lab.guests):
            discarded = self._add(
                Operation(
                    id=f"copy of {facts.name} off {facts.host}",
                    host=facts.host,
                    subject=f"guest {facts.name}",
                    summary="remove the copy of a move that was cut short",
                    impact=Impact.LIVE,
                    method="migration.discard",
                    params={"guest": facts.name},
                )
            )
            if self.lab.guests[facts.name].host != facts.host:
                self._drop_ports(facts.name, facts.host, [], discarded)

    def _concluded(self, name: str) -> list[str]:
        """Ids of operations that come before any other on the guest of that name."""
        ids = [f"guest {name} arrives on {facts.host}" for facts in self._guests.arrived]
        return ids + [f"copy of {name} off {facts.host}" for facts in self._guests.copies]

    def remove_guest_if_unwanted(self, facts: GuestFacts) -> None:
        wish = self.lab.guests.get(facts.name)
        if wish is not None and (wish.host == facts.host or facts.name in self._moves):
            return
        if wish is not None and not (self._reachable(wish.host) and self._on(facts.host, facts.name)):
            return  # it would have nowhere to go; or it is not really here
        moved = wish is not None
        detail: tuple[str, ...] = ()
        if wish is not None:
            reason = moves.hindrance(self.lab, self.observed, facts)
            detail = (f"host: {facts.host} → {wish.host}", *([f"not live: {reason}"] if reason else []))
        removed = self._add(
            Operation(
                id=f"guest {facts.name} off {facts.host}",
                host=facts.host,
                subject=f"guest {facts.name}",
                summary=f"remove from {facts.host}" if moved else "remove",
                impact=Impact.RECREATE if moved else Impact.REMOVE,
                method="guest.remove",
                params={"guest": facts.name},
                needs=self._those(self._concluded(facts.name)),
                detail=detail,
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

    def _unplug(self, facts: GuestFacts, nics: list[str], disks: list[str]) -> tuple[str, ...]:
        """Before a guest moves, take from it what it is not to keep: the id of that operation."""
        if not nics and not disks:
            return ()
        return (
            self._add(
                Operation(
                    id=f"guest {facts.name} on {facts.host}",
                    host=facts.host,
                    subject=f"guest {facts.name}",
                    summary="change",
                    impact=Impact.LIVE,
                    method="guest.unplug",
                    params={"guest": facts.name, "nics": nics, "disks": disks},
                    needs=self._those(self._concluded(facts.name)),
                    detail=(
                        *(f"NIC {mac}: unplugged" for mac in nics),
                        *(f"disk {name}: unplugged, {CONTENTS_REMOVED}" for name in disks),
                    ),
                )
            ),
        )

    def _move(self, wish: ResolvedGuest, facts: GuestFacts, needs: tuple[str, ...]) -> str:
        """The guest goes to its host as it runs: the id of that operation."""
        networks = {nic.network for nic in wish.nics}
        ready = self._those(
            f"network {name} on {host}" for name in self.lab.networks for host in self.lab.hosts if name in networks
        )
        moved = self._add(
            Operation(
                id=f"guest {wish.name} to {wish.host}",
                host=facts.host,
                subject=f"guest {wish.name}",
                summary=f"move to {wish.host}",
                impact=Impact.LIVE,
                method=MIGRATE,
                params={"guest": wish.name, "target": wish.host, "image": facts.image, "lose": facts.snapshots},
                needs=tuple(dict.fromkeys((*needs, *ready))),
                detail=(
                    f"host: {facts.host} → {wish.host}",
                    *(f"snapshot {name}: does not move, {CONTENTS_REMOVED}" for name in facts.snapshots),
                ),
            )
        )
        self._drop_ports(wish.name, facts.host, [], moved)
        return moved

    def guest(self, wish: ResolvedGuest) -> None:
        host = wish.host
        if not self._reachable(host) or wish.name in self._unclear:
            return
        facts, source = self._on(host, wish.name), self._moves.get(wish.name)
        unplugged: tuple[str, ...] = ()
        if source:
            facts, nics, disks = moves.without_unplugged(wish, source)
            unplugged = self._unplug(source, nics, disks)
        ports = self._ports(wish)
        networks = dict.fromkeys(f"network {nic.network} on {host}" for nic in wish.nics)
        before = [f"host {host}", f"image {wish.image}", *networks, *self._concluded(wish.name)]
        needs = self._those([*before, *(f"guest {wish.name} off {elsewhere}" for elsewhere in self.observed.hosts)])
        needs += unplugged + ports
        if source:
            needs = (self._move(wish, source, needs),)
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
        difference = moves.compare(wish, facts, self.observed.images)
        everything = difference.recreate + difference.restart + difference.live
        done: str | None = None
        if not facts.is_on:
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
        elif source is None and self._lost_taps(wish, facts):
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
                        "networks": [
                            member.to_json() for member in self._until_moved(host) if member.network.name in networks
                        ],
                    },
                    needs=self._those([f"host {host}", *(f"network {name} on {host}" for name in networks)]),
                    undo=Undo("port.remove", {"guest": wish.name, "taps": missing}),
                )
            ),
        )

    # -- what should not be --------------------------------------------------------------------------------------

    def _staying(self, host: str) -> list[GuestFacts]:
        """Guests that should be elsewhere but stay on ``host``, as their new host does not answer; or that may be
        here."""
        return [
            facts
            for facts in self._seen(host).guests
            if (wish := self.lab.guests.get(facts.name))
            and ((wish.host != host and not self._reachable(wish.host)) or facts.name in self._unclear)
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


def _changed(before: Membership, after: Membership) -> Iterator[str]:
    """What of a network is otherwise when guests have moved."""
    if before.peers != after.peers:
        yield f"peers: {_addresses(before.peers)} → {_addresses(after.peers)}"
    places = {each.nic.mac: each.at for each in before.listed}
    for each in after.listed:
        if places.get(each.nic.mac) != each.at:
            yield f"list: {each.guest} at {places.get(each.nic.mac, 'nowhere')} → {each.at}"


def _addresses(peers: Iterable[str]) -> str:
    return ", ".join(sorted(peers)) or "none"
