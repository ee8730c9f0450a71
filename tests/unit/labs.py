"""Labs for tests: from data and from the examples, and generated ones."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from orchestrator.guests.domain import GuestImage
from orchestrator.spec.load import load
from orchestrator.spec.model import LabSpec
from orchestrator.spec.resolve import resolve
from orchestrator.spec.resolved import ResolvedGuest, ResolvedLab

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
FILE = Path("/labs/lab.yaml")

HOSTS = ("alpha", "beta", "gamma")
NETWORKS = ("lan", "wan", "san")
GUESTS = ("ann", "bob", "eve", "dan")
DISKS = ("data", "logs")
MIB = 1 << 20
KINDS = ("local", "ssh")


def resolved(data: Mapping[str, Any], previous: ResolvedLab | None = None) -> ResolvedLab:
    """A lab file as a mapping (without ``defaults`` and ``include``), resolved."""
    return resolve(LabSpec.model_validate(data), FILE, previous)


def demo() -> ResolvedLab:
    loaded = load(EXAMPLES / "demo.yaml")
    return resolve(loaded.spec, loaded.file)


def one_guest(**settings: Any) -> ResolvedLab:
    """A lab of one host, one network and the guest ``ann`` with ``settings``."""
    guest = {"host": "alpha", "nics": ["lan"], **settings}
    return resolved(
        {"lab": "one", "hosts": {"alpha": {}}, "networks": {"lan": {"ipv4": "10.1.0.0/24"}}, "guests": {"ann": guest}}
    )


def ann(**settings: Any) -> ResolvedGuest:
    return one_guest(**settings).guests["ann"]


def guest_image(**settings: Any) -> GuestImage:
    values: dict[str, Any] = {
        "id": "tiny-0123456789ab",
        "kernel": "/image/kernel",
        "initrd": "/image/initrd",
        "disk": None,
        "disk_format": None,
        "cmdline": "console=ttyS0",
        "cloud_init": False,
        "ready": "agent",
    }
    return GuestImage(**values | settings)


# -- generated labs --------------------------------------------------------------------------------------------------


def host_of_kind(name: str, kind: str) -> dict[str, Any]:
    return {} if kind == "local" else {"kind": kind, "address": f"192.0.2.{HOSTS.index(name) + 1}"}


@st.composite
def _guest(draw: st.DrawFn, hosts: list[str], networks: list[str]) -> dict[str, Any]:
    memory, vcpus = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    disks = draw(st.lists(st.sampled_from(DISKS), unique=True, max_size=2))
    return {
        "host": draw(st.sampled_from(hosts)),
        "image": draw(st.sampled_from(["tiny", "debian"])),
        "vcpus": {"count": vcpus, "max": draw(st.integers(vcpus, 4))},
        "memory": {"size": f"{memory * 128}M", "max": f"{draw(st.integers(memory, 5)) * 128}M"},
        "nics": draw(st.lists(st.sampled_from(networks), max_size=2)) if networks else [],
        "disks": [{"name": name, "size": draw(st.sampled_from(["1G", "2G"]))} for name in disks],
        "cmdline": draw(st.sampled_from(["", "quiet"])),
    }


@st.composite
def _network(draw: st.DrawFn, name: str) -> dict[str, Any]:
    number = NETWORKS.index(name)
    return {
        "ipv4": draw(st.sampled_from([None, f"10.{number + 1}.0.0/24"])),
        "ipv6": draw(st.sampled_from([None, f"fd1{number}::/64"])),
        "uplink": draw(st.booleans()),
        "mtu": draw(st.sampled_from([None, 1400])),
    }


@st.composite
def lab_files(draw: st.DrawFn) -> dict[str, Any]:
    """Lab files as mappings, without ``defaults``."""
    hosts = draw(st.lists(st.sampled_from(HOSTS), min_size=1, unique=True))
    networks = draw(st.lists(st.sampled_from(NETWORKS), unique=True, max_size=2))
    guests = draw(st.lists(st.sampled_from(GUESTS), unique=True, max_size=3))
    kind = draw(st.sampled_from(KINDS))
    return {
        "lab": "made",
        "hosts": {name: host_of_kind(name, kind) for name in hosts},
        "networks": {name: draw(_network(name)) for name in networks},
        "guests": {name: draw(_guest(hosts, networks)) for name in guests},
    }


@st.composite
def edits(draw: st.DrawFn, data: dict[str, Any]) -> dict[str, Any]:
    """``data`` after one to three changes of the kinds that people make."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        hosts, networks, guests = (data[section] for section in ("hosts", "networks", "guests"))
        kind = draw(st.sampled_from(["host", "no host", "network", "no network", "guest", "no guest", "setting"]))
        if kind == "host":
            name = draw(st.sampled_from(HOSTS))
            hosts.setdefault(name, host_of_kind(name, next(iter(hosts.values())).get("kind", "local")))
        elif kind == "no host" and len(hosts) > 1:
            gone = draw(st.sampled_from(sorted(hosts)))
            del hosts[gone]
            for guest in guests.values():
                if guest["host"] == gone:
                    guest["host"] = min(hosts)
        elif kind == "network":
            name = draw(st.sampled_from(NETWORKS))
            networks[name] = draw(_network(name))
        elif kind == "no network" and networks:
            gone = draw(st.sampled_from(sorted(networks)))
            del networks[gone]
            for guest in guests.values():
                guest["nics"] = [nic for nic in guest["nics"] if nic != gone]
        elif kind == "guest":
            guests[draw(st.sampled_from(GUESTS))] = draw(_guest(sorted(hosts), sorted(networks)))
        elif kind == "no guest" and guests:
            del guests[draw(st.sampled_from(sorted(guests)))]
        elif kind == "setting" and guests:
            guest = guests[draw(st.sampled_from(sorted(guests)))]
            key = draw(st.sampled_from(sorted(guest)))
            guest[key] = draw(_guest(sorted(hosts), sorted(networks)))[key]
    return data


@st.composite
def lab_changes(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A lab file before and after somebody edited it."""
    data = draw(lab_files())
    return data, draw(edits(data))
