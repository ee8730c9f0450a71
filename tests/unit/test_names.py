"""Names and ownership marks."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import names

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True)
MARK = "orchestrator:0123abcd:network/lan"
UIDS = st.from_regex(r"[0-9a-f]{8}", fullmatch=True)


@given(st.sampled_from("bthxu"), UIDS, st.lists(WORDS, max_size=3))
def test_link_name_fits_linux(kind: str, uid: str, parts: list[str]) -> None:
    name = names.link(kind, uid, *parts)

    assert len(name.encode()) <= 15
    assert name.startswith(f"o{kind}-")
    assert not set(name) & set("/: ")


def test_link_names_of_one_thing_differ_by_kind_lab_and_parts() -> None:
    made = [
        names.link("b", "0000aaaa", "lan"),
        names.link("x", "0000aaaa", "lan"),
        names.link("b", "0000aaab", "lan"),
        names.link("b", "0000aaaa", "la", "n"),
        names.link("b", "0000aaaa", "lan", ""),
    ]

    assert len(set(made)) == len(made)


@given(st.lists(WORDS, max_size=4))
def test_mac_is_unicast_and_locally_administered(parts: list[str]) -> None:
    mac = names.mac(*parts)

    first = int(mac[:2], 16)
    assert first & 1 == 0
    assert first & 2
    assert len(mac) == 17
    assert mac == mac.lower() == names.mac(*parts)


@given(
    UIDS, st.sampled_from(["host", "network", "port", "uplink", "vxlan"]), NAMES | NAMES.map(lambda n: f"{n}/02:0a")
)
def test_mark_is_read_back(uid: str, kind: str, name: str) -> None:
    assert names.parse_mark(names.mark(uid, kind, name)) == (uid, kind, name)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "eth0",
        "orchestrator",
        "orchestrator:",
        "orchestrator::host/a",
        "orchestrator:0a:host",
        "other:0a:h/a",
    ],
)
def test_what_is_no_mark_is_nobodys(text: str | None) -> None:
    assert names.parse_mark(text) is None


@given(WORDS)
def test_arbitrary_text_never_breaks_the_mark_parser(text: str) -> None:
    found = names.parse_mark(text)

    assert found is None or names.mark(*found) == text


def test_lab_uid_depends_on_the_lab_and_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STATE", "/here")
    here, other = names.lab_uid("demo"), names.lab_uid("other")
    monkeypatch.setenv("ORCHESTRATOR_STATE", "/there")
    there = names.lab_uid("demo")

    assert len({here, other, there}) == 3
    assert all(len(uid) == 8 and int(uid, 16) >= 0 for uid in (here, other, there))


def test_runtime_folder_leaves_room_for_the_paths_of_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_RUN", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)

    folder = names.runtime_dir("0123abcd", "h" * 32)

    assert folder.parent == Path("/run/orc")
    assert len(str(folder)) == len("/run/orc/") + 8  # of the 107 bytes that a socket's address has


def test_namespaces_tell_the_lab_from_its_hosts() -> None:
    assert names.namespace("demo") == "orc.demo"
    assert names.namespace("demo", "alpha") == "orc.demo.alpha"


@pytest.mark.parametrize(
    ("name", "alias", "ours"),
    [
        ("ob-0123abcd", MARK, True),
        ("br0", MARK, True),
        ("ob-0123abcd", None, True),
        ("ob-0123abcd", "", True),
        ("br0", None, False),
        ("ob-0123abcde", None, False),
        ("ob-0123abcd", "orchestrator:ffffffff:network/lan", False),
        ("ob-0123abcd", "the printer", False),
    ],
)
def test_link_is_ours_by_its_mark_or_by_a_generated_name_without_alias(
    name: str, alias: str | None, ours: bool
) -> None:
    assert names.is_link_ours(name, alias, MARK) is ours


def test_generated_names_are_known_as_such() -> None:
    assert names.is_link_ours(names.link("t", "0123abcd", "ann"), None, MARK)
