"""Rules as the dispatcher has them: packed, in their order; the first that matches decides."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network

from orchestrator import names
from orchestrator.spec.resolved import ResolvedParty, ResolvedRule
from orchestrator.switch.layout import Party, Rule, Side, packed_mac
from orchestrator.switch.layout import packed as packed_address


def group_id(name: str | None) -> int:
    """The number of an isolation group; 0 for none."""
    return int(names.digest("group", name), 16) or 1 if name else 0


def mask(prefix: int, version: int) -> bytes:
    """The mask of a prefix length, over an address of 16 bytes."""
    bits = prefix + (96 if version == 4 else 0)
    return ((1 << 128) - (1 << (128 - bits))).to_bytes(16, "big")


def _party(party: ResolvedParty) -> bytes:
    match party.side:
        case "prefix":
            network = ip_network(party.value)
            entry = Party(
                Side.PREFIX,
                address=packed_address(network.network_address),
                mask=mask(network.prefixlen, network.version),
            )
        case "nic":
            entry = Party(Side.NIC, mac=packed_mac(party.value))
        case "group":
            entry = Party(Side.GROUP, group=group_id(party.value))
        case "any":
            entry = Party()
    return entry.pack()


def packed(rules: Sequence[ResolvedRule]) -> list[bytes]:
    return [
        Rule(
            sender=_party(rule.sender),
            receiver=_party(rule.receiver),
            low=rule.low,
            high=rule.high,
            protocol=rule.protocol,
            allow=int(rule.allow),
            family=rule.family,
        ).pack()
        for rule in rules
    ]


def digest(entries: Sequence[bytes]) -> str:
    """What tells these rules from others; empty for none."""
    return names.digest(*(entry.hex() for entry in entries)) if entries else ""
