"""Plans: from data files, and what holds for every plan.

A data file (``data/plan/*.yaml``) says:

=============  ===========================================================================================
``before``     a lab file; what is observed is that lab, perfect. ``demo``: the example; ``nothing``;
               ``far``: :data:`FAR`
``damage``     what is not perfect, in order; see :class:`Damage`
``after``      laid over ``before`` to get the wish; null takes a key away. ``removed``: the lab is taken down
``plan``       one line per operation: impact | subject | host | summary | details
``needs``      id → ids, for operations where the needs matter
``xfail``      the defect that keeps it from passing; ``misfit``: that keeps a call from fitting the agent's
=============  ===========================================================================================
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from orchestrator.errors import HostError
from orchestrator.guests.migrationservice import MigrationService
from orchestrator.guests.service import GuestService
from orchestrator.plan.build import build, build_removal
from orchestrator.plan.operations import MIGRATE, Impact, ObservedHost, ObservedLab, Operation, Plan
from orchestrator.spec.load import load
from orchestrator.spec.resolve import resolve
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.switch.service import NetworkService
from orchestrator.testing import MemoryHost, MemoryLab, perfect
from tests.unit.labs import EXAMPLES, demo, lab_changes, lab_files, one_guest, resolved

DATA = Path(__file__).parent / "data" / "plan"
SERVICES = {
    "guest": GuestService,
    "migration": MigrationService,
    "network": NetworkService,
    "port": NetworkService,
}
PORT_CALLS = {"port.ensure": "ensure_ports", "port.remove": "remove_ports"}


def read_yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


FAR = """
lab: far
hosts:
  alpha: {kind: ssh, address: 192.0.2.1}
  beta: {kind: ssh, address: 192.0.2.2}
  gamma: {kind: ssh, address: 192.0.2.3}
networks: {lan: {ipv4: 10.10.0.0/24}, wan: {ipv4: 10.20.0.0/24}}
defaults: {guest: {nics: [lan], memory: {size: 128M, max: 512M}}}
guests:
  ann: {host: alpha, disks: [{name: data, size: 1G}]}
  eve: {host: gamma}
"""
"""Three machines; two have a guest on the same network."""


class Damage:
    """What can be wrong with an observation, as a data file says it."""

    def __init__(self, observed: ObservedLab) -> None:
        observed = copy.deepcopy(observed)
        self.hosts = dict(observed.hosts)
        self.images = dict(observed.images)

    def observed(self) -> ObservedLab:
        return ObservedLab(self.hosts, self.images)

    def _each(self, change: Any) -> None:
        self.hosts = {name: change(name, seen) for name, seen in self.hosts.items()}

    def guest(self, changes: dict[str, dict[str, Any]]) -> None:
        """``{ann: {state: crashed}}``: facts of guests."""
        self._each(
            lambda _, seen: replace(
                seen, guests=tuple(replace(facts, **changes.get(facts.name, {})) for facts in seen.guests)
            )
        )

    def no_guest(self, name: str) -> None:
        self._each(lambda _, seen: replace(seen, guests=tuple(facts for facts in seen.guests if facts.name != name)))

    def no_ports(self, name: str) -> None:
        """All taps of a guest are gone."""
        for seen in self.hosts.values():
            for facts in seen.networks:
                facts.ports = {tap: owner for tap, owner in facts.ports.items() if not owner.startswith(f"{name}/")}

    def network(self, changes: dict[str, dict[str, dict[str, Any]]]) -> None:
        """``{alpha: {lan: {mtu: 1400}}}``: facts of networks."""
        self._each(
            lambda host, seen: replace(
                seen,
                networks=tuple(
                    replace(facts, **changes.get(host, {}).get(facts.name, {})) for facts in seen.networks
                ),
            )
        )

    def no_network(self, where: dict[str, str]) -> None:
        """``{alpha: lan}``; its taps are not seen any more either."""
        self._each(
            lambda host, seen: replace(
                seen, networks=tuple(facts for facts in seen.networks if facts.name != where.get(host))
            )
        )

    def host(self, changes: dict[str, dict[str, Any]]) -> None:
        """``{alpha: {agent: false}}``: facts of hosts."""
        self._each(
            lambda host, seen: (
                replace(
                    seen,
                    facts=replace(seen.facts, **{k: v if k != "problems" else tuple(v) for k, v in items.items()}),
                )
                if (items := changes.get(host))
                else seen
            )
        )

    def arriving(self, moves: dict[str, dict[str, str]]) -> None:
        """``{ann: {from: alpha, to: beta}}``: a migration was cut short, a copy is on the target."""
        for name, move in moves.items():
            (facts,) = (facts for facts in self.hosts[move["from"]].guests if facts.name == name)
            copy_there = replace(facts, host=move["to"], state="paused", ready=False, arriving_from=move["from"])
            seen = self.hosts[move["to"]]
            self.hosts[move["to"]] = replace(seen, guests=(*seen.guests, copy_there))

    def gone(self, where: dict[str, str]) -> None:
        """``{alpha: ann}``: a guest is not on that host any more."""
        self._each(
            lambda host, seen: replace(
                seen, guests=tuple(facts for facts in seen.guests if facts.name != where.get(host))
            )
        )

    def migrates(self, hosts: dict[str, bool | None]) -> None:
        """``{alpha: false}``: hosts that can send and receive guests, or not."""
        self._each(lambda host, seen: replace(seen, migrates=hosts.get(host, seen.migrates)))

    def no_host(self, name: str) -> None:
        self.hosts[name] = ObservedHost()

    def unreachable(self, name: str) -> None:
        self.hosts[name] = ObservedHost(problem=HostError("no route to host"))

    def image(self, changes: dict[str, str | None]) -> None:
        """``{tiny: null}``: ids of images in the cache; null: not there."""
        self.images |= changes


def lay_over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = {**below, **{key: lay_over(below.get(key), value) for key, value in above.items()}}
    return {key: value for key, value in merged.items() if key not in above or value is not None}


def resolve_file(data: Any, tmp_path: Path, previous: ResolvedLab | None) -> ResolvedLab:
    file = tmp_path / "lab.yaml"
    file.write_text(json.dumps(data))  # which is YAML, too
    loaded = load(file, environ={})
    return resolve(loaded.spec, loaded.file, previous)


def lines(plan: Plan) -> list[str]:
    return [
        " | ".join(
            [operation.impact.value, operation.subject, operation.host or "-", operation.summary, *operation.detail]
        )
        for operation in plan.operations
    ]


def cases(defect: str = "xfail") -> list[Any]:
    found = []
    for path in sorted(DATA.glob("*.yaml")):
        case = read_yaml(path.read_text())
        marks = [pytest.mark.xfail(strict=True, reason=case[defect])] if defect in case else []
        found.append(pytest.param(case, id=path.stem, marks=marks))
    return found


def plan_of(case: dict[str, Any], tmp_path: Path) -> Plan:
    """The plan of a data file."""
    data = case["before"]
    if data in ("demo", "nothing"):
        data = read_yaml((EXAMPLES / "demo.yaml").read_text())
    elif data == "far":
        data = read_yaml(FAR)
    before = resolve_file(data, tmp_path, None)
    observed = ObservedLab() if case["before"] == "nothing" else perfect(before)
    wish = before
    if isinstance(changes := case.get("after"), dict):
        wish = resolve_file(lay_over(data, changes), tmp_path, before)
        gone = {name: host for name, host in before.hosts.items() if name not in wish.hosts}
        wish = wish.model_copy(update={"former_hosts": gone})
    damage = Damage(observed)
    for step in case.get("damage", []):
        ((what, how),) = step.items()
        getattr(damage, what.replace(" ", "_"))(how)
    return (build_removal if case.get("after") == "removed" else build)(wish, damage.observed())


@pytest.mark.parametrize("case", cases())
def test_plan_of_data_file(case: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(case, tmp_path)

    assert lines(plan) == case["plan"]
    needs = {operation.id: list(operation.needs) for operation in plan.operations}
    for operation, wanted in case.get("needs", {}).items():
        assert needs[operation] == wanted
    assert plan.to_json()["unreachable"] == case.get("unreachable", {})


# -- what holds for every plan ---------------------------------------------------------------------------------------


def check_form(plan: Plan) -> None:
    """Ids are unique, and needs refer to operations that come before."""
    seen: set[str] = set()
    for operation in plan.operations:
        assert operation.id not in seen
        assert set(operation.needs) <= seen
        seen.add(operation.id)


def carry_out(plan: Plan, memory: MemoryLab, count: int | None = None) -> None:
    """The whole plan, or its first ``count`` operations."""
    for operation in plan.operations[:count]:
        memory.carry_out(operation)


def there(observed: ObservedLab) -> dict[str, Any]:
    """What there is, by name: on each host the networks with their taps, and the guests with their devices."""
    return {
        name: {
            **{f"network {f.name}": (f.peers, f.mtu, f.ports) for f in seen.networks},
            **{f"guest {facts.name}": (facts.state, set(facts.nics), set(facts.disks)) for facts in seen.guests},
        }
        for name, seen in observed.hosts.items()
        if seen.facts.present
    }


@given(lab_files())
def test_plan_for_a_perfect_lab_is_empty(data: dict[str, Any]) -> None:
    lab = resolved(data)

    assert lines(build(lab, perfect(lab))) == []


@given(lab_files())
def test_plan_from_nothing_makes_the_perfect_lab(data: dict[str, Any]) -> None:
    lab, memory = resolved(data), MemoryLab()
    plan = build(lab, memory.observe())

    carry_out(plan, memory)

    check_form(plan)
    assert there(memory.observe()) == there(perfect(lab))
    assert {operation.impact for operation in plan.operations} <= {Impact.CREATE}


@given(lab_changes())
def test_plan_after_an_edit_leads_to_the_perfect_lab(change: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before = resolved(change[0])
    after = resolved(change[1], before)
    memory = MemoryLab(perfect(before))
    plan = build(after, memory.observe())

    carry_out(plan, memory)

    check_form(plan)
    assert lines(build(after, memory.observe())) == []
    assert there(memory.observe()) == there(perfect(after))


@given(lab_files())
def test_removal_leaves_nothing(data: dict[str, Any]) -> None:
    lab = resolved(data)
    memory = MemoryLab(perfect(lab))
    plan = build_removal(lab, memory.observe())

    carry_out(plan, memory)

    check_form(plan)
    assert there(memory.observe()) == {}
    assert {operation.impact for operation in plan.operations} == {Impact.REMOVE}


@given(lab_changes(), st.integers(0, 8))
def test_plan_that_is_cut_short_is_finished_by_the_next(
    change: tuple[dict[str, Any], dict[str, Any]], done: int
) -> None:
    before = resolved(change[0])
    after = resolved(change[1], before)
    memory = MemoryLab(perfect(before))
    carry_out(build(after, memory.observe()), memory, done)

    carry_out(build(after, memory.observe()), memory)

    assert lines(build(after, memory.observe())) == []
    assert there(memory.observe()) == there(perfect(after))


@given(lab_changes(), st.integers(0, 8))
def test_plan_that_is_cut_short_is_undone_by_going_back(
    change: tuple[dict[str, Any], dict[str, Any]], done: int
) -> None:
    before = resolved(change[0])
    after = resolved(change[1], before)
    memory = MemoryLab(perfect(before))
    carry_out(build(after, memory.observe()), memory, done)
    back = before.model_copy(update={"former_hosts": after.hosts})

    carry_out(build(back, memory.observe()), memory)

    assert lines(build(back, memory.observe())) == []
    assert there(memory.observe()) == there(perfect(before))


STATES = {
    "gone": None,
    "off": {"state": "off", "reason": "shut down", "ready": False},
    "crashed": {"state": "crashed", "reason": "Kernel panic", "ready": False},
    "without taps": {},
}


@given(lab_changes(), st.data())
def test_plan_mends_what_is_broken_and_makes_the_edit_at_once(
    change: tuple[dict[str, Any], dict[str, Any]], data: st.DataObject
) -> None:
    before = resolved(change[0])
    after = resolved(change[1], before)
    damage = Damage(perfect(before))
    for name in before.guests:
        for state in data.draw(st.sets(st.sampled_from(sorted(STATES)), max_size=2), label=name):
            if state == "gone":
                damage.no_guest(name)
            elif state == "without taps":
                damage.no_ports(name)
            else:
                damage.guest({name: STATES[state]})
    for host in data.draw(st.sets(st.sampled_from(sorted(before.hosts)), max_size=1), label="lost hosts"):
        damage.no_host(host)
    memory = MemoryLab(damage.observed())
    plan = build(after, memory.observe())

    carry_out(plan, memory)

    check_form(plan)
    assert lines(build(after, memory.observe())) == []
    assert there(memory.observe()) == there(perfect(after))


@pytest.mark.xfail(
    strict=True, reason="a guest that stands still, or boots, is changed but neither resumed nor waited for"
)
@pytest.mark.parametrize("facts", [{"state": "paused", "ready": False}, {"ready": False}], ids=["paused", "booting"])
def test_plan_for_a_guest_that_waits_and_a_live_change_does_both(facts: dict[str, Any]) -> None:
    before = one_guest(memory={"size": "128M", "max": "256M"})
    after = one_guest(memory={"size": "256M", "max": "256M"})
    damage = Damage(perfect(before))
    damage.guest({"ann": facts})
    memory = MemoryLab(damage.observed())

    carry_out(build(after, memory.observe()), memory)

    assert lines(build(after, memory.observe())) == []


def test_plan_for_a_lost_tap_and_a_new_nic_restarts_the_guest(tmp_path: Path) -> None:
    case = {
        "before": "demo",
        "after": {"networks": {"wan": {"ipv4": "10.20.0.0/24"}}, "guests": {"ann": {"nics": ["lan", "wan"]}}},
        "damage": [{"no ports": "ann"}],
    }

    operation = plan_of(case, tmp_path).operations[-1]

    assert (operation.subject, operation.impact) == ("guest ann", Impact.RESTART)


def test_plan_for_an_unreachable_host_has_nothing_for_it() -> None:
    lab = demo()
    observed = ObservedLab({"alpha": ObservedHost(problem=HostError("no answer")), "beta": ObservedHost()})

    plan = build(lab, observed)

    assert {operation.host for operation in plan.operations} == {"beta", ""}
    assert plan.to_json()["unreachable"] == {"alpha": "no answer"}


# -- operations fit the calls of the agent ---------------------------------------------------------------------------


def handler(method: str) -> Any:
    service = SERVICES[method.partition(".")[0]]
    return getattr(service, PORT_CALLS.get(method, method.partition(".")[2]))


def sent(operation: Operation) -> dict[str, Any]:
    """The parameters that the agent gets."""
    params = dict(operation.params)
    if operation.image:
        params["image"] = {}
    if operation.method in ("guest.start", "guest.restart"):
        params["keys"] = []
    return params


def check_fit(method: str, params: dict[str, Any]) -> None:
    """The agent's handler of ``method`` takes ``params``, by name and by kind."""
    bound = inspect.signature(handler(method)).bind(None, None, **params)
    for name, value in bound.arguments.items():
        kind = inspect.signature(handler(method)).parameters[name].annotation
        if name in params and kind in ("str", "bool", "int", "float"):
            assert type(value).__name__ == kind, f"{method}: {name} is {value!r}"
        if name in params and kind.startswith(("dict", "list")):
            assert isinstance(value, dict if kind.startswith("dict") else list), f"{method}: {name} is {value!r}"


@pytest.mark.parametrize("case", cases("misfit"))
def test_operations_and_their_undoing_fit_the_calls_of_the_agent(case: dict[str, Any], tmp_path: Path) -> None:
    calls = [
        call
        for operation in plan_of(case, tmp_path).operations
        for call in (
            [(operation.method, sent(operation))]
            + ([(operation.undo.method, dict(operation.undo.params))] if operation.undo else [])
        )
        if call[0] not in ("host.ensure", "host.remove", "image.ensure", MIGRATE)
    ]

    for method, params in calls:
        check_fit(method, params)

    assert all(handler(method) for method, _ in calls)


def test_host_in_memory_has_the_calls_of_the_agent_with_their_parameters() -> None:
    mine = MemoryHost("alpha").methods()

    for method, call in mine.items():
        if method.partition(".")[0] in SERVICES:
            theirs = inspect.signature(handler(method)).parameters
            ours = inspect.signature(call).parameters
            assert list(ours) == [name for name in theirs if name != "self"], method
            assert [parameter.annotation for parameter in ours.values()] == [
                parameter.annotation for name, parameter in theirs.items() if name != "self"
            ], method
    assert {"guest.start", "guest.restart", "network.ensure", "port.ensure"} <= set(mine)


# -- parts of a plan -------------------------------------------------------------------------------------------------


def step(name: str, *needs: str) -> Operation:
    return Operation(
        id=name, host="alpha", subject=name, summary="do", impact=Impact.LIVE, method=f"do.{name}", needs=needs
    )


def names(plan: Plan) -> list[str]:
    return [operation.id for operation in plan.operations]


STEPS = Plan(
    (
        step("host"),
        step("other"),
        step("network", "host"),
        step("move", "network"),
        step("tidy", "move"),
        step("restart", "move"),
        step("tidier", "tidy", "network"),
        step("both", "tidy", "other"),
    )
)


def test_part_of_a_plan_has_what_is_wanted_with_its_needs_and_what_follows_from_that_alone() -> None:
    part = STEPS.only(lambda each: each.id == "move", after=lambda each: each.id != "restart")

    assert names(part) == ["host", "network", "move", "tidy", "tidier"]
    check_form(part)


def test_part_of_a_plan_that_stands_alone_waits_for_nothing_else() -> None:
    part = STEPS.alone(lambda each: each.id in ("host", "network", "tidy", "both"))

    assert names(part) == ["host", "network"]
    check_form(part)


@given(lab_changes(), st.data())
def test_parts_of_a_plan_can_be_carried_out(
    change: tuple[dict[str, Any], dict[str, Any]], data: st.DataObject
) -> None:
    before = resolved(change[0])
    plan = build(resolved(change[1], before), perfect(before))
    wanted = data.draw(st.sets(st.sampled_from(names(plan)))) if plan else set()

    check_form(plan.only(lambda each: each.id in wanted, after=lambda _: True))
    check_form(plan.alone(lambda each: each.id in wanted))


@given(lab_changes())
def test_guests_that_can_move_as_they_run_are_not_made_anew(change: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before = resolved(change[0])
    after = resolved(change[1], before)
    plan = build(after, perfect(before))

    moved = {str(each.params["guest"]) for each in plan.operations if each.method == MIGRATE}

    for name, guest in after.guests.items():
        was = before.guests.get(name)
        if was and was.host != guest.host and after.hosts[guest.host].spec.kind == "ssh":
            anew = any(line.startswith(("image:", "disk_size:", "disk ")) for line in changed(was, guest))
            assert (name in moved) != anew


def changed(before: Any, after: Any) -> list[str]:
    """What differs between two guests that cannot be changed but by making their disks anew."""
    sizes = {disk.name: disk.size for disk in before.disks}
    found = [f"disk {disk.name}" for disk in after.disks if disk.name in sizes and sizes[disk.name] != disk.size]
    return found + [f"{key}:" for key in ("image", "disk_size") if getattr(before, key) != getattr(after, key)]
