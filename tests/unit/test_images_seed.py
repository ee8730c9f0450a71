"""What a guest is told about itself."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from orchestrator.errors import SpecError
from orchestrator.images.seed import SeedNic, render_seed, tiny_cmdline

BARE_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZxgNp0c9eW5wEo7"
KEY = f"{BARE_KEY} ann@example"
FULL = SeedNic("02:00:00:00:00:01", "10.0.0.5/24", "10.0.0.1", "fd00::5/64", "fd00::1", 1400)
BARE = SeedNic("02:00:00:00:00:02")


def parse(text: str) -> Any:
    return YAML(typ="safe").load(text)


def test_seed_says_who_the_guest_is() -> None:
    meta, user, network = render_seed(hostname="web-1", ssh_keys=[KEY], nics=[FULL, BARE], user_data=None)
    assert parse(meta)["local-hostname"] == "web-1"
    assert parse(meta)["instance-id"].startswith("web-1-")
    assert user.startswith("#cloud-config\n")
    assert parse(user) == {
        "hostname": "web-1",
        "disable_root": False,
        "ssh_pwauth": False,
        "ssh_authorized_keys": [BARE_KEY],
    }
    nics = parse(network)["ethernets"]
    assert parse(network)["version"] == 2
    assert nics["nic0"] == {
        "match": {"macaddress": "02:00:00:00:00:01"},
        "dhcp4": False,
        "dhcp6": False,
        "accept-ra": False,
        "mtu": 1400,
        "addresses": ["10.0.0.5/24", "fd00::5/64"],
        "gateway4": "10.0.0.1",
        "gateway6": "fd00::1",
    }
    assert nics["nic1"]["addresses"] == []
    assert "gateway4" not in nics["nic1"]


def test_a_guest_without_nics_has_an_empty_network() -> None:
    network = render_seed(hostname="web", ssh_keys=[], nics=[], user_data=None)[2]
    assert parse(network) == {"version": 2, "ethernets": {}}


def test_user_data_of_the_lab_file_is_kept_as_it_is() -> None:
    text = "#!/bin/sh\necho {{ hi }} > /x"
    assert render_seed(hostname="web", ssh_keys=[KEY], nics=[], user_data=text)[1] == text


def test_the_instance_changes_with_what_it_is_told_and_with_nothing_else() -> None:
    def instance(**changes: Any) -> str:
        facts = {"hostname": "web", "ssh_keys": [KEY], "nics": [FULL], "user_data": None} | changes
        return str(parse(render_seed(**facts)[0])["instance-id"])

    assert instance() == instance()
    changed = [instance(hostname="app"), instance(ssh_keys=[]), instance(nics=[BARE]), instance(user_data="#!/x")]
    assert len({instance(), *changed}) == 5


def test_tiny_gets_the_same_facts_as_words() -> None:
    line = tiny_cmdline(hostname="web-1", ssh_keys=[KEY, KEY + " with a comment"], nics=[FULL, BARE])
    assert line.split() == [
        "orc.name=web-1",
        "orc.nic=02:00:00:00:00:01,10.0.0.5/24,10.0.0.1,fd00::5/64,fd00::1,1400",
        "orc.nic=02:00:00:00:00:02,-,-,-,-,-",
        "orc.key=ssh-ed25519:AAAAC3NzaC1lZDI1NTE5AAAAIGZxgNp0c9eW5wEo7",
        "orc.key=ssh-ed25519:AAAAC3NzaC1lZDI1NTE5AAAAIGZxgNp0c9eW5wEo7",
    ]


def test_too_much_for_a_command_line_returns_error() -> None:
    with pytest.raises(SpecError, match="do not fit on a kernel's command line") as caught:
        tiny_cmdline(hostname="web", ssh_keys=["ssh-rsa " + "A" * 700] * 3, nics=[])
    assert "ed25519" in str(caught.value.hint)


HOSTILE_NAMES = ["", "-a", "a-", "a b", "a\nb", 'a"', "a: b", "a,b", "$(reboot)", "a" * 64, "ä", "a/..", "a=b", "a\n"]
HOSTILE_KEYS = [
    "",
    "ssh-ed25519",
    "ssh-ed25519 short",
    f"{KEY}\nssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZxgNp0c9eW5wEo7",
    'command="reboot" ' + KEY,
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 orc.panic=1\x00",
    "-----BEGIN OPENSSH PRIVATE KEY-----",
]
HOSTILE_NICS = [
    SeedNic("02:00:00:00:00"),
    SeedNic("01:00:00:00:00:01"),
    SeedNic("02:00:00:00:00:01", ipv4="10.0.0.5/24 orc.panic=1"),
    SeedNic("02:00:00:00:00:01", ipv4="10.0.0.5/24", gateway4="10.0.0.1,x"),
    SeedNic("02:00:00:00:00:01", ipv6="fd00::5/64", gateway6="nowhere"),
]


@pytest.mark.parametrize(
    "facts",
    [
        *({"hostname": name} for name in HOSTILE_NAMES),
        *({"ssh_keys": [key]} for key in HOSTILE_KEYS),
        *({"nics": [nic]} for nic in HOSTILE_NICS),
    ],
)
def test_hostile_facts_are_refused(facts: dict[str, Any]) -> None:
    whole = {"hostname": "web", "ssh_keys": [], "nics": []} | facts
    with pytest.raises(SpecError):
        tiny_cmdline(**whole)
    with pytest.raises(SpecError):
        render_seed(**whole, user_data=None)


@settings(max_examples=200)
@given(st.text(max_size=80), st.text(max_size=80))
def test_whatever_is_accepted_arrives_unchanged(hostname: str, comment: str) -> None:
    key = f"{BARE_KEY} {comment}"
    try:
        meta, user, _ = render_seed(hostname=hostname, ssh_keys=[key], nics=[], user_data=None)
    except SpecError:
        return
    assert parse(meta)["local-hostname"] == hostname
    assert parse(user)["ssh_authorized_keys"] == [BARE_KEY]
    assert len(tiny_cmdline(hostname=hostname, ssh_keys=[key], nics=[]).split()) == 2
