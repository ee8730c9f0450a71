"""Lab file → resolved lab: addresses, MACs, names and MTUs, and that they stay."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab, ResolvedNic
from tests.unit.labs import demo, lab_changes, lab_files, one_guest, resolved


def lab(guests: Mapping[str, Any], networks: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A lab file with guests on ``alpha``, on the network ``lan`` unless it says otherwise."""
    return {
        "lab": "made",
        "hosts": {"alpha": {}, "beta": {}},
        "networks": networks or {"lan": {"ipv4": "10.1.0.0/24", "ipv6": "fd01::/64"}},
        "guests": {name: {"host": "alpha", "nics": ["lan"], **(settings or {})} for name, settings in guests.items()},
        **more,
    }


def addresses(made: ResolvedLab) -> dict[str, list[str | None]]:
    return {guest.name: [nic.ipv4 for nic in guest.nics] for guest in made.guests.values()}


def nics(made: ResolvedLab) -> list[ResolvedNic]:
    return [nic for guest in made.guests.values() for nic in guest.nics]


def guest(made: ResolvedLab, name: str = "ann") -> ResolvedGuest:
    return made.guests[name]


# -- addresses -------------------------------------------------------------------------------------------------------


def test_addresses_are_assigned_in_the_order_of_the_file_above_the_gateway() -> None:
    made = resolved(lab({"zoe": {}, "ann": {}}))

    assert [(nic.ipv4, nic.ipv6) for nic in nics(made)] == [
        ("10.1.0.2/24", "fd01::2/64"),
        ("10.1.0.3/24", "fd01::3/64"),
    ]
    assert (made.networks["lan"].gateway4, made.networks["lan"].gateway6) == ("10.1.0.1/24", "fd01::1/64")


def test_fixed_addresses_are_kept_and_stepped_over() -> None:
    fixed = {"nics": [{"network": "lan", "ipv4": "10.1.0.2", "ipv6": "fd01::9"}]}

    made = resolved(lab({"ann": {}, "bob": fixed, "eve": {}}))

    assert addresses(made) == {"ann": ["10.1.0.3/24"], "bob": ["10.1.0.2/24"], "eve": ["10.1.0.4/24"]}
    assert guest(made, "bob").nics[0].ipv6 == "fd01::9/64"


def test_network_without_addresses_gives_none() -> None:
    made = resolved(lab({"ann": {}}, {"lan": {}}))

    nic = guest(made).nics[0]
    assert (nic.ipv4, nic.ipv6, nic.gateway4, nic.gateway6, nic.addresses) == (None, None, None, None, [])


def test_guest_may_have_several_nics_on_one_network() -> None:
    made = resolved(lab({"ann": {"nics": ["lan", "lan"]}}))

    assert addresses(made) == {"ann": ["10.1.0.2/24", "10.1.0.3/24"]}
    assert len({nic.mac for nic in nics(made)}) == 2


def test_guest_added_in_the_middle_moves_nobody() -> None:
    before = resolved(lab({"ann": {}, "eve": {}}))

    after = resolved(lab({"ann": {}, "bob": {}, "eve": {}}), before)

    assert addresses(after) == {"ann": ["10.1.0.2/24"], "bob": ["10.1.0.4/24"], "eve": ["10.1.0.3/24"]}


def test_removed_guest_moves_nobody_and_its_address_is_free() -> None:
    before = resolved(lab({"ann": {}, "bob": {}, "eve": {}}))
    without = resolved(lab({"bob": {}, "eve": {}}), before)

    after = resolved(lab({"bob": {}, "eve": {}, "gil": {}}), without)

    assert addresses(without) == {"bob": ["10.1.0.3/24"], "eve": ["10.1.0.4/24"]}
    assert addresses(after)["gil"] == ["10.1.0.2/24"]


def test_nics_reordered_keep_their_addresses_and_macs() -> None:
    networks = {"lan": {"ipv4": "10.1.0.0/24"}, "wan": {"ipv4": "10.2.0.0/24"}}
    before = resolved(lab({"bob": {}, "ann": {"nics": ["lan", "wan"]}}, networks))

    after = resolved(lab({"bob": {}, "ann": {"nics": ["wan", "lan"]}}, networks), before)

    assert guest(after).nics == list(reversed(guest(before).nics))


def test_newly_fixed_address_takes_precedence_over_an_assigned_one() -> None:
    before = resolved(lab({"ann": {}, "bob": {}}))

    after = resolved(lab({"ann": {}, "bob": {"nics": [{"network": "lan", "ipv4": "10.1.0.2"}]}}), before)

    assert addresses(after) == {"ann": ["10.1.0.3/24"], "bob": ["10.1.0.2/24"]}


@pytest.mark.parametrize(("cidr", "kept"), [("10.1.0.0/16", "10.1.0.3/16"), ("10.9.0.0/24", "10.9.0.2/24")])
def test_network_renumbered_keeps_what_still_fits(cidr: str, kept: str) -> None:
    before = resolved(lab({"ann": {}, "bob": {}}))

    after = resolved(lab({"bob": {}}, {"lan": {"ipv4": cidr}}), before)

    assert addresses(after) == {"bob": [kept]}


@pytest.mark.parametrize(
    ("network", "room"), [({"ipv4": "10.1.0.0/30"}, 1), ({"ipv4": "10.1.0.0/29"}, 5), ({"ipv6": "fd01::/126"}, 2)]
)
def test_exhausted_network_is_an_error_that_names_it(network: dict[str, str], room: int) -> None:
    guests = {f"g{number}": {} for number in range(room)}
    assert len(resolved(lab(guests, {"lan": network})).guests) == room

    with pytest.raises(SpecError, match=r"networks\.lan\.ipv[46]: .* has no address left") as caught:
        resolved(lab({**guests, "more": {}}, {"lan": network}))

    assert caught.value.hint == "use a larger network"


def test_full_network_still_resolves_when_it_was_full_before() -> None:
    guests = {f"g{number}": {} for number in range(5)}
    before = resolved(lab(guests, {"lan": {"ipv4": "10.1.0.0/29"}}))

    assert addresses(resolved(lab(dict(reversed(guests.items())), {"lan": {"ipv4": "10.1.0.0/29"}}), before)) == (
        addresses(before)
    )


@given(lab_files())
def test_addresses_are_of_their_network_and_nobody_elses(data: dict[str, Any]) -> None:
    made = resolved(data)

    for family in ("ipv4", "ipv6"):
        taken = [(nic.network, getattr(nic, family)) for nic in nics(made) if getattr(nic, family)]
        taken += [
            (network.name, getattr(network, f"gateway{family[-1]}"))
            for network in made.networks.values()
            if getattr(network, family)
        ]
        assert len(set(taken)) == len(taken)
        for network, cidr in taken:
            whole = ip_network(str(getattr(made.networks[network], family)))
            assert ip_interface(cidr).network == whole
            assert ip_interface(cidr).ip not in (
                whole.network_address,
                *([whole.broadcast_address] * (family < "ipv6")),
            )


@given(lab_changes())
def test_what_was_assigned_stays_where_it_still_fits(change: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before = resolved(change[0])
    after = resolved(change[1], before)

    kept = before.assignments()
    for nic_guest in after.guests.values():
        for nic in nic_guest.nics:
            address = kept.get((nic_guest.name, nic.mac, "ipv4"))
            if address and nic.ipv4:
                assert nic.ipv4.split("/")[0] == address


@given(lab_files(), st.randoms(use_true_random=False))
def test_order_of_the_file_does_not_matter_the_second_time(data: dict[str, Any], chance: random.Random) -> None:
    before = resolved(data)
    mixed = {key: dict(chance.sample(list(part.items()), len(part))) for key, part in data.items() if key != "lab"}

    after = resolved({"lab": data["lab"], **mixed, "hosts": data["hosts"]}, before)

    assert {name: made.nics for name, made in after.guests.items()} == {
        name: made.nics for name, made in before.guests.items()
    }


def test_resolving_again_changes_nothing() -> None:
    made = demo()

    assert ResolvedLab.model_validate_json(made.model_dump_json()) == made


# -- MACs, links, gateways, MTUs -------------------------------------------------------------------------------------


@given(lab_files())
def test_macs_and_links_are_distinct_and_valid(data: dict[str, Any]) -> None:
    made = resolved(data)

    macs = [nic.mac for nic in nics(made)] + [network.gateway_mac for network in made.networks.values()]
    links = [nic.tap for nic in nics(made)]
    links += [link for network in made.networks.values() for link in (network.bridge, network.vxlan)]
    assert len(set(macs)) == len(macs)
    assert len(set(links)) == len(links)
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)
    assert all(len(link.encode()) <= 15 for link in links)
    assert all(0 < network.vni < 1 << 24 for network in made.networks.values())


def test_mac_does_not_depend_on_host_or_place_in_the_file() -> None:
    first = resolved(lab({"ann": {}, "bob": {}}))
    second = resolved(lab({"bob": {}, "ann": {"host": "beta"}}))

    assert guest(first).nics[0].mac == guest(second).nics[0].mac


def test_mac_of_the_file_is_taken() -> None:
    made = one_guest(nics=[{"network": "lan", "mac": "02-AA-00-00-00-01"}])

    assert guest(made).nics[0].mac == "02:aa:00:00:00:01"


def test_bridge_of_the_file_is_taken() -> None:
    made = resolved(lab({"ann": {}}, {"lan": {"bridge": "br-lan"}}))

    assert made.networks["lan"].bridge == "br-lan"


def test_gateway_is_given_by_the_first_nic_with_an_uplink_only() -> None:
    networks = {
        "lan": {"ipv4": "10.1.0.0/24"},
        "wan": {"ipv4": "10.2.0.0/24", "ipv6": "fd02::/64", "uplink": True},
        "second": {"ipv4": "10.3.0.0/24", "uplink": True},
    }

    made = resolved(lab({"ann": {"nics": ["lan", "wan", "second", "wan"]}, "bob": {}}, networks))

    assert [(nic.gateway4, nic.gateway6) for nic in guest(made).nics] == [
        (None, None),
        ("10.2.0.1", "fd02::1"),
        (None, None),
        (None, None),
    ]
    assert guest(made, "bob").nics[0].gateway4 is None


@pytest.mark.parametrize(
    ("hosts", "underlay", "mtu", "expected"),
    [
        ({"alpha": {}}, {"mtu": 1280}, None, 1500),
        ({"alpha": {}, "beta": {}}, {}, None, 1500),
        ({"alpha": {}, "beta": {}}, {"mtu": 1500}, None, 1450),
        ({"alpha": {}, "beta": {}}, {"mtu": 1500}, 1400, 1400),
        ({"alpha": {}, "beta": {"kind": "ssh", "address": "192.0.2.1"}}, {}, None, 1450),
        ({"alpha": {"kind": "ssh", "address": "192.0.2.1"}}, {}, None, 1500),
        ({"alpha": {"kind": "ssh", "address": "192.0.2.1"}}, {}, 9000, 9000),
    ],
)
def test_mtu_leaves_room_for_the_tunnel(
    hosts: dict[str, Any], underlay: dict[str, Any], mtu: int | None, expected: int
) -> None:
    made = resolved(lab({"ann": {}}, {"lan": {"mtu": mtu}}, hosts=hosts, underlay=underlay))

    assert made.networks["lan"].mtu == expected
    assert guest(made).nics[0].mtu == expected


# -- hosts and networks ----------------------------------------------------------------------------------------------


def test_underlay_addresses_are_assigned_around_fixed_ones() -> None:
    hosts = {"a": {}, "b": {"address": "10.9.0.2"}, "c": {}}

    made = resolved({"lab": "made", "hosts": hosts, "underlay": {"cidr": "10.9.0.0/28"}})

    assert {name: host.underlay for name, host in made.hosts.items()} == {
        "a": "10.9.0.3",
        "b": "10.9.0.2",
        "c": "10.9.0.4",
    }
    assert made.underlay_prefix == 28


def test_host_added_in_the_middle_moves_no_other() -> None:
    before = resolved({"lab": "made", "hosts": {"a": {}, "c": {}}})

    after = resolved({"lab": "made", "hosts": {"a": {}, "b": {}, "c": {}}}, before)

    assert after.hosts["c"].underlay == before.hosts["c"].underlay


def test_exhausted_underlay_is_an_error() -> None:
    hosts = {name: {} for name in "abcde"}

    with pytest.raises(SpecError, match=r"underlay: 10\.9\.0\.0/30 has no address left"):
        resolved({"lab": "made", "hosts": hosts, "underlay": {"cidr": "10.9.0.0/30"}})


def test_ssh_host_is_reached_by_its_underlay_address_or_by_what_its_name_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.9", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    hosts = {
        "named": {"kind": "ssh", "address": "server.example"},
        "told": {"kind": "ssh", "address": "server.example", "underlay": "10.0.0.7"},
    }

    made = resolved({"lab": "made", "hosts": hosts})

    assert {name: host.underlay for name, host in made.hosts.items()} == {"named": "192.0.2.9", "told": "10.0.0.7"}


def test_name_that_cannot_be_looked_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    with pytest.raises(SpecError, match=r"hosts\.far\.address: 'server\.example' cannot be looked up") as caught:
        resolved({"lab": "made", "hosts": {"far": {"kind": "ssh", "address": "server.example"}}})

    assert "underlay" in str(caught.value.hint)


def test_network_is_carried_by_the_hosts_with_a_guest_on_it() -> None:
    made = resolved(lab({"ann": {}, "bob": {"host": "beta", "nics": []}}))

    assert made.networks["lan"].hosts == ["alpha"]


def test_defaults_of_a_guest_are_filled_in() -> None:
    made = guest(one_guest(vcpus=2, memory="1G"))

    assert (made.vcpus, made.vcpus_max, made.memory, made.memory_max) == (2, 2, 1 << 30, 1 << 30)
    assert (made.image, made.machine, made.accel, made.ready) == ("tiny", "q35", "auto", None)


def test_lab_has_another_uid_in_another_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STATE", "/one")
    one = one_guest()
    monkeypatch.setenv("ORCHESTRATOR_STATE", "/two")
    two = one_guest()

    assert one.uid != two.uid
    assert guest(one).nics[0].tap != guest(two).nics[0].tap
    assert guest(one).nics[0].mac == guest(two).nics[0].mac


# -- guests that were moved ------------------------------------------------------------------------------------------

THREE = {"alpha": {}, "beta": {}, "gamma": {}}


def placed(host: str, **more: Any) -> dict[str, Any]:
    return {
        "lab": "made",
        "hosts": THREE,
        "networks": {"lan": {"ipv4": "10.1.0.0/24"}},
        "guests": {"ann": {"host": host, "nics": ["lan"], **more}, "bob": {"host": "alpha", "nics": ["lan"]}},
    }


def moved(made: ResolvedLab, name: str, host: str) -> ResolvedLab:
    """What ``orchestrator migrate`` makes of a lab."""
    return made.with_guest(made.guests[name].model_copy(update={"host": host}))


def test_guest_that_was_not_moved_is_at_home() -> None:
    made = resolved(placed("alpha"))

    assert {(each.host, each.home) for each in made.guests.values()} == {("alpha", "alpha")}


def test_moved_guest_takes_its_networks_along() -> None:
    made = moved(resolved(placed("alpha")), "ann", "gamma")

    assert (made.guests["ann"].host, made.guests["ann"].home) == ("gamma", "alpha")
    assert made.networks["lan"].hosts == ["alpha", "gamma"]
    assert [each.name for each in made.guests_of("gamma")] == ["ann"]
    assert moved(made, "bob", "gamma").networks["lan"].hosts == ["gamma"]


def test_moved_guest_stays_as_long_as_the_file_says_what_it_said() -> None:
    before = moved(resolved(placed("alpha")), "ann", "gamma")

    after = resolved(placed("alpha", memory="1G"), before)

    assert (after.guests["ann"].host, after.guests["ann"].home) == ("gamma", "alpha")
    assert after.networks["lan"].hosts == ["alpha", "gamma"]
    assert after.guests["ann"].memory == 1 << 30


@pytest.mark.parametrize("host", ["beta", "gamma"])
def test_file_that_changes_wins(host: str) -> None:
    before = moved(resolved(placed("alpha")), "ann", "gamma")

    after = resolved(placed(host), before)

    assert (after.guests["ann"].host, after.guests["ann"].home) == (host, host)


def test_moved_guest_whose_host_has_gone_comes_home() -> None:
    before = moved(resolved(placed("alpha")), "ann", "gamma")
    data = placed("alpha")
    data["hosts"] = {"alpha": {}, "beta": {}}

    after = resolved(data, before)

    assert (after.guests["ann"].host, after.guests["ann"].home) == ("alpha", "alpha")


def test_moved_guest_keeps_its_addresses() -> None:
    before = resolved(placed("alpha"))

    after = resolved(placed("alpha"), moved(before, "ann", "gamma"))

    assert after.guests["ann"].nics == before.guests["ann"].nics


def test_state_from_before_guests_could_be_moved_is_read() -> None:
    made = resolved(placed("alpha"))
    data = json.loads(made.model_dump_json())
    for each in data["guests"].values():
        del each["home"]

    assert ResolvedLab.model_validate(data) == made


@given(lab_changes(), st.data())
def test_moved_guests_are_where_they_were_put_or_where_the_file_says(
    change: tuple[dict[str, Any], dict[str, Any]], data: st.DataObject
) -> None:
    before = resolved(change[0])
    for name in before.guests:
        before = moved(before, name, data.draw(st.sampled_from(sorted(before.hosts)), label=name))

    after = resolved(change[1], before)

    for name, each in after.guests.items():
        said = change[1]["guests"][name]["host"]
        was = before.guests.get(name)
        assert each.home == said
        assert each.host in (said, was.host if was else said)
        assert each.host in after.hosts
        for network in {nic.network for nic in each.nics}:
            assert each.host in after.networks[network].hosts
