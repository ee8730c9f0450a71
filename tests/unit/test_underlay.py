"""The underlay of Vagrant hosts, with libvirt's driver for tests."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import libvirt
import pytest

from orchestrator.errors import TakenError
from orchestrator.hosts import underlay
from orchestrator.spec.resolved import ResolvedLab
from tests.unit.labs import resolved


def lab(mtu: int = 1500) -> ResolvedLab:
    return resolved(
        {
            "lab": "two",
            "underlay": {"mtu": mtu},
            "hosts": {"alpha": {"kind": "vagrant"}},
            "networks": {"lan": {"ipv4": "10.1.0.0/24"}},
            "guests": {},
        }
    )


@pytest.fixture
def conn(places: Path) -> libvirt.virConnect:
    return libvirt.open("test:///default")


def test_made_once_and_removed(conn: libvirt.virConnect) -> None:
    underlay.ensure(lab(), conn)
    underlay.ensure(lab(), conn)
    network = conn.networkLookupByName("orc-two")

    assert network.isActive()
    assert network.bridgeName() == underlay.bridge_name(lab())
    assert "<ip" not in network.XMLDesc()
    assert "<forward" not in network.XMLDesc()

    underlay.remove(lab(), conn)
    underlay.remove(lab(), conn)

    assert "orc-two" not in [each.name() for each in conn.listAllNetworks()]


def test_stopped_one_is_started(conn: libvirt.virConnect) -> None:
    underlay.ensure(lab(), conn)
    conn.networkLookupByName("orc-two").destroy()

    underlay.ensure(lab(), conn)

    assert conn.networkLookupByName("orc-two").isActive()


def test_other_mtu_makes_it_anew(conn: libvirt.virConnect) -> None:
    underlay.ensure(lab(), conn)

    underlay.ensure(lab(mtu=9000), conn)

    assert '<mtu size="9000"/>' in conn.networkLookupByName("orc-two").XMLDesc().replace("'", '"')


def test_network_of_somebody_else_is_refused_and_stays(conn: libvirt.virConnect) -> None:
    conn.networkDefineXML("<network><name>orc-two</name><bridge name='theirs'/></network>")

    for action in (underlay.ensure, underlay.remove):
        with pytest.raises(TakenError, match="belongs to somebody else"):
            action(lab(), conn)

    assert conn.networkLookupByName("orc-two").bridgeName() == "theirs"
