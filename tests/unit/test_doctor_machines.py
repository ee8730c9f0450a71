"""Machines and networks that dead labs left in libvirt, with its driver for tests."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from orchestrator import names, paths
from orchestrator.doctor import clean, leftover
from orchestrator.hosts import libvirtd, underlay
from tests.unit.labs import resolved


@pytest.fixture
def conn(places: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[libvirt.virConnect]:
    monkeypatch.setattr(leftover.os, "geteuid", lambda: 0)
    monkeypatch.setattr(leftover, "NETNS", places / "netns")
    monkeypatch.setattr(leftover, "_links", lambda: [])
    monkeypatch.setattr(leftover, "_processes", lambda _: [])

    @contextlib.contextmanager
    def session() -> Iterator[libvirt.virConnect]:
        yield libvirt.open("test:///default")

    monkeypatch.setattr(libvirtd, "connect", lambda: libvirt.open("test:///default"))
    monkeypatch.setattr(libvirtd, "session", session)
    with contextlib.closing(libvirt.open("test:///default")) as opened:  # what is made lives as long as this
        yield opened


def make(conn: libvirt.virConnect, lab: str, host: str, uid: str, *, running: bool) -> None:
    xml = (
        f"<domain type='test'><name>orc-{lab}-{host}</name><memory>65536</memory><os><type>hvm</type></os>"
        f"<description>{names.mark(uid, 'machine', host)}</description></domain>"
    )
    dom = conn.defineXML(xml)
    if running:
        dom.create()


def test_machine_and_network_of_a_lab_that_lost_its_state_go(conn: libvirt.virConnect) -> None:
    dead = resolved({"lab": "dead", "hosts": {"a": {"kind": "vagrant"}}, "networks": {}, "guests": {}})
    underlay.ensure(dead, conn)
    make(conn, "dead", "a", names.lab_uid("dead"), running=True)
    conn.defineXML("<domain type='test'><name>theirs</name><memory>65536</memory><os><type>hvm</type></os></domain>")

    found = leftover.leftovers()
    lines = clean(found)

    assert [(one.kind, one.name, one.lab) for one in found] == [
        ("machine", "orc-dead-a", "dead"),
        ("network", "orc-dead", "dead"),
    ]
    assert lines == ["machine orc-dead-a: removed", "network orc-dead: removed"]
    assert sorted(dom.name() for dom in conn.listAllDomains()) == ["test", "theirs"]
    assert [network.name() for network in conn.listAllNetworks()] == ["default"]


def test_machines_of_a_lab_that_is_known_or_another_s_stay(conn: libvirt.virConnect) -> None:
    known = paths.make_dir(paths.state() / "labs" / "known")
    (known / "lab.json").write_text(json.dumps({"uid": names.lab_uid("known"), "lab": "known"}))
    make(conn, "known", "a", names.lab_uid("known"), running=False)
    make(conn, "other", "a", "0badcafe", running=False)  # of another state folder, and somebody's

    assert leftover.leftovers() == []
