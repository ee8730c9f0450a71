"""``switch trace``: what the switches on the way would do with a datagram, and why."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_interface, ip_network
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.output import Format
from orchestrator.cli.session import (
    FileOption,
    LabOption,
    OutputOption,
    agent_of,
    complete_guests,
    current,
    guest_of,
    transports,
)
from orchestrator.errors import NotFoundError, OrchestratorError
from orchestrator.hosts.transport import Transport
from orchestrator.spec.base import parse_mac
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab, ResolvedNic, ResolvedParty
from orchestrator.switch.frames import BROADCAST, FIRST_EPHEMERAL, Datagram, Protocol, group_mac
from orchestrator.switch.layout import Address, link_local
from orchestrator.switch.model import PROTOCOLS

WITH_PORTS = (Protocol.TCP, Protocol.UDP)
QUESTIONS = {Protocol.ARP: 4, Protocol.ND: 6}
"""Protocols that ask for a MAC, and the family that each is for."""
REACHES = {"guest": True, "answer": True, "drop": False, "none": False}
"""Fate → whether it arrives; of the others the switch cannot tell."""
_NAMES = {number: name for name, number in PROTOCOLS.items()} | {58: "icmp"}


def trace(
    guest: Annotated[str, typer.Argument(help="The guest that sends.", autocompletion=complete_guests)],
    target: Annotated[str, typer.Argument(help="A guest, or an address.", autocompletion=complete_guests)],
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
    protocol: Annotated[
        Protocol | None, typer.Option("--protocol", "-p", help="arp and nd: the question for a MAC. Default: icmp.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port of the receiver.")] = None,
    source_port: Annotated[
        int, typer.Option("--source-port", min=1, max=65535, help="Port of the sender.")
    ] = FIRST_EPHEMERAL,
    source: Annotated[
        str | None,
        typer.Option("--from", envvar="ORCHESTRATOR_SWITCH_TRACE_FROM", help="Another address than the sender's."),
    ] = None,
    mac: Annotated[str | None, typer.Option("--mac", help="Another MAC than the sender's.")] = None,
    vlan: Annotated[int | None, typer.Option("--vlan", min=1, max=4094, help="VLAN of the frame's tag.")] = None,
    network: Annotated[str | None, typer.Option("--network", help="Where both are in several.")] = None,
    ipv6: Annotated[
        bool | None, typer.Option("--ipv6/--ipv4", help="Where the target has both. Default: IPv4.")
    ] = None,
) -> None:
    """Tell what would become of a datagram of a guest, and why. Nothing is sent, and nothing counted.

    The programs that run are asked, host after host. Example: orchestrator switch trace web db -p tcp --port 80
    """
    chosen = protocol or (Protocol.TCP if port else Protocol.ICMP)
    if port is None and chosen in WITH_PORTS:
        raise typer.BadParameter(f"{chosen} has ports: name the receiver's", param_hint="--port")
    if port is not None and chosen not in WITH_PORTS:
        raise typer.BadParameter(f"{chosen} has no ports", param_hint="--port")
    family = QUESTIONS.get(chosen)
    if family is not None and ipv6 not in (None, family == 6):
        raise typer.BadParameter(f"{chosen} is for IPv{family}", param_hint="--ipv6/--ipv4")
    family = family or (None if ipv6 is None else 6 if ipv6 else 4)
    lab, _ = current(file, lab_name)
    way = _way(lab, guest_of(lab, guest), target, network, family)
    datagram = Datagram(
        protocol=chosen,
        source_mac=_mac(mac) if mac else way.nic.mac,
        target_mac=way.target_mac,
        source=_address(source, "--from") if source else way.source,
        target=way.target,
        port=port or 0,
        source_port=source_port,
        vlan=vlan,
    )
    if datagram.source.version != datagram.target.version:
        raise typer.BadParameter(f"{datagram.target} is of the other family", param_hint="--from")
    told = _told(lab, guest, target, way.nic, datagram)
    problem: OrchestratorError | None = None
    with transports(lab) as hosts:
        try:
            for step in _steps(lab, hosts, lab.guests[guest].host, way.nic, datagram.frame()):
                told["steps"].append(step)
        except OrchestratorError as error:
            problem = error
    if not problem:
        told["reaches"] = REACHES.get(told["steps"][-1]["fate"])
    if output_format is not Format.TABLE:
        output.data(told, output_format)
    elif told["steps"]:
        output.stdout.print(_shown(lab, told))
    if problem:
        raise problem


def _mac(text: str) -> str:
    try:
        return parse_mac(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--mac") from error


def _address(text: str, option: str) -> Address:
    try:
        return ip_address(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no address", param_hint=option) from error


# -- the way ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """By which NIC a guest sends to a target, and with what addresses."""

    nic: ResolvedNic
    source: Address
    target: Address
    target_mac: str


def _own(nic: ResolvedNic, version: int) -> Address | None:
    return next((one for one in map(ip_address, nic.addresses) if one.version == version), None)


def _way(lab: ResolvedLab, guest: ResolvedGuest, target: str, network: str | None, family: int | None) -> _Way:
    """:raise NotFoundError: there is no such target, or none of the guest's NICs can send to it."""
    nics = [nic for nic in guest.nics if network in (None, nic.network)]
    if not nics:
        where = f"network {network}" if network else "any network"
        others = ", ".join(nic.network for nic in guest.nics) or "none"
        raise NotFoundError(f"guest {guest.name} is not in {where}", hint=f"its networks: {others}")
    if target in lab.guests:
        return _way_to_guest(lab, nics, guest, lab.guests[target], family)
    try:
        address = ip_address(target)
    except ValueError as error:
        raise NotFoundError(
            f"{target} is no guest of lab {lab.lab}, and no address", hint=f"its guests: {', '.join(lab.guests)}"
        ) from error
    if family not in (None, address.version):
        raise NotFoundError(f"{address} is no IPv{family} address")
    return _way_to_address(lab, nics, guest, address)


def _way_to_guest(
    lab: ResolvedLab, nics: list[ResolvedNic], guest: ResolvedGuest, target: ResolvedGuest, family: int | None
) -> _Way:
    """By a network that both are in, if there is one, else by way of the gateway."""
    families = (family,) if family else (4, 6)
    near = [(nic, other) for nic in nics for other in target.nics if nic.network == other.network]
    far = [(nic, other) for nic in nics for other in target.nics if nic.network != other.network]
    for pairs in (near, far):
        for version in families:
            for nic, other in pairs:
                source, address = _own(nic, version), _own(other, version)
                if source and address:
                    to = other.mac if pairs is near else lab.networks[nic.network].gateway_mac
                    return _Way(nic, source, address, to)
    kind = f"IPv{family}" if family else "IP"
    raise NotFoundError(f"guests {guest.name} and {target.name} have no {kind} addresses to talk by")


def _way_to_address(lab: ResolvedLab, nics: list[ResolvedNic], guest: ResolvedGuest, address: Address) -> _Way:
    if isinstance(address, IPv6Address) and address.is_link_local:
        nic = nics[0]
        return _Way(nic, link_local(nic.mac), address, _mac_of(lab, nic, address))
    able = [(nic, own) for nic in nics if (own := _own(nic, address.version))]
    if not able:
        raise NotFoundError(
            f"guest {guest.name} has no IPv{address.version} address", hint="orchestrator switch ports"
        )

    def fits(entry: tuple[ResolvedNic, Address]) -> int:
        return 0 if _is_near(entry[0], address) else 1 if lab.networks[entry[0].network].uplink else 2

    nic, own = min(able, key=fits)
    return _Way(nic, own, address, _mac_of(lab, nic, address))


def _is_near(nic: ResolvedNic, address: Address) -> bool:
    """The address lies in the NIC's network, so that the guest sends to it without the gateway."""
    return any(cidr and address in ip_interface(cidr).network for cidr in (nic.ipv4, nic.ipv6))


def _mac_of(lab: ResolvedLab, nic: ResolvedNic, address: Address) -> str:
    """Where the guest would send a frame for the address."""
    if address.is_multicast:
        return group_mac(address)
    net4 = lab.networks[nic.network].ipv4
    if str(address) == "255.255.255.255" or (net4 and address == ip_network(net4).broadcast_address):
        return BROADCAST
    for other in (each for guest in lab.guests.values() for each in guest.nics if each.network == nic.network):
        if str(address) in (*other.addresses, str(link_local(other.mac))):
            return other.mac
    return lab.networks[nic.network].gateway_mac


# -- asking ----------------------------------------------------------------------------------------------------------


def _steps(
    lab: ResolvedLab, transports: Mapping[str, Transport], host: str, nic: ResolvedNic, frame: bytes
) -> Iterator[dict[str, Any]]:
    """What the sender's host would do, and then the one that it sends the frame to.

    :raise OrchestratorError: a host does not answer, or has no such network any more.
    """
    names = {nic.mac: guest.name for guest in lab.guests.values() for nic in guest.nics}
    by_underlay = {each.underlay: each.name for each in lab.hosts.values()}
    params: dict[str, Any] = {"network": nic.network, "tap": nic.tap, "frame": frame.hex()}
    for _ in range(2):  # a frame from another host goes to a guest, or nowhere
        with agent_of(transports[host]) as agent:
            step = agent.call("switch.trace", {**params, "names": names | by_underlay})
        frame_there, there = step.pop("frame"), by_underlay.get(step["to_host"] or "")
        yield {"host": host, "enters_by": params["tap"] or "VXLAN", **step, "to_host": there or step["to_host"]}
        if not frame_there or not there:
            return
        host, params = there, {**params, "tap": None, "frame": frame_there}


def _told(lab: ResolvedLab, guest: str, target: str, nic: ResolvedNic, datagram: Datagram) -> dict[str, Any]:
    return {
        "guest": guest,
        "target": target,
        "network": nic.network,
        "protocol": str(datagram.protocol),
        "source": str(datagram.source),
        "source_mac": datagram.source_mac,
        "source_port": datagram.source_port if datagram.protocol in WITH_PORTS else None,
        "destination": str(datagram.target),
        "port": datagram.port or None,
        "vlan": datagram.vlan,
        "reaches": None,
        "steps": [],
    }


# -- showing ---------------------------------------------------------------------------------------------------------


def _shown(lab: ResolvedLab, told: Mapping[str, Any]) -> RenderableType:
    rows = [[step["host"], step["enters_by"], _colored(step["fate"]), escape(step["next"])] for step in told["steps"]]
    lines: list[RenderableType] = [output.table(["HOST", "ENTERS BY", "FATE", "WHAT HAPPENS"], rows)]
    for step in told["steps"]:
        if step["rule"]:
            lines += [
                "",
                output.dim(f"rule {step['rule']} of {told['network']}: {_rule(lab, told['network'], step)}"),
            ]
    port = f" port {told['port']}" if told["port"] else ""
    what = f"{told['protocol']}{port} from {told['guest']} ({told['source']}) to {told['destination']}"
    answered = told["steps"][-1]["fate"] == "answer"
    match told["reaches"]:
        case True:
            lines += ["", output.good(f"{what}: it {'is answered' if answered else 'arrives'}")]
        case False:
            lines += ["", output.bad(f"{what}: it does not arrive")]
        case _:
            lines += ["", output.warn(f"{what}: the rest is not up to the switch")]
    return Group(*lines)


def _colored(fate: str) -> str:
    arrives = REACHES.get(fate)
    return output.good(fate) if arrives else output.bad(fate) if arrives is False else fate


def _rule(lab: ResolvedLab, network: str, step: Mapping[str, Any]) -> str:
    """The rule as it was resolved: one of the lab file may have become several, and counts as these."""
    rules = lab.networks[network].rules
    if step["rule"] > len(rules):
        return "the lab has no such rule any more"
    rule = rules[step["rule"] - 1]
    words = ["allow" if rule.allow else "deny", _NAMES.get(rule.protocol, str(rule.protocol))]
    if (rule.low, rule.high) != (0, 65535):
        words.append(str(rule.low) if rule.low == rule.high else f"{rule.low}-{rule.high}")
    words += [f"IPv{rule.family}"] if rule.family else []
    return " ".join([*words, "from", _party(lab, rule.sender), "to", _party(lab, rule.receiver)])


def _party(lab: ResolvedLab, party: ResolvedParty) -> str:
    match party.side:
        case "any":
            return "any"
        case "group":
            return f"group:{party.value}"
        case "nic":
            owners = (guest.name for guest in lab.guests.values() for nic in guest.nics if nic.mac == party.value)
            return next(owners, party.value)
    return party.value
