"""``switch``: what the switch of each host is, carries and counts."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

from orchestrator.cli import capture, output, trace
from orchestrator.cli.output import Format
from orchestrator.cli.session import (
    EveryOption,
    FileOption,
    LabOption,
    OutputOption,
    WatchOption,
    agent_of,
    complete_guests,
    current,
    guest_of,
    transports,
)
from orchestrator.errors import HostError, OrchestratorError, StateError, TakenError
from orchestrator.hosts.transport import Transport
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.switch.layout import REASONS
from orchestrator.switch.rules import group_id

app = typer.Typer(help="Show what the switch carries, drops and counts, and why.", no_args_is_help=True)

OneGuestArgument = Annotated[
    str | None, typer.Argument(help="Only this guest. Default: all.", autocompletion=complete_guests)
]
LINKS = {"host": "(host)", "underlay": "(other hosts)"}
"""The links of a network that are no guest's, and how they are called."""


def register(parent: typer.Typer) -> None:
    for command in (show, ports, stats, trace.trace, capture.capture):
        app.command()(command)
    parent.add_typer(app, name="switch")


# -- asking the hosts ------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the hosts tell: by host, the networks as :meth:`NetworkStats.to_json` gives them, and pairs.

    :ivar clocks: seconds, of each host's own clock.
    """

    networks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pairs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    clocks: dict[str, float] = field(default_factory=dict)
    problems: dict[str, OrchestratorError] = field(default_factory=dict)

    def each(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Host and network."""
        for host, networks in self.networks.items():
            for network in networks:
                yield host, network

    def ports(self, guest: str | None) -> list[dict[str, Any]]:
        """Every port, or those of a guest, with its host and what carries its network."""
        return [
            {"host": host, "datapath": network["datapath"], **port}
            for host, network in self.each()
            for port in network["ports"]
            if guest in (None, port["guest"])
        ]

    def links(self) -> list[dict[str, Any]]:
        """What is counted at the links of the networks that are no guest's."""
        return [
            {
                "host": host,
                "datapath": network["datapath"],
                "network": network["network"],
                "link": link,
                **network[link],
            }
            for host, network in self.each()
            for link in LINKS
            if network[link]
        ]

    def talk(self, guest: str | None) -> list[dict[str, Any]]:
        """Every pair, or those of a guest, with the host that has counted it."""
        return [
            {"host": host, **pair}
            for host, pairs in self.pairs.items()
            for pair in pairs
            if guest in (None, pair["sender"], pair["receiver"])
        ]


def _look(lab: ResolvedLab, hosts: Iterable[str], *, pairs: bool = False) -> Seen:
    """:raise OrchestratorError: a name of ours belongs to somebody else, or we lack the rights to look."""
    params = {"names": {nic.mac: guest.name for guest in lab.guests.values() for nic in guest.nics}, "pairs": pairs}
    groups = {f"{group_id(nic.group):08x}": nic.group for guest in lab.guests.values() for nic in guest.nics}
    wanted = list(hosts)

    def ask(transport: Transport) -> dict[str, Any] | OrchestratorError:
        try:
            with agent_of(transport) as agent:
                return dict(agent.call("switch.stats", params))
        except (TakenError, StateError):
            raise
        except OrchestratorError as error:
            return error

    seen = Seen()
    with transports(lab) as opened, ThreadPoolExecutor(max(1, len(wanted)), "switch") as pool:
        for host, answer in zip(wanted, pool.map(ask, [opened[name] for name in wanted]), strict=True):
            if isinstance(answer, OrchestratorError):
                answer.message = f"host {host}: {answer.message.removeprefix(f'host {host}: ')}"
                seen.problems[host] = answer
                continue
            seen.networks[host], seen.clocks[host] = answer["networks"], answer["clock"]
            seen.pairs[host] = answer["pairs"] or []
            for network in answer["networks"]:
                for port in network["ports"]:
                    port["group"] = groups.get(port["group"], port["group"])
    return seen


def _hosts(lab: ResolvedLab, guest: str | None) -> list[str]:
    return list(lab.hosts) if guest is None else [guest_of(lab, guest).host]


def _finish(seen: Seen, output_format: Format, data: Any, shown: RenderableType) -> None:
    """Print it, and end with the status of hosts that do not answer."""
    if output_format is Format.TABLE:
        output.stdout.print(_with_problems(shown, seen))
    else:
        output.data(data, output_format)
        for problem in seen.problems.values():
            output.error(problem)
    if seen.problems:
        raise typer.Exit(HostError.exit_code)


def _with_problems(shown: RenderableType, seen: Seen) -> RenderableType:
    lines: list[RenderableType] = [shown]
    for problem in seen.problems.values():
        lines += ["", output.bad(problem.message)]
    return Group(*lines)


# -- show ------------------------------------------------------------------------------------------------------------


def show(file: FileOption = None, lab_name: LabOption = None, output_format: OutputOption = Format.TABLE) -> None:
    """Show each network on each host: what carries it, and what it has carried."""
    lab, _ = current(file, lab_name)
    seen = _look(lab, lab.hosts)
    data = [
        {
            "host": host,
            "problem": str(seen.problems[host]) if host in seen.problems else None,
            "networks": [_summary(lab, network) for network in seen.networks.get(host, [])],
        }
        for host in lab.hosts
    ]
    _finish(seen, output_format, data, _show(data))


def _summary(lab: ResolvedLab, network: dict[str, Any]) -> dict[str, Any]:
    """A network without its ports, and with the sum of what these have sent and got."""
    fields = ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "overruns")
    ports = network["ports"]
    dropped: dict[str, int] = {}
    for counted in (*ports, *(network[link] for link in LINKS if network[link])):
        for reason, count in counted["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    totals = {name: sum(port[name] for port in ports) for name in fields}
    wish = lab.networks.get(network["network"])
    return {
        **{key: value for key, value in network.items() if key not in ("ports", *LINKS)},
        "lacks": network["lacks"] if wish is None or wish.datapath != "bridge" else None,
        "ports": len(ports),
        "totals": totals | {"dropped": dropped},
    }


def _show(data: Sequence[Mapping[str, Any]]) -> RenderableType:
    columns = ["HOST", "NETWORK", "DATAPATH", "PORTS", "LISTED", "RULES", "UPLINK", "MULTICAST", "GATEWAY", "MTU"]
    rows, lines = [], []
    for host in data:
        for each in host["networks"]:
            totals = each["totals"]
            rows.append(
                [
                    host["host"],
                    each["network"],
                    output.warn(each["datapath"]) if each["lacks"] else each["datapath"],
                    str(each["ports"]),
                    _known(each["listed"]),
                    _known(each["rules"]),
                    "yes" if each["uplink"] else "no",
                    each["multicast"],
                    " ".join(each["gateway"]),
                    str(each["mtu"]),
                    _amount(totals["tx_packets"], totals["tx_bytes"]),
                    _drops(totals["dropped"], each["datapath"]),
                ]
            )
            if each["lacks"]:
                lines += ["", output.warn(f"{host['host']}: {each['network']} is bridged: {each['lacks']}")]
    return Group(output.table([*columns, "SENT", "DROPPED"], rows), *lines)


# -- ports -----------------------------------------------------------------------------------------------------------

IDENTITY = (
    "host", "datapath", "guest", "network", "tap", "mac", "plugged", "addresses",
    "vlan", "trunk", "group", "isolated", "rate_out", "rate_in", "mirror", "vhost_user",
)  # fmt: skip


def ports(
    guest: OneGuestArgument = None,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
) -> None:
    """Show who is behind each port, and what he may send and to whom."""
    lab, _ = current(file, lab_name)
    seen = _look(lab, _hosts(lab, guest))
    data = [{key: port[key] for key in IDENTITY} for port in seen.ports(guest)]
    _finish(seen, output_format, data, _ports(data))


def _ports(data: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        [
            port["guest"],
            port["network"],
            port["host"],
            port["tap"],
            port["mac"],
            " ".join(port["addresses"]) or "-" if port["plugged"] else output.bad("not plugged in"),
            " ".join(_policy(port)) or "-",
        ]
        for port in data
    ]
    return output.table(["GUEST", "NETWORK", "HOST", "TAP", "MAC", "ADDRESSES", "POLICY"], rows)


def _policy(port: Mapping[str, Any]) -> Iterator[str]:
    if port["vlan"]:
        yield f"vlan {port['vlan']}"
    if port["trunk"]:
        yield f"trunk {','.join(map(str, port['trunk']))}"
    if port["group"]:
        yield f"group {port['group']}"
    if port["isolated"]:
        yield "isolated"
    for word, rate in (("out", port["rate_out"]), ("in", port["rate_in"])):
        if rate:
            yield f"{word} {_bits(rate)}"
    if port["mirror"]:
        yield f"mirror to {port['mirror']}"
    if served := port["vhost_user"]:
        state = f": {served['failed']}" if served["failed"] else "" if served["connected"] else ", not connected"
        yield f"vhost-user{state}"


# -- stats -----------------------------------------------------------------------------------------------------------


def stats(
    guest: OneGuestArgument = None,
    file: FileOption = None,
    lab_name: LabOption = None,
    output_format: OutputOption = Format.TABLE,
    pairs: Annotated[bool, typer.Option("--pairs", help="Who sends how much to whom.")] = False,
    drops: Annotated[bool, typer.Option("--drops", help="What is dropped and why.")] = False,
    watch: WatchOption = False,
    every: EveryOption = 2.0,
) -> None:
    """Show what each guest has sent and got, what of it was dropped, and when it was last seen."""
    lab, _ = current(file, lab_name)
    hosts = _hosts(lab, guest)
    before: Seen | None = None

    def look() -> RenderableType:
        nonlocal before
        earlier, before = before, _look(lab, hosts, pairs=pairs)
        return _with_problems(_stats(before, guest, _Rates(earlier, before), pairs=pairs, drops=drops), before)

    if watch and output_format is Format.TABLE:
        output.watch(look, every)
    seen = _look(lab, hosts, pairs=pairs)
    data: dict[str, Any] = {"ports": seen.ports(guest)}
    data |= {} if guest else {"links": seen.links()}
    data |= {"pairs": seen.talk(guest)} if pairs else {}
    data |= {"drops": list(_all_drops(seen, guest))} if drops else {}
    _finish(seen, output_format, data, _stats(seen, guest, None, pairs=pairs, drops=drops))


class _Rates:
    """What is between two looks, for each second."""

    def __init__(self, earlier: Seen | None, now: Seen) -> None:
        self._earlier: dict[tuple[str, ...], dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        if earlier is None:
            return
        self._earlier = {_key(row): row for row in (*earlier.ports(None), *earlier.links(), *earlier.talk(None))}
        self._seconds = {
            host: now.clocks[host] - clock for host, clock in earlier.clocks.items() if host in now.clocks
        }

    def amount(self, row: Mapping[str, Any], packets: str, size: str) -> str:
        """Packets, and bits; a link that was made anew since begins at 0."""
        before, seconds = self._earlier.get(_key(row)), self._seconds.get(row["host"], 0)
        if before is None or seconds <= 0:
            return "-"
        frames, octets = (max(0, row[name] - before[name]) / seconds for name in (packets, size))
        return f"{frames:.0f} ({_bits(octets * 8)})"

    def drops(self, row: Mapping[str, Any]) -> str:
        before, seconds = self._earlier.get(_key(row)), self._seconds.get(row["host"], 0)
        if before is None or seconds <= 0:
            return "-"
        return f"{max(0, sum(row['dropped'].values()) - sum(before['dropped'].values())) / seconds:.0f}"


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a port, a link or a pair from the others."""
    names = ("host", "network", "tap", "link", "sender_mac", "receiver_mac")
    return tuple(str(row.get(name)) for name in names)


def _stats(seen: Seen, guest: str | None, rates: _Rates | None, *, pairs: bool, drops: bool) -> RenderableType:
    parts: list[RenderableType] = []
    if drops:
        parts += [_drop_table(seen, guest), ""]
    if pairs:
        parts += [_pair_table(seen, guest, rates), ""]
    if not parts:
        rows = [*seen.ports(guest), *([] if guest else seen.links())]
        parts = [_link_table(rows) if rates is None else _rate_table(rows, rates), ""]
    return Group(*parts[:-1])


def _link_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    columns = ["GUEST", "NETWORK", "HOST", "SENT", "RECEIVED", "ANSWERED", "DROPPED", "OVERRUNS", "LAST SEEN"]
    return output.table(
        columns,
        [
            [
                _who(row),
                row["network"],
                row["host"],
                _amount(row["tx_packets"], row["tx_bytes"]),
                _amount(row["rx_packets"], row["rx_bytes"]),
                _known(row["answered"]),
                _drops(row["dropped"], row["datapath"]),
                _known(row.get("overruns")),
                _ago(row["last_seen_seconds_ago"], row["datapath"]),
            ]
            for row in rows
        ],
    )


def _rate_table(rows: Sequence[Mapping[str, Any]], rates: _Rates) -> RenderableType:
    columns = ["GUEST", "NETWORK", "HOST", "SENT", "SENT/s", "RECEIVED", "RECEIVED/s", "DROPPED", "DROPPED/s"]
    return output.table(
        [*columns, "LAST SEEN"],
        [
            [
                _who(row),
                row["network"],
                row["host"],
                _amount(row["tx_packets"], row["tx_bytes"]),
                rates.amount(row, "tx_packets", "tx_bytes"),
                _amount(row["rx_packets"], row["rx_bytes"]),
                rates.amount(row, "rx_packets", "rx_bytes"),
                _drops(row["dropped"], row["datapath"]),
                rates.drops(row),
                _ago(row["last_seen_seconds_ago"], row["datapath"]),
            ]
            for row in rows
        ],
    )


def _pair_table(seen: Seen, guest: str | None, rates: _Rates | None) -> RenderableType:
    rows = []
    for pair in seen.talk(guest):
        speed = [] if rates is None else [rates.amount(pair, "packets", "bytes")]
        who = [_name(pair[side], pair[f"{side}_mac"]) for side in ("sender", "receiver")]
        amount, ago = _amount(pair["packets"], pair["bytes"]), _ago(pair["last_seen_seconds_ago"], "ebpf")
        rows.append([*who, pair["network"] or "-", pair["host"], amount, *speed, ago])
    more = [] if rates is None else ["SENT/s"]
    return output.table(["FROM", "TO", "NETWORK", "HOST", "SENT", *more, "LAST SEEN"], rows)


def _all_drops(seen: Seen, guest: str | None) -> Iterator[dict[str, Any]]:
    for row in (*seen.ports(guest), *([] if guest else seen.links())):
        for reason, count in row["dropped"].items():
            yield {
                "host": row["host"],
                "network": row["network"],
                "guest": row.get("guest"),
                "link": row.get("link"),
                "reason": reason,
                "packets": count,
                "meaning": REASONS.get(reason),
            }


def _drop_table(seen: Seen, guest: str | None) -> RenderableType:
    rows = [
        [
            _who(drop),
            drop["network"],
            drop["host"],
            drop["reason"],
            str(drop["packets"]),
            escape(drop["meaning"] or ""),
        ]
        for drop in _all_drops(seen, guest)
    ]
    return output.table(["GUEST", "NETWORK", "HOST", "REASON", "DROPPED", "MEANING"], rows)


# -- cells -----------------------------------------------------------------------------------------------------------


def _who(row: Mapping[str, Any]) -> str:
    return str(row.get("guest") or output.dim(LINKS[row["link"]]))


def _name(name: str | None, mac: str) -> str:
    return name or output.dim(mac)


def _known(number: int | None) -> str:
    return "-" if number is None else str(number)


def _amount(packets: int, size: int) -> str:
    return f"{packets} ({_bytes(size)})"


def _drops(dropped: Mapping[str, int], datapath: str) -> str:
    """The sum, and the reasons, the most frequent first; a bridge gives none."""
    if not dropped:
        return "-" if datapath == "bridge" else "0"
    each = sorted(dropped.items(), key=lambda item: -item[1])
    return f"{sum(dropped.values())} ({', '.join(f'{reason} {count}' for reason, count in each)})"


def _ago(seconds: float | None, datapath: str) -> str:
    if seconds is None:
        return "-" if datapath == "bridge" else "never"
    if seconds < 10:
        return f"{seconds:.1f} s ago"
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


def _scaled(value: float, unit: str, factor: int, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        if value < factor or prefix == prefixes[-1]:
            digits = 1 if prefix and value % 1 else 0
            return f"{value:.{digits}f} {prefix}{unit}"
        value /= factor
    raise AssertionError("the last prefix is for whatever is left")


def _bytes(value: float) -> str:
    return _scaled(value, "B", 1024, ("", "Ki", "Mi", "Gi", "Ti"))


def _bits(value: float) -> str:
    """Bits per second."""
    return _scaled(value, "bit/s", 1000, ("", "k", "M", "G"))
