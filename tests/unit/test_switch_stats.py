"""What is told of the switch's tables: sums over CPUs, and who is who."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import struct

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.switch import stats
from orchestrator.switch.layout import (
    FROM_GUEST,
    NOWHERE,
    REASONS,
    TO_GUEST,
    Bucket,
    Counters,
    Flag,
    Limited,
    Nic,
    Pair,
    Traffic,
    index,
    packed,
    packed_mac,
)
from orchestrator.switch.stats import Counted, HostStats, NetworkStats, PairStats, PortStats, Table, with_copied

NOW = 50_000_000_000
MAC, OTHER_MAC, STRANGER = "02:00:00:00:00:02", "02:00:00:00:00:03", "02:de:ad:00:00:01"
TAP, EAR = 9, 10
SLOT = 3
HEAD = PortStats("ann", MAC, "ot-00000009", "lan", overruns=4)


class Fake:
    """A table in memory; its values are those of each CPU."""

    def __init__(self) -> None:
        self.entries: dict[bytes, list[bytes]] = {}

    def add(self, key: bytes, *copies: bytes) -> Fake:
        self.entries[key] = list(copies)
        return self

    def get(self, key: bytes) -> bytes | None:
        return next(iter(self.entries.get(key, [])), None)

    def each(self, key: bytes) -> list[bytes]:
        return self.entries.get(key, [])

    def all_keys(self) -> list[bytes]:
        return list(self.entries)


def counters(*numbers: int, **dropped: int) -> bytes:
    reasons = struct.pack(f"<{len(REASONS)}Q", *(dropped.get(reason, 0) for reason in REASONS))
    return Counters(*numbers, reasons).pack()  # type: ignore[call-arg]


def tables(**given: Fake) -> dict[str, Table]:
    names = ("ports", "counters_of", "buckets", "trunks", "known", "pairs")
    return {name: given.get(name, Fake()) for name in names}


def test_counters_are_those_of_all_cpus() -> None:
    seen = stats.counted(
        [counters(1, 100, 2, 200, 3, NOW - 5_000_000_000, arp=1), counters(10, 1000, 0, 0, 4, 0, arp=2, rate=7)], NOW
    )

    assert seen == Counted(11, 1100, 2, 200, 7, {"arp": 3, "rate": 7}, 5.0)


def test_reason_that_never_was_is_not_there_and_who_was_never_seen_has_no_time() -> None:
    assert stats.counted([counters(0, 0, 0, 0, 0, 0)] * 2, NOW) == Counted(answered=0)
    assert stats.counted([], NOW) == Counted(answered=0), "a link that has just gone"


def test_frame_that_came_after_the_clock_was_read_was_seen_just_now() -> None:
    assert stats.counted([counters(1, 60, 0, 0, 0, NOW + 1000)], NOW).last_seen_seconds_ago == 0


@given(st.lists(st.lists(st.integers(0, 2**40), min_size=6, max_size=6), max_size=8))
def test_sums_are_those_of_the_columns(rows: list[list[int]]) -> None:
    seen = stats.counted([counters(*row) for row in rows], 2**41)

    sums = [sum(column) for column in zip(*rows, strict=True)] or [0] * 6
    assert [seen.tx_packets, seen.tx_bytes, seen.rx_packets, seen.rx_bytes, seen.answered] == sums[:5]
    assert not seen.dropped


# -- ports -----------------------------------------------------------------------------------------------------------


def nic(**changes: object) -> Nic:
    made = {
        "net": 5,
        "flags": int(Flag.LOCAL),
        "group": 0,
        "mirror": 0,
        "ip4": packed("10.10.0.2")[12:],
        "vlan": 0,
        "mac": packed_mac(MAC),
        "slot": SLOT,
        "ip6": packed("fd10::2"),
        "link_local": NOWHERE,
    }
    return Nic(**{**made, **changes})  # type: ignore[arg-type]


def port(entry: Nic | None, **given: Fake) -> PortStats:
    there = Fake().add(index(TAP), entry.pack()) if entry else Fake()
    return stats.port(tables(ports=there, **given), TAP, HEAD, {EAR: "ear"}, {packed_mac(MAC): [20, 10]}, NOW)


def test_port_has_its_identity_and_policy() -> None:
    buckets = Fake().add(Limited(TAP, FROM_GUEST).pack(), Bucket(125_000, 1, 1).pack())
    buckets.add(Limited(TAP, TO_GUEST).pack(), Bucket(250_000, 1, 1).pack())

    seen = port(
        nic(vlan=7, group=0xABCD, mirror=EAR, flags=Flag.LOCAL | Flag.ISOLATED),
        buckets=buckets,
        counters_of=Fake().add(index(SLOT), counters(1, 60, 0, 0, 0, 0, vlan=2)),
    )

    assert (seen.guest, seen.tap, seen.plugged, seen.overruns) == ("ann", "ot-00000009", True, 4)
    assert seen.addresses == ["10.10.0.2", "fd10::2"]
    assert (seen.vlan, seen.trunk, seen.group, seen.isolated) == (7, [10, 20], "0000abcd", True)
    assert (seen.rate_out, seen.rate_in, seen.mirror) == (1_000_000, 2_000_000, "ear")
    assert (seen.counted.tx_packets, seen.counted.dropped) == (1, {"vlan": 2})


def test_port_without_addresses_or_policy() -> None:
    seen = port(nic(ip4=bytes(4), ip6=NOWHERE))

    assert (seen.addresses, seen.vlan, seen.group, seen.isolated, seen.rate_out, seen.mirror) == (
        [], 0, None, False, 0, None,
    )  # fmt: skip


def test_tap_that_is_in_no_table_is_not_plugged_in() -> None:
    seen = port(None)

    assert not seen.plugged
    assert (seen.guest, seen.addresses, seen.overruns) == ("ann", [], 4)


def test_what_is_counted_stands_beside_what_the_port_is() -> None:
    network = NetworkStats(
        network="lan",
        bridge="lan",
        datapath="ebpf",
        lacks=None,
        mtu=1500,
        gateway=[],
        gateway_mac=STRANGER,
        uplink=False,
        multicast="drop",
        rules=0,
        listed=1,
        vxlan=None,
        peers=[],
        ports=[HEAD],
        host=Counted(3),
        underlay=None,
    )

    data = json.loads(json.dumps(network.to_json()))

    (seen,) = data["ports"]
    assert (seen["guest"], seen["tx_packets"], seen["dropped"], seen["last_seen_seconds_ago"]) == ("ann", 0, {}, None)
    assert "counted" not in seen
    assert data["host"]["tx_packets"] == 3


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_have_names_where_the_macs_are_known_the_busiest_first() -> None:
    table = Fake()
    for sender, receiver, *copies in (
        (MAC, OTHER_MAC, (1, 100, NOW - 1_000_000_000), (2, 50, NOW - 3_000_000_000)),
        (OTHER_MAC, STRANGER, (9, 900, NOW), (0, 0, 0)),
    ):
        key = Pair(packed_mac(sender), packed_mac(receiver)).pack()
        table.add(key, *(Traffic(*each).pack() for each in copies))

    first, second = stats.pairs(table, {MAC: "ann", OTHER_MAC: "host"}, {MAC: "lan"}, NOW)

    assert (first.sender, first.sender_mac, first.receiver, first.receiver_mac) == ("host", OTHER_MAC, None, STRANGER)
    assert (first.packets, first.bytes, first.network, first.last_seen_seconds_ago) == (9, 900, None, 0)
    assert (second.sender, second.receiver, second.network) == ("ann", "host", "lan")
    assert (second.packets, second.bytes, second.last_seen_seconds_ago) == (3, 150, 1.0)


def test_pair_that_has_made_room_for_another_one_is_left_out() -> None:
    assert stats.pairs(Fake().add(Pair(bytes(6), bytes(6)).pack()), {}, {}, NOW) == []


# -- beside the switch -----------------------------------------------------------------------------------------------


def test_what_a_process_has_copied_is_added_to_what_the_switch_has_counted() -> None:
    counted = Counted(tx_packets=1, tx_bytes=60, rx_packets=2, rx_bytes=120, last_seen_seconds_ago=9.0)
    ann = PortStats("ann", "02:00:00:00:00:02", "tap2", "lan", counted=counted)
    network = NetworkStats(
        "lan", "b", "ebpf", None, 1500, [], "02:00:00:00:00:01", False, "drop", 0, 2, None, [], [ann], Counted(), None
    )
    pair = PairStats("ann", ann.mac, "bob", "02:00:00:00:00:03", "lan", 1, 60, 9.0)
    told = {
        "ports": {
            "tap2": {
                "connected": True,
                "failed": None,
                "tx_packets": 10,
                "tx_bytes": 600,
                "rx_packets": 20,
                "rx_bytes": 1200,
                "slow_packets": 1,
                "dropped_full": 3,
                "dropped_malformed": 0,
                "last_seen_ns": 99_000_000_000,
            }
        },
        "pairs": [
            {"from": ann.mac, "to": "02:00:00:00:00:03", "packets": 10, "bytes": 600, "last_seen_ns": 99_000_000_000},
            {
                "from": "02:00:00:00:00:03",
                "to": ann.mac,
                "packets": 20,
                "bytes": 1200,
                "last_seen_ns": 98_000_000_000,
            },
        ],
    }

    made = with_copied(HostStats(100.0, [network], [pair]), told)

    (port,) = made.networks[0].ports
    assert made.networks[0].datapath == "vhost-user"
    assert port.counted == Counted(11, 660, 22, 1320, last_seen_seconds_ago=1.0)
    assert port.vhost_user is not None
    assert (port.vhost_user["connected"], port.vhost_user["dropped_full"]) == (True, 3)
    assert made.pairs is not None
    assert [(each.sender, each.receiver, each.packets) for each in made.pairs] == [
        (None, "ann", 20),
        ("ann", "bob", 11),
    ]
    assert with_copied(HostStats(100.0, [network]), {}) == HostStats(100.0, [network])
