"""Guests: how what is observed differs from the wish, and what each difference means for a running guest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.guests.domain import GuestFacts
from orchestrator.spec.base import format_size, parse_size
from orchestrator.spec.resolved import ResolvedGuest, ResolvedNic

RESTART_FIELDS = ("cmdline", "accel", "cpu", "machine", "emulator", "hotplug_slots", "xml", "user_data")
CONTENTS_REMOVED = "its contents removed"
NOTED_FIELDS = ("description", "ready")


@dataclass(frozen=True)
class Difference:
    """``key: observed → wished`` lines by what they take."""

    live: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    recreate: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.live or self.restart or self.recreate)


def _arrow(key: str, old: Any, new: Any) -> str:
    def short(value: Any) -> str:
        text = "none" if value in (None, "", []) else " ".join(str(value).split())
        return text if len(text) <= 60 else f"{text[:57]}…"

    return f"{key}: {short(old)} → {short(new)}"


def compare(wish: ResolvedGuest, facts: GuestFacts, image_id: str | None, *, image_has_disk: bool) -> Difference:
    """What differs.

    :param image_id: the image as it would be used now; None where it is not built yet.
    """
    live: list[str] = []
    restart: list[str] = []
    recreate: list[str] = []
    old, new = facts.wish, wish.model_dump(mode="json")

    if (image_id is not None and image_id != facts.image) or old.get("image") != wish.image:
        line = _arrow("image", facts.image or old.get("image"), image_id or wish.image)
        (recreate if image_has_disk else restart).append(line)
    if old.get("disk_size") != new["disk_size"]:
        recreate.append(_arrow("disk_size", old.get("disk_size"), new["disk_size"]))
    for key in RESTART_FIELDS:
        if old.get(key) != new[key]:
            restart.append(_arrow(key, old.get(key), new[key]))
    for key in NOTED_FIELDS:
        if old.get(key) != new[key]:
            live.append(_arrow(key, old.get(key), new[key]))

    # Under TCG QEMU never lets go of a vCPU that the guest has released (seen with 7.2): libvirt waits in vain.
    vcpus_fall = restart if facts.accel == "tcg" else live
    old_vcpus_max = int(old.get("vcpus_max", 1))
    _compare_size("vcpus", wish.vcpus, facts.vcpus, old_vcpus_max, wish.vcpus_max, live, restart, vcpus_fall)
    old_max = parse_size(old["memory_max"]) if old.get("memory_max") else facts.memory_total
    _compare_size("memory", wish.memory, facts.memory, old_max, wish.memory_max, live, restart, live)
    _compare_nics(wish, facts, live, restart)
    _compare_disks(wish, facts, live, recreate)
    return Difference(tuple(live), tuple(restart), tuple(recreate))


def _compare_size(
    key: str,
    want: int,
    have: int,
    old_max: int,
    new_max: int,
    live: list[str],
    restart: list[str],
    fall: list[str],
) -> None:
    def show(value: int) -> str:
        return format_size(value) if key == "memory" else str(value)

    if new_max > old_max:
        restart.append(f"{key} maximum: {show(old_max)} → {show(new_max)}")
    if want != have:
        (fall if want < have else restart if want > old_max else live).append(f"{key}: {show(have)} → {show(want)}")


def _changed_fields(what: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [_arrow(f"{what} {key}", old.get(key), value) for key, value in new.items() if old.get(key) != value]


def _compare_nics(wish: ResolvedGuest, facts: GuestFacts, live: list[str], restart: list[str]) -> None:
    before = {nic["mac"]: nic for nic in facts.wish.get("nics", [])}
    wanted = {nic.mac: nic for nic in wish.nics}
    for mac in facts.nics:
        if mac not in wanted:
            live.append(f"NIC {mac}: unplugged")
    for mac, nic in wanted.items():
        if mac not in facts.nics:
            live.append(f"NIC {mac} on {nic.network}: plugged")
        elif mac in before:
            old, new = ResolvedNic.model_validate(before[mac]), nic
            policy = set(ResolvedNic.POLICY)
            dumps = (each.model_dump(mode="json", exclude=policy) for each in (old, new))
            restart += _changed_fields(f"NIC {mac}", *dumps)


def _compare_disks(wish: ResolvedGuest, facts: GuestFacts, live: list[str], recreate: list[str]) -> None:
    before = {disk["name"]: disk for disk in facts.wish.get("disks", [])}
    wanted = {disk.name: disk for disk in wish.disks}
    for name in facts.disks:
        if name not in wanted:
            live.append(f"disk {name}: unplugged, {CONTENTS_REMOVED}")
    for name, disk in wanted.items():
        if name not in facts.disks:
            live.append(f"disk {name} of {format_size(disk.size)}: plugged")
        elif name in before:
            recreate += _changed_fields(f"disk {name}", before[name], disk.model_dump(mode="json"))
