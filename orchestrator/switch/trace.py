"""What becomes of a frame on this host, and why: it is given to the program that sits at the link, as it runs now.

The frame carries a mark by which the program tells what it would do with it; it is counted nowhere and sent to
nobody. Rates are not looked at.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from orchestrator import paths
from orchestrator.errors import NetworkError, NotFoundError
from orchestrator.switch import bpf, dispatcher, frames, links
from orchestrator.switch.filters import INGRESS
from orchestrator.switch.layout import MAPS, REASONS, TRACE_MARK, Fate, Nic, Verdict, index, mac_of
from orchestrator.switch.membership import NetworkFacts
from orchestrator.switch.stats import HOST, networks_of

BRIDGE = "bridge"
"""The fate of what comes to a bridge."""
_UNTAG, _TRIED = "untag", "tried"
_NOT_RUN = 8  # what bpf/untag.bpf.c gives where it cannot hand the frame on


@dataclass(frozen=True)
class Step:
    """What one host does with a frame.

    :ivar fate: a :class:`~orchestrator.switch.layout.Fate` in small letters, or ``bridge``.
    :ivar reason: why it is dropped: a name of :data:`~orchestrator.switch.layout.REASONS`; and what that means.
    :ivar rule: number of the rule of the network that decides, from 1; None: none does.
    :ivar link: the link that it goes to.
    :ivar receiver: the guest that gets it, or that an answer is about; ``host``: the host itself.
    :ivar to_host: underlay address of the host that it goes to.
    :ivar next: all of that as a sentence.
    :ivar frame: what the other host gets, in hexadecimal.
    """

    datapath: str
    fate: str
    next: str
    reason: str | None = None
    meaning: str | None = None
    rule: int | None = None
    link: str | None = None
    receiver: str | None = None
    to_host: str | None = None
    frame: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(uid: str, network: str, tap: str | None, frame: bytes, names: Mapping[str, str]) -> Step:
    """What this host would do with ``frame``.

    :param tap: where it comes in; None: from another host.
    :param names: MAC → guest, and underlay address → host, to speak of them.
    :raise NotFoundError: there is no such network or link here.
    :raise NetworkError: the kernel refuses, or the switch that runs is of a version that cannot be asked.
    """
    with links.netlink("the switch cannot be asked") as ip:
        found = ip.get_links()
        net, facts = next(
            ((net, each) for net, each in links.observe(ip, uid, found).items() if each.name == network), (0, None)
        )
        if facts is None:
            raise NotFoundError(f"network {network} is not on this host", hint="orchestrator up")
        name = tap or facts.vxlan
        number = next((link["index"] for link in found if link.get("ifname") == name), 0)
        if not name or not number:
            what = f"tap {tap} of the guest" if tap else f"VXLAN of network {network}"
            raise NotFoundError(f"there is no {what} on this host", hint="orchestrator up")
        with dispatcher.opened(ip, uid, found) as switch:
            if switch is None or net not in networks_of(switch):
                return Step("bridge", BRIDGE, "a Linux bridge carries the network here: it lets everything pass")
            program = switch.sitting_at(number, INGRESS)
            if program is None:
                raise NetworkError(f"the switch does not sit at {name}", hint="orchestrator up")
            owners = {each["index"]: port.partition("/") for each, port, _ in links.ports(uid, found)}
            taps = {each: guest for each, (guest, _, _) in owners.items()}
            known = {**names, **{mac: guest for guest, _, mac in owners.values()}, facts.mac: HOST}
            asked = _Asked(ip, switch, facts, net, number, known, taps, found)
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, program)
                return asked.step(program, frame)


@dataclass(frozen=True)
class _Asked:
    """
    :ivar net: index of the network's gateway link.
    :ivar number: index of the link that the frame comes in by.
    :ivar guests: index of a tap → guest.
    """

    ip: IPRoute
    switch: dispatcher.Switch
    network: NetworkFacts
    net: int
    number: int
    names: Mapping[str, str]
    guests: Mapping[int, str]
    links: list[Any]

    def step(self, program: int, frame: bytes) -> Step:
        verdict, after = _verdict(program, frame, self.number)
        fate = Fate(verdict.fate)
        if fate == Fate.NONE and not self._is_known():
            fate, verdict = Fate.DROP, replace(verdict, reason=list(REASONS).index("no_port"))
        link = next((each.get("ifname") for each in self.links if each["index"] == verdict.ifindex), None)
        told = Step("ebpf", fate.name.lower(), "", rule=verdict.rule or None, link=link)
        to = mac_of(after[:6])
        match fate:
            case Fate.DROP:
                reason, meaning = list(REASONS.items())[verdict.reason]
                return self._told(told, f"it is dropped: {meaning}", reason=reason, meaning=meaning)
            case Fate.GUEST:
                guest = self.guests.get(verdict.ifindex) or self.names.get(to)
                return self._told(told, f"it goes to guest {guest or to} by its tap {link}", receiver=guest)
            case Fate.UNDERLAY:
                return self._to_other_host(told, frame, after)
            case Fate.HOST:
                return self._told(
                    told, "it goes to the host itself, which takes, routes or refuses it", receiver=HOST
                )
            case Fate.UPLINK:
                return self._told(told, f"it leaves by {link}, for the next hop of the host's route")
            case Fate.ANSWER:
                about = mac_of(after[6:12])
                who = self.names.get(about)
                whose = "" if who is None else ", the MAC of the host" if who == HOST else f", the MAC of guest {who}"
                return self._told(told, f"the switch answers it: {about}{whose}", receiver=who)
            case Fate.FLOOD:
                return self._told(told, "it goes to everybody in the network who may hear the sender")
        return self._told(told, "it goes nowhere: nobody but its sender has to know")

    def _told(self, step: Step, next_: str, **more: Any) -> Step:
        if step.rule:
            next_ += f" (rule {step.rule} of network {self.network.name})"
        return replace(step, next=next_, **more)

    def _is_known(self) -> bool:
        tables = (self.switch.maps["ports"], self.switch.maps["links"])
        return any(table.get(index(self.number)) is not None for table in tables)

    def _to_other_host(self, step: Step, frame: bytes, after: bytes) -> Step:
        """Between hosts a frame has the tag of its VLAN, also where its sender's frames have none."""
        entry, port = self.switch.network(self.net), self.switch.maps["ports"].get(index(self.number))
        vlan = frames.tag_of(frame) or (Nic.unpack(port).vlan if port else 0)
        to = mac_of(after[:6])
        host = dispatcher.hosts_behind(self.ip, entry.vxlan if entry else 0).get(to)
        guest, where = self.names.get(to), self.names.get(host or "", host or "a host that the VXLAN does not know")
        next_ = f"it goes to guest {guest or to} on {where}, by the VXLAN"
        return self._told(step, next_, receiver=guest, to_host=host, frame=frames.tagged(after, vlan or None).hex())


# -- running it ------------------------------------------------------------------------------------------------------


def _verdict(program: int, frame: bytes, number: int) -> tuple[Verdict, bytes]:
    """What the program tells of a frame that comes in by the link ``number``; and the frame after it."""
    with _maps_of(program) as maps:
        verdicts = maps.get("verdicts")
        if verdicts is None or verdicts.shape != MAPS["verdicts"]:
            raise NetworkError("the switch that runs here is of another version", hint="orchestrator up")
        verdicts.set(index(0), bytes(verdicts.value_size))
        if frames.tag_of(frame) is not None:
            result, after = _run_untagged(program, frame, number)
        else:
            result, after = bpf.run(program, frame, ifindex=number, mark=TRACE_MARK)
        if result == _NOT_RUN:
            raise NetworkError("the switch cannot be given a frame with a VLAN tag")
        told = [Verdict.unpack(raw) for raw in verdicts.each(index(0))]
    return next((one for one in told if one.fate), told[0]), after


@contextlib.contextmanager
def _maps_of(program: int) -> Iterator[dict[str, bpf.Map]]:
    found = bpf.maps_of(program)
    try:
        yield found
    finally:
        for each in found.values():
            each.close()


def _object_file() -> Path:
    return paths.bpf() / "untag.bpf.o"


def _run_untagged(program: int, frame: bytes, number: int) -> tuple[int, bytes]:
    if not _object_file().exists():
        raise NetworkError(f"{_object_file()} is not there", hint="make -C bpf")
    with bpf.Object(_object_file()) as untag, contextlib.ExitStack() as stack:
        tried, first = untag.map(_TRIED), untag.program(_UNTAG)
        stack.callback(tried.close)
        stack.callback(os.close, first)
        tried.set(index(0), index(program))
        return bpf.run(first, frame, ifindex=number, mark=TRACE_MARK)
