"""The maps' layout, said in C and in Python: both are compared. And tables as entries of the maps."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import subprocess
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import paths
from orchestrator.spec.resolved import ResolvedNetwork, ResolvedNic, ResolvedParty, ResolvedRule
from orchestrator.switch import layout, rules, tables
from orchestrator.switch.layout import Fate, Flag, Kind, Place, Side, Where, index, packed, unpacked
from orchestrator.switch.membership import Listed, Membership

HEADER = (paths.bpf() / "layout.h").read_text()
STRUCTS = {
    "nic": layout.Nic,
    "where": layout.Where,
    "place": layout.Place,
    "network": layout.NetworkEntry,
    "attachment": layout.Attachment,
    "owner": layout.Owner,
    "addresses": layout.Addresses,
    "counters": layout.Counters,
    "pair": layout.Pair,
    "traffic": layout.Traffic,
    "member": layout.Member,
    "limited": layout.Limited,
    "bucket": layout.Bucket,
    "party": layout.Party,
    "rule": layout.Rule,
    "verdict": layout.Verdict,
}


def members(enum: str) -> list[str]:
    (body,) = re.findall(rf"enum {enum} {{(.*?)}};", HEADER, re.DOTALL)
    return re.findall(r"^\s*(\w+)\b(?! \w)", re.sub(r"/\*.*?\*/", "", body).replace(", ", ",\n"), re.MULTILINE)


def evaluated(expressions: list[str], folder: Path) -> list[int]:
    """What a C compiler makes of ``expressions`` over the header."""
    source = folder / "sizes.c"
    lines = "".join(f'printf("%lu\\n", (unsigned long)({each}));' for each in expressions)
    source.write_text(f'#include <stddef.h>\n#include <stdio.h>\n#include "layout.h"\nint main(void) {{ {lines} }}\n')
    program = folder / "sizes"
    subprocess.run(["gcc", "-I", str(paths.bpf()), "-o", str(program), str(source)], check=True)
    return list(map(int, subprocess.run([program], capture_output=True, check=True).stdout.split()))


def test_structs_have_the_same_size_in_both(tmp_path: Path) -> None:
    sizes = evaluated([f"sizeof(struct {name})" for name in STRUCTS], tmp_path)

    assert dict(zip(STRUCTS, sizes, strict=True)) == {name: kind.FORMAT.size for name, kind in STRUCTS.items()}


def test_fields_are_where_python_takes_them_to_be(tmp_path: Path) -> None:
    """Those after which something is aligned: a field that is moved shows there."""
    wanted = {
        "struct nic, mac": 22,
        "struct nic, ip6": 32,
        "struct nic, link_local": 48,
        "struct where, net": 16,
        "struct place, mac": 26,
        "struct network, net4": 24,
        "struct network, net6": 32,
        "struct network, gateway": 64,
        "struct counters, dropped": 48,
        "struct rule, low": 96,
        "struct rule, allow": 101,
        "struct party, mac": 40,
    }

    assert evaluated([f"offsetof({each})" for each in wanted], tmp_path) == list(wanted.values())


def test_maps_have_the_same_shape_in_both(tmp_path: Path) -> None:
    text = (paths.bpf() / "maps.h").read_text()
    found = re.findall(r"^(?:SPARSE_)?MAP\(\w+, ([\w ]+), ([\w ]+), ([\w *]+), (\w+)\);", text, re.MULTILINE)
    sizes = evaluated([f"sizeof({each})" for row in found for each in row[:2]], tmp_path)
    most = evaluated([row[2] for row in found], tmp_path)

    shapes = zip(sizes[::2], sizes[1::2], most, strict=True)
    assert dict(zip((row[3] for row in found), shapes, strict=True)) == layout.MAPS


def test_names_and_numbers_are_the_same_in_both(tmp_path: Path) -> None:
    reasons = [name.removeprefix("DROP_").lower() for name in members("reason") if name != "REASONS"]
    constants = {
        **{f"{flag.name}": int(flag) for flag in Flag},
        **{f"FATE_{fate.name}": int(fate) for fate in Fate},
        **{f"{kind.name}": int(kind) for kind in Kind},
        **{f"{side.name}": int(side) for side in Side},
        "FROM_GUEST": layout.FROM_GUEST,
        "TO_GUEST": layout.TO_GUEST,
        "TRACE_MARK": layout.TRACE_MARK,
        "LAYOUT": layout.LAYOUT,
    }

    assert reasons == list(layout.REASONS)
    assert evaluated(list(constants), tmp_path) == list(constants.values())


# -- entries ---------------------------------------------------------------------------------------------------------


@given(st.ip_addresses())
def test_address_survives_being_packed(address: object) -> None:
    known = IPv6Address(packed(address).hex(":", 2))  # type: ignore[arg-type]
    mapped = known.ipv4_mapped or known

    assert unpacked(packed(address)) == mapped  # type: ignore[arg-type]


def test_link_local_address_is_that_of_the_mac() -> None:
    assert str(layout.link_local("52:54:00:12:34:56")) == "fe80::5054:ff:fe12:3456"


def nic(number: int, **policy: object) -> ResolvedNic:
    return ResolvedNic.model_validate(
        {
            "network": "lan",
            "mac": f"02:00:00:00:00:{number:02x}",
            "tap": f"tap{number}",
            "model": "virtio",
            "mtu": 1500,
            "ipv4": f"10.1.0.{number}/24",
            "ipv6": f"fd01::{number}/64",
            "gateway4": None,
            "gateway6": None,
            **policy,
        }
    )


def network(**settings: object) -> ResolvedNetwork:
    return ResolvedNetwork.model_validate(
        {
            "name": "lan",
            "vni": 7,
            "mtu": 1500,
            "bridge": "lan",
            "vxlan": "vx",
            "ipv4": "10.1.0.0/24",
            "ipv6": "fd01::/64",
            "gateway4": "10.1.0.1/24",
            "gateway6": "fd01::1/64",
            "gateway_mac": "02:00:00:00:00:01",
            "uplink": False,
            "datapath": "ebpf",
            "hosts": ["alpha", "beta"],
            **settings,
        }
    )


def place(made: tables.Tables, address: str, net: int = 5) -> Place | None:
    raw = made.list.get(Where(packed(address), net).pack())
    return Place.unpack(raw) if raw else None


HERE, THERE = "192.0.2.1", "192.0.2.2"


LINKS = tables.HostLinks(5, 6, {"tap2": 20}, {5: 1, 6: 2, 20: 3})
ALONE = tables.HostLinks(5, 0, {"tap2": 20}, {5: 1, 20: 3})


def test_list_says_where_each_address_is() -> None:
    listed = (Listed("ann", HERE, nic(2)), Listed("eve", THERE, nic(3)), Listed("late", HERE, nic(4)))
    made = tables.build(Membership(network(), HERE, (THERE,), "no", listed), LINKS)

    ann, eve, gateway = place(made, "10.1.0.2"), place(made, "fd01::3"), place(made, "10.1.0.1")
    assert ann is not None
    assert (ann.ifindex, ann.flags) == (20, Flag.LOCAL)
    assert eve is not None
    assert (eve.ifindex, eve.flags) == (6, Flag.REMOTE)
    assert gateway is not None
    assert (gateway.ifindex, gateway.flags) == (5, Flag.HOST)
    assert place(made, "10.1.0.4") is None, "it is listed when its tap is made"
    assert place(made, "10.1.0.2", 0) is None, "no uplink"
    assert made.hosts == {nic(3).mac: THERE}
    assert made.ports.keys() == {index(20)}


def test_guest_that_is_to_arrive_has_its_tap_here_and_its_addresses_there() -> None:
    made = tables.build(Membership(network(), HERE, (THERE,), "no", (Listed("ann", THERE, nic(2)),)), LINKS)

    there = place(made, "10.1.0.2")
    assert made.ports.keys() == {index(20)}
    assert there is not None
    assert there.flags == Flag.REMOTE


def test_uplinks_know_the_addresses_of_networks_that_have_one() -> None:
    made = tables.build(Membership(network(uplink=True), HERE, (), "all", (Listed("ann", HERE, nic(2)),)), ALONE)

    assert place(made, "10.1.0.2", 0) == place(made, "10.1.0.2")
    assert place(made, str(layout.link_local(nic(2).mac)), 0) is None, "which is no address beyond the network"


@pytest.mark.parametrize(("rate", "burst"), [(1_000_000, 256 << 10), (8_000_000_000, 50_000_000)])
def test_bucket_holds_50_milliseconds_and_four_of_the_largest_frames(rate: int, burst: int) -> None:
    made = tables.build(Membership(network(), HERE, (), "no", (Listed("ann", HERE, nic(2, rate_out=rate)),)), ALONE)
    (raw,) = made.buckets.values()

    assert layout.Bucket.unpack(raw) == layout.Bucket(rate // 8, burst, burst)


def test_rules_that_are_the_same_have_the_same_digest() -> None:
    def rule(value: str) -> ResolvedRule:
        any_ = ResolvedParty(side="any")
        sender = ResolvedParty(side="prefix", value=value)
        return ResolvedRule(allow=True, sender=sender, receiver=any_, protocol=6, low=80, high=80, family=0)

    one, other = rules.packed([rule("10.0.0.0/8")]), rules.packed([rule("10.0.0.0/9")])

    assert rules.digest(one) == rules.digest(rules.packed([rule("10.0.0.0/8")]))
    assert rules.digest(one) != rules.digest(other)
    assert rules.digest([]) == ""
