"""A lab whose hosts exist only in memory.

:class:`MemoryLab` carries operations out on facts instead of machines, with the same calls, parameters and refusals
as the agents of real hosts. :class:`MemoryTransport` puts such a host behind a real stream and the real protocol, so
that everything above the transports runs as it is, without privileges and in milliseconds.

Faults are injected by :attr:`MemoryHost.on_call`, which sees each call before it is carried out: it may raise, or
wait until the call is given up.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import copy
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from orchestrator.errors import CancelledError, GuestError, HostError, HostLostError, NotFoundError, StateError
from orchestrator.guests.domain import GuestFacts, GuestImage
from orchestrator.hosts.rpc import Call, Progress, Server, Stream
from orchestrator.hosts.transport import HostFacts, SharedAgent
from orchestrator.plan.operations import MIGRATE, ObservedHost, ObservedLab, Operation
from orchestrator.spec.resolved import ResolvedGuest, ResolvedHost, ResolvedLab, ResolvedNic
from orchestrator.switch import control as switch
from orchestrator.switch import pcapng, rules
from orchestrator.switch.layout import REASONS, mac_of
from orchestrator.switch.membership import Membership, NetworkFacts
from orchestrator.switch.stats import HOST, Counted, HostStats, NetworkStats, PairStats, PortStats
from orchestrator.switch.trace import BRIDGE, Step

OnCall = Callable[[str, Call, Mapping[str, Any]], None]


def image_id(name: str) -> str:
    """The id that the image ``name`` has in a :class:`MemoryLab`."""
    return f"{name}-0123456789ab"


def _image(name: str) -> dict[str, Any]:
    return asdict(
        GuestImage(
            id=image_id(name),
            kernel="/image/kernel",
            initrd="/image/initrd",
            disk=None,
            disk_format=None,
            cmdline="",
            cloud_init=False,
            ready="agent",
        )
    )


def _network_facts(member: Membership, ports: dict[str, str]) -> NetworkFacts:
    """:param ports: tap → ``GUEST/MAC``."""
    network = member.network
    there = [each for each in member.listed if each.at != member.local or each.nic.tap in ports]
    return NetworkFacts(
        name=network.name,
        bridge=network.bridge,
        mtu=network.mtu,
        up=True,
        mac=network.gateway_mac,
        addresses=sorted(cidr for cidr in (network.gateway4, network.gateway6) if cidr),
        forwards=member.forward != "no",
        vxlan=network.vxlan if member.peers else None,
        vni=network.vni if member.peers else None,
        peers=sorted(member.peers),
        ports=ports,
        datapath=network.datapath,
        listed={each.nic.mac: each.describe(member.local, ports) for each in there},
        rules=rules.digest(rules.packed(network.rules)),
        multicast=network.multicast,
    )


def _ports(lab: ResolvedLab, host: str, network: str) -> dict[str, str]:
    return {
        nic.tap: f"{guest.name}/{nic.mac}"
        for guest in lab.guests_of(host)
        for nic in guest.nics
        if nic.network == network
    }


def _guest_facts(wish: ResolvedGuest, image: str) -> GuestFacts:
    return GuestFacts(
        name=wish.name,
        host=wish.host,
        state="running",
        reason="",
        ready=True,
        wish=wish.model_dump(mode="json"),
        image=image,
        accel="kvm" if wish.accel == "kvm" else "tcg",
        vcpus=wish.vcpus,
        memory=wish.memory,
        memory_total=wish.memory,
        nics=[nic.mac for nic in wish.nics],
        disks=[disk.name for disk in wish.disks],
    )


def perfect(lab: ResolvedLab) -> ObservedLab:
    """What is observed where everything is as ``lab`` says: the plan for it is empty."""
    hosts = {}
    for name in lab.hosts:
        networks = [
            _network_facts(member, _ports(lab, name, member.network.name)) for member in switch.wanted(lab, name)
        ]
        hosts[name] = ObservedHost(
            facts=HostFacts(present=True, agent=True),
            networks=tuple(networks),
            guests=tuple(_guest_facts(guest, image_id(guest.image)) for guest in lab.guests_of(name)),
            migrates=lab.hosts[name].spec.kind != "local",
        )
    return ObservedLab(hosts=hosts, images={guest.image: image_id(guest.image) for guest in lab.guests.values()})


class MemoryHost:
    """One host as facts; its methods are the calls of an agent, named ``guest.start`` → ``guest_start``.

    :ivar problem: set, the host does not answer, for this reason.
    :ivar on_call: sees ``(method, call, params)`` before each call of the agent is carried out.
    :ivar calls: the names of the calls that came, in order.
    :ivar counted: what has gone through a tap; of those that are not in it, nothing.
    :ivar talk: who has sent how much to whom.
    :ivar frames: what a capture sees, at any tap.
    :ivar streams: this side of each connection; a restart of the host breaks them.
    """

    def __init__(self, name: str, observed: ObservedHost | None = None) -> None:
        observed = copy.deepcopy(observed or ObservedHost())
        self.name = name
        self.problem = observed.problem.message if observed.problem else None
        self.facts = observed.facts
        self.networks = {facts.name: facts for facts in observed.networks}
        self.guests = {facts.name: facts for facts in observed.guests}
        self.migrates = observed.migrates
        self.links: dict[str, tuple[queue.SimpleQueue[bytes], queue.SimpleQueue[bytes]]] = {}
        self.on_call: OnCall = lambda method, call, params: None
        self.calls: list[str] = []
        self.counted: dict[str, Counted] = {}
        self.talk: list[PairStats] = []
        self.frames: list[bytes] = []
        self.streams: list[socket.socket] = []

    def observed(self) -> ObservedHost:
        if self.problem:
            return ObservedHost(problem=HostError(f"host {self.name}: {self.problem}"))
        return copy.deepcopy(
            ObservedHost(
                self.facts,
                networks=tuple(self.networks.values()),
                guests=tuple(self.guests.values()),
                migrates=self.migrates,
            )
        )

    def methods(self) -> dict[str, Callable[..., Any]]:
        """The calls by name."""
        found = {}
        for kind in ("host", "network", "port", "switch", "guest", "migration"):
            for name in dir(self):
                if name.startswith(f"{kind}_"):
                    found[name.replace("_", ".", 1)] = getattr(self, name)
        return found

    def register(self, server: Server) -> None:
        for method in self.methods():
            server.register(method, partial(self._answer, method))
        server.register_stream("migration.receive", self._receive)
        server.register_stream("migration.link", self._link)
        server.register_stream("switch.capture", self._capture)

    def _answer(self, method: str, call: Call, **params: Any) -> Any:
        return self.answer(method, call, params)

    def answer(self, method: str, call: Call, params: Mapping[str, Any]) -> Any:
        """Carry one call of the agent out."""
        self.calls.append(method)
        self.on_call(method, call, params)
        return self.methods()[method](call, **params)

    # -- the host and its networks -------------------------------------------------------------------------------

    def host_hello(self, call: Call) -> dict[str, Any]:
        return {"host": self.name}

    def network_facts(self, call: Call) -> list[dict[str, Any]]:
        return [facts.to_json() for facts in self.networks.values()]

    def network_ensure(self, call: Call, **membership: Any) -> None:
        member = Membership.from_json(membership)
        before = self.networks.get(member.network.name)
        self.networks[member.network.name] = _network_facts(member, before.ports if before else {})

    def network_remove(self, call: Call, name: str) -> None:
        self.networks.pop(name, None)

    def port_ensure(self, call: Call, guest: str, nics: list[dict[str, Any]], networks: list[dict[str, Any]]) -> None:
        made = [ResolvedNic.model_validate(data) for data in nics]
        for member in map(Membership.from_json, networks):
            before = self.networks.get(member.network.name)
            ports = {nic.tap: f"{guest}/{nic.mac}" for nic in made if nic.network == member.network.name}
            self.networks[member.network.name] = _network_facts(member, {**(before.ports if before else {}), **ports})

    def port_remove(self, call: Call, guest: str, taps: list[str]) -> None:
        for facts in self.networks.values():
            for tap in taps:
                _, _, mac = facts.ports.pop(tap, "").partition("/")
                if facts.where(mac) == "":
                    del facts.listed[mac]

    # -- the switch ----------------------------------------------------------------------------------------------

    def switch_stats(self, call: Call, names: dict[str, str], pairs: bool = False) -> dict[str, Any]:
        networks = [self._network_stats(facts) for facts in self.networks.values()]
        return HostStats(time.monotonic(), networks, self.talk if pairs else None).to_json()

    def _network_stats(self, facts: NetworkFacts) -> NetworkStats:
        switched = facts.datapath != "bridge"
        ports = []
        for tap, port in facts.ports.items():
            guest, _, mac = port.partition("/")
            addresses = [word for word in facts.listed.get(mac, "").split() if {".", ":"} & set(word)]
            counted = self.counted.get(tap, Counted())
            ports.append(PortStats(guest, mac, tap, facts.name, addresses=addresses, counted=counted))
        return NetworkStats(
            network=facts.name,
            bridge=facts.bridge,
            datapath=facts.datapath,
            lacks=facts.lacks,
            mtu=facts.mtu,
            gateway=facts.addresses,
            gateway_mac=facts.mac,
            uplink=facts.forwards,
            multicast=facts.multicast,
            rules=int(bool(facts.rules)) if switched else None,
            listed=len(facts.listed) if switched else None,
            vxlan=facts.vxlan,
            peers=facts.peers,
            ports=ports,
            host=Counted(),
            underlay=Counted() if facts.vxlan else None,
        )

    def switch_trace(
        self, call: Call, network: str, tap: str | None, frame: str, names: dict[str, str]
    ) -> dict[str, Any]:
        """The frame goes to whom its destination MAC is; nothing else of it is looked at."""
        facts = self.networks.get(network)
        if facts is None:
            raise NotFoundError(f"network {network} is not on this host")
        if facts.datapath == "bridge":
            return Step(
                "bridge", BRIDGE, "a Linux bridge carries the network here: it lets everything pass"
            ).to_json()
        mac = mac_of(bytes.fromhex(frame)[:6])
        guest, where = names.get(mac), facts.where(mac)
        if mac == facts.mac:
            step = Step("ebpf", "host", "it goes to the host itself", receiver=HOST)
        elif where == "":
            link = next(tap for tap, port in facts.ports.items() if port.endswith(f"/{mac}"))
            step = Step("ebpf", "guest", f"it goes to guest {guest} by its tap {link}", link=link, receiver=guest)
        elif where and tap is not None:
            next_ = f"it goes to guest {guest} on {names.get(where, where)}, by the VXLAN"
            step = Step("ebpf", "underlay", next_, link=facts.vxlan, receiver=guest, to_host=where, frame=frame)
        else:
            meaning = REASONS["no_destination"]
            step = Step("ebpf", "drop", f"it is dropped: {meaning}", reason="no_destination", meaning=meaning)
        return step.to_json()

    def _capture(
        self,
        open_stream: Callable[[], Stream],
        guest: str,
        tap: str,
        snap: int,
        count: int | None,
        seconds: float | None,
    ) -> None:
        """:attr:`frames`, one after the other from and to the guest; then it waits for the client, unless a limit is
        given."""
        self.calls.append("switch.capture")
        if not any(tap in facts.ports for facts in self.networks.values()):
            raise NotFoundError(f"guest {guest} has no tap {tap} on this host")
        stream, frames = open_stream(), self.frames[:count]
        stream.sendall(pcapng.section("memory") + pcapng.interface(tap, f"guest {guest}", snap))
        for number, frame in enumerate(frames):
            stream.sendall(pcapng.packet(number, frame[:snap], len(frame), outbound=bool(number % 2)))
        if count is None and seconds is None:
            stream.recv(1)
        stream.sendall(pcapng.statistics(len(frames), len(frames), 0, "ended"))

    # -- guests --------------------------------------------------------------------------------------------------

    def guest_settle(self, call: Call) -> None:
        pass

    def guest_facts(self, call: Call) -> list[dict[str, Any]]:
        return [facts.to_json() for facts in self.guests.values()]

    def _have_taps(self, wish: ResolvedGuest) -> None:
        have = {tap for facts in self.networks.values() for tap in facts.ports}
        for nic in wish.nics:
            if nic.tap not in have:
                raise GuestError(f"guest {wish.name} does not start: there is no link {nic.tap}")

    def _running(self, guest: str) -> GuestFacts:
        facts = self.guests.get(guest)
        if facts is None or not facts.is_on:
            raise StateError(f"guest {guest} is not running")
        return facts

    def guest_start(
        self, call: Call, guest: dict[str, Any], image: dict[str, Any], keys: list[str], fresh: bool = False
    ) -> None:
        wish = ResolvedGuest.model_validate(guest)
        self._have_taps(wish)
        self.guests[wish.name] = _guest_facts(wish, image["id"])

    def guest_restart(
        self,
        call: Call,
        guest: dict[str, Any],
        image: dict[str, Any],
        keys: list[str],
        fresh: bool = False,
        timeout: float = 20,
        hard: bool = False,
    ) -> None:
        self.guest_start(call, guest, image, keys, fresh)

    def guest_update(self, call: Call, guest: dict[str, Any], image: dict[str, Any]) -> None:
        wish = ResolvedGuest.model_validate(guest)
        before = self._running(wish.name)
        if wish.vcpus > int(before.wish["vcpus_max"]):
            raise GuestError(f"guest {wish.name} cannot have {wish.vcpus} vCPUs while it runs")
        self._have_taps(wish)
        after = _guest_facts(wish, image["id"])
        total = max(before.memory_total, wish.memory)
        self.guests[wish.name] = replace(after, state=before.state, ready=before.ready, memory_total=total)

    def guest_unplug(self, call: Call, guest: str, nics: list[str], disks: list[str]) -> None:
        facts = self._running(guest)
        facts.nics = [mac for mac in facts.nics if mac not in nics]
        facts.disks = [name for name in facts.disks if name not in disks]
        facts.wish["nics"] = [nic for nic in facts.wish["nics"] if nic["mac"] not in nics]
        facts.wish["disks"] = [disk for disk in facts.wish["disks"] if disk["name"] not in disks]

    def guest_stop(self, call: Call, guest: str, timeout: float = 20, hard: bool = False) -> str:
        facts = self._running(guest)
        facts.state, facts.ready = "off", False
        return "stopped" if hard else "shut down"

    def guest_pause(self, call: Call, guest: str) -> None:
        facts = self._running(guest)
        facts.state, facts.ready = "paused", False

    def guest_resume(self, call: Call, guest: str) -> None:
        facts = self._running(guest)
        facts.state, facts.ready = "running", True

    def guest_wait(self, call: Call, guest: dict[str, Any], image: dict[str, Any], **_: Any) -> None:
        self._running(guest["name"]).ready = True

    def guest_remove(self, call: Call, guest: str, keep_disks: bool = False) -> None:
        self.guests.pop(guest, None)

    # -- migration: what two libvirts say to each other is a guest's facts there, and one word back ----------------

    def migration_able(self, call: Call) -> bool:
        return bool(self.migrates)

    def migration_describe(self, call: Call, guest: str, lose: list[str]) -> dict[str, Any]:
        facts = self._running(guest)
        if set(facts.snapshots) - set(lose):
            raise StateError(f"guest {guest}: its snapshots cannot go along")
        return {"running": facts.state == "running"}

    def migration_send(
        self, call: Call, guest: str, link: str, described: dict[str, Any], address: str, bandwidth: int = 0
    ) -> dict[str, Any]:
        answers, sent = self.links[link]
        sent.put(json.dumps(replace(self._running(guest), snapshots=[]).to_json()).encode() + b"\n")
        call.progress("memory: 1 MiB sent, 0 MiB left, 1 MiB/s, pass 1")
        while True:
            with contextlib.suppress(queue.Empty):
                if answers.get(timeout=0.02) == b"finished\n":
                    break
                raise GuestError(f"guest {guest} stays where it is: the other side has gone")
            if call.cancelled:
                raise CancelledError("given up by the caller")
        del self.guests[guest]
        return {"stopped": 0.0, "disk": 0, "log": ""}

    def migration_arrive(self, call: Call, guest: str, resume: bool = True, log: str = "") -> dict[str, Any]:
        facts = self._running(guest)
        facts.arriving_from = None
        if resume:
            facts.state, facts.ready = "running", True
        return {"running": 0.0, "memory": 1 << 20, "passes": 1}

    def migration_clear(self, call: Call, guest: str) -> None:
        pass

    def migration_keeps(self, call: Call, guest: str) -> bool:
        return guest in self.guests

    def migration_discard(self, call: Call, guest: str) -> None:
        if guest in self.guests and self.guests[guest].arriving_from is not None:
            del self.guests[guest]

    def _link(self, open_stream: Callable[[Any], Stream], guest: str) -> None:
        name = f"link-{guest}"
        answers, sent = self.links[name] = (queue.SimpleQueue(), queue.SimpleQueue())
        stream = open_stream(name)

        def pass_on() -> None:
            with contextlib.suppress(OSError):
                stream.sendall(sent.get())

        sender = threading.Thread(target=pass_on, name=name, daemon=True)
        sender.start()
        answers.put(stream.recv(1 << 16))
        sent.put(b"")
        sender.join()

    def _receive(
        self,
        open_stream: Callable[[Any], Stream],
        guest: str,
        source: str,
        described: dict[str, Any],
        image: dict[str, Any],
    ) -> None:
        self.calls.append("migration.receive")
        self.on_call("migration.receive", Call(lambda text: None), {"guest": guest, "source": source})
        if guest in self.guests:
            raise StateError(f"guest {guest} is on host {self.name} already")
        stream, said = open_stream({}), b""
        while not said.endswith(b"\n"):
            part = stream.recv(1 << 16)
            if not part:
                return
            said += part
        facts = GuestFacts.from_json(json.loads(said))
        arriving = replace(facts, host=self.name, state="paused", ready=False, arriving_from=source)
        self.guests[guest] = replace(arriving, wish={**facts.wish, "host": self.name})
        stream.sendall(b"finished\n")
        stream.recv(1)


class MemoryTransport(SharedAgent):
    """A :class:`~orchestrator.hosts.transport.Transport` to a host in memory."""

    shares_files = True
    disposable = False

    def __init__(self, host: ResolvedHost, memory: MemoryHost) -> None:
        self.host = host
        self.memory = memory

    def _answers(self) -> None:
        if self.memory.problem:
            raise HostError(self.memory.problem)

    def facts(self) -> HostFacts:
        self._answers()
        return self.memory.facts

    def ensure(self, progress: Progress, cancel: threading.Event | None = None) -> None:
        self._answers()
        progress("in memory")
        if self.memory.facts.restart:
            self.forget_agent()
            for stream in self.memory.streams:
                with contextlib.suppress(OSError):  # closed already
                    stream.shutdown(socket.SHUT_RDWR)
        self.memory.facts = HostFacts(present=True, agent=True)

    def start_agent(self) -> None:
        self._answers()
        self.memory.facts = replace(self.memory.facts, agent=True)

    def halt(self, progress: Progress) -> None:
        pass  # it is not ours to power off

    def remove(self, progress: Progress) -> None:
        self._answers()
        self.memory.facts = HostFacts()
        self.memory.networks.clear()
        self.memory.guests.clear()

    def stream(self) -> Stream:
        self._answers()
        if not self.memory.facts.agent:
            raise HostLostError(f"{self.host.name}: no agent answers")
        ours, theirs = socket.socketpair()
        self.memory.streams.append(theirs)
        server = Server()
        self.memory.register(server)
        threading.Thread(
            target=server.serve_stream, args=(theirs,), name=f"memory {self.host.name}", daemon=True
        ).start()
        return ours


class MemoryLab:
    """Hosts in memory, by name, and the images that are cached."""

    def __init__(self, observed: ObservedLab | None = None) -> None:
        observed = observed or ObservedLab()
        self.hosts = {name: MemoryHost(name, seen) for name, seen in observed.hosts.items()}
        self.images = dict(observed.images)

    def host(self, name: str) -> MemoryHost:
        """The host of that name; a new, absent one where there is none."""
        return self.hosts.setdefault(name, MemoryHost(name))

    def transport(self, lab: ResolvedLab, name: str, *_: Any) -> MemoryTransport:
        """What :func:`orchestrator.hosts.opening.open_host` is for real hosts."""
        return MemoryTransport(lab.hosts.get(name) or lab.former_hosts[name], self.host(name))

    def observe(self) -> ObservedLab:
        return ObservedLab({name: host.observed() for name, host in self.hosts.items()}, dict(self.images))

    def carry_out(self, operation: Operation) -> None:
        """Carry one operation out, without streams and threads.

        :raise OrchestratorError: as the agent of a real host would.
        """
        if operation.method == "image.ensure":
            self.images[operation.params["name"]] = image_id(operation.params["name"])
            return
        host = self.host(operation.host)
        if operation.method == MIGRATE:
            self._migrate(host, self.host(operation.params["target"]), operation.params["guest"])
        elif operation.method == "host.ensure":
            host.facts = HostFacts(present=True, agent=True)
        elif operation.method == "host.remove":
            self.hosts[operation.host] = MemoryHost(operation.host)
        else:
            params = dict(operation.params)
            if operation.image:
                params["image"] = _image(operation.image)
            if operation.method in ("guest.start", "guest.restart"):
                params["keys"] = []
            host.answer(operation.method, Call(lambda text: None), params)

    def _migrate(self, source: MemoryHost, target: MemoryHost, guest: str) -> None:
        call = Call(lambda text: None)
        facts = source._running(guest)
        wish = ResolvedGuest.model_validate(facts.wish)
        target._have_taps(wish.model_copy(update={"nics": [nic for nic in wish.nics if nic.mac in facts.nics]}))
        if guest in target.guests:
            raise StateError(f"guest {guest} is on host {target.name} already")
        source.answer("migration.describe", call, {"guest": guest, "lose": facts.snapshots})
        target.guests[guest] = replace(
            source.guests.pop(guest), host=target.name, snapshots=[], wish={**facts.wish, "host": target.name}
        )
