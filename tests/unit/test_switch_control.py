"""Networks: how a host takes part, and what of that is not so."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.spec.resolved import ResolvedLab
from orchestrator.switch import control
from orchestrator.switch.membership import Membership, NetworkFacts, differences
from orchestrator.testing import perfect
from tests.unit.labs import demo, resolved


def lab(**network: Any) -> ResolvedLab:
    """Guests on alpha and beta share ``lan``; only alpha has ``wan``; gamma has no guest."""
    guests = {"ann": {"host": "alpha", "nics": ["lan", "wan"]}, "bob": {"host": "beta", "nics": ["lan"]}}
    return resolved(
        {
            "lab": "nets",
            "hosts": {
                "alpha": {},
                "beta": {"kind": "ssh", "address": "192.0.2.2", "underlay": "192.0.2.2"},
                "gamma": {},
            },
            "networks": {
                "lan": {"ipv4": "10.1.0.0/24", "ipv6": "fd01::/64", **network},
                "wan": {"ipv4": "10.2.0.0/24"},
                "empty": {"ipv4": "10.3.0.0/24"},
            },
            "guests": guests,
        }
    )


def members(made: ResolvedLab, host: str) -> dict[str, Membership]:
    return {member.network.name: member for member in control.wanted(made, host)}


def facts(made: ResolvedLab, host: str = "alpha", network: str = "lan") -> NetworkFacts:
    (found,) = [each for each in perfect(made).hosts[host].networks if each.name == network]
    return found


# -- membership ------------------------------------------------------------------------------------------------------


def test_host_carries_the_networks_that_its_guests_are_on() -> None:
    assert {host: sorted(members(lab(), host)) for host in ("alpha", "beta", "gamma")} == {
        "alpha": ["lan", "wan"],
        "beta": ["lan"],
        "gamma": [],
    }


def test_peers_are_the_other_hosts_that_carry_the_network() -> None:
    made = lab()

    assert members(made, "alpha")["lan"].peers == ("192.0.2.2",)
    assert members(made, "beta")["lan"].peers == (made.hosts["alpha"].underlay,)
    assert members(made, "alpha")["wan"].peers == ()
    assert members(made, "alpha")["lan"].local == made.hosts["alpha"].underlay


@pytest.mark.parametrize(
    ("uplink", "alpha", "beta"), [(False, "no", "no"), (True, "all", "bridge")], ids=["isolated", "uplink"]
)
def test_forwarding_is_for_uplinks_and_whole_only_where_the_namespace_is_ours(
    uplink: bool, alpha: str, beta: str
) -> None:
    made = lab(uplink=uplink)

    assert members(made, "alpha")["lan"].forward == alpha
    assert members(made, "beta")["lan"].forward == beta
    assert members(made, "alpha")["wan"].forward == "no"


# -- what differs ----------------------------------------------------------------------------------------------------


def test_network_that_is_as_wished_has_no_differences() -> None:
    made = lab()

    assert control.changes(members(made, "alpha")["lan"], perfect(made).hosts["alpha"].networks) == []


def test_network_that_is_not_there_is_told_apart_from_one_without_differences() -> None:
    made = lab()

    assert control.changes(members(made, "alpha")["lan"], [facts(made, network="wan")]) is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"up": False}, "bridge is down"),
        ({"mtu": 9000}, "mtu: 9000 → 1450"),
        ({"bridge": "br0"}, "bridge: br0 → BRIDGE"),
        ({"mac": "02:00:00:00:00:01"}, "gateway MAC: 02:00:00:00:00:01 → MAC"),
        ({"addresses": []}, "gateway: none → 10.1.0.1/24, fd01::1/64"),
        ({"addresses": ["10.9.0.1/24"]}, "gateway: 10.9.0.1/24 → 10.1.0.1/24, fd01::1/64"),
        ({"peers": []}, "peers: none → 192.0.2.2"),
        ({"peers": ["192.0.2.2", "192.0.2.9"]}, "peers: 192.0.2.2, 192.0.2.9 → 192.0.2.2"),
        ({"vni": 7}, "VNI: 7 → VNI"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_difference_is_told(change: dict[str, Any], line: str) -> None:
    made = lab(mtu=1450)
    member = members(made, "alpha")["lan"]

    found = differences(replace(facts(made), **change), member)

    network = member.network
    line = line.replace("→ BRIDGE", f"→ {network.bridge}").replace("→ MAC", f"→ {network.gateway_mac}")
    assert found == [line.replace("→ VNI", f"→ {network.vni}")]


def test_network_of_one_host_needs_no_vxlan() -> None:
    made = lab()
    seen = facts(made, network="wan")

    assert seen.vxlan is None
    assert differences(seen, members(made, "alpha")["wan"]) == []


def test_uplink_switched_on_is_a_change_of_the_network() -> None:
    seen = facts(lab())

    assert control.changes(members(lab(uplink=True), "alpha")["lan"], [seen])


# -- what should not be ----------------------------------------------------------------------------------------------


def test_unwanted_are_the_networks_without_a_guest_on_the_host() -> None:
    made = lab()
    seen = [replace(facts(made), name=name) for name in ("lan", "wan", "old")]

    assert control.unwanted(made, "alpha", seen) == ["old"]
    assert control.unwanted(made, "beta", seen) == ["wan", "old"]
    assert control.unwanted(made, "gamma", seen) == ["lan", "wan", "old"]


def test_host_that_is_no_longer_in_the_lab_should_carry_nothing() -> None:
    assert control.unwanted(lab(), "former", [facts(lab())]) == ["lan"]


# -- ports -----------------------------------------------------------------------------------------------------------


def test_no_port_is_missing_where_all_is_well() -> None:
    made = demo()
    seen = perfect(made).hosts["alpha"].networks

    assert control.ports_missing(made.guests["ann"], made, seen) == []


def test_missing_ports_are_told_by_their_taps() -> None:
    made = lab()
    seen = perfect(made).hosts["alpha"].networks
    lan, wan = made.guests["ann"].nics
    del seen[0].ports[lan.tap]

    assert control.ports_missing(made.guests["ann"], made, seen) == [lan.tap]
    assert control.ports_missing(made.guests["ann"], made, []) == [lan.tap, wan.tap]


def test_left_ports_are_those_of_the_guest_that_are_not_kept() -> None:
    made = lab()
    seen = perfect(made).hosts["alpha"].networks
    seen[0].ports["ot-other"] = "annabel/02:00:00:00:00:01"
    lan, wan = made.guests["ann"].nics

    assert control.ports_left("ann", [], seen) == [lan.tap, wan.tap]
    assert control.ports_left("ann", [wan.tap], seen) == [lan.tap]
    assert control.ports_left("bob", [], seen) == []


def test_facts_survive_the_way_to_the_command_line() -> None:
    seen = facts(lab())

    assert NetworkFacts.from_json(seen.to_json()) == seen
