"""Hosts that are machines of ours: made from a box, restarted, powered off."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import HostError
from orchestrator.hosts.transport import HostFacts
from orchestrator.plan import power
from orchestrator.plan.build import build, build_removal
from orchestrator.plan.observe import observe
from orchestrator.plan.operations import Impact, ObservedHost, ObservedLab, Plan
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.testing import MemoryLab, perfect
from tests.unit.labs import resolved

pytestmark = pytest.mark.usefixtures("places")


def lab(**beta: object) -> ResolvedLab:
    return resolved(
        {
            "lab": "power",
            "hosts": {"alpha": {}, "beta": {"kind": "vagrant", **beta}},
            "networks": {"lan": {"ipv4": "10.1.0.0/24"}},
            "guests": {"ann": {"host": "alpha", "nics": ["lan"]}, "eve": {"host": "beta", "nics": ["lan"]}},
        }
    )


def with_beta(observed: ObservedLab, facts: HostFacts) -> ObservedLab:
    beta = replace(observed.hosts["beta"], facts=facts)
    return replace(observed, hosts={**observed.hosts, "beta": beta})


def lines(plan: Plan) -> list[str]:
    return [f"{one.impact.value} {one.subject} {one.host}: {one.summary}" for one in plan.operations]


def test_image_of_the_box_is_made_before_the_first_host() -> None:
    wished = lab()
    observed = ObservedLab(hosts={name: ObservedHost() for name in wished.hosts}, images={"tiny": "tiny-0"})

    plan = build(wished, observed)

    first = next(one for one in plan.operations if one.subject == "host beta")
    assert first.needs == ("image labhost",)
    assert [one.id for one in plan.operations].count("image labhost") == 1


def test_image_is_not_made_where_there_is_one_or_the_file_names_a_box() -> None:
    hosts = {name: ObservedHost() for name in ("alpha", "beta")}

    cached = build(lab(), ObservedLab(hosts=hosts, images={"tiny": "tiny-0", "labhost": "labhost-0"}))
    named = build(lab(box="debian/bookworm64"), ObservedLab(hosts=hosts, images={"tiny": "tiny-0"}))

    for plan in (cached, named):
        assert not [one for one in plan.operations if one.subject.startswith("image")]


def test_host_that_must_restart_takes_its_guests_down_and_up_again() -> None:
    wished = lab()
    facts = HostFacts(present=True, agent=True, problems=("memory: 2G → 4G",), restart=True)

    plan = build(wished, with_beta(perfect(wished), facts))

    assert lines(plan) == [
        "restart guest eve beta: shut down",
        "restart host beta beta: restart",
        "create network lan beta: create",
        "create guest eve beta: make its taps",
        "restart guest eve beta: start",
    ]
    stop, host, network, _, start = plan.operations
    assert host.needs == (stop.id,)
    assert network.needs == (host.id,)
    assert host.id in start.needs
    assert start.detail[0] == "state: off: its host restarts → running"


def test_halt_shuts_guests_down_and_only_our_machines_off() -> None:
    wished = lab()

    plan = power.halt(wished, perfect(wished))

    assert lines(plan) == [
        "restart guest ann alpha: shut down",
        "restart guest eve beta: shut down",
        "restart host beta beta: power off",
    ]
    assert plan.operations[2].needs == (plan.operations[1].id,)
    assert {one.impact for one in plan.operations} == {Impact.RESTART}


def test_halt_leaves_out_a_host_that_does_not_answer() -> None:
    wished = lab()
    observed = perfect(wished)
    silent = replace(observed, hosts={**observed.hosts, "beta": ObservedHost(problem=HostError("no answer"))})

    plan = power.halt(wished, silent)

    assert lines(plan) == ["restart guest ann alpha: shut down"]
    assert plan.to_json()["unreachable"] == {"beta": "no answer"}


def test_host_that_goes_with_all_that_is_on_it_is_not_asked_and_only_removed() -> None:
    wished = lab()
    memory = MemoryLab(perfect(wished))
    hosts = [memory.transport(wished, name) for name in wished.hosts]
    hosts[1].disposable = True

    made = build_removal(wished, observe(wished, hosts, holder=lambda *_: None, leaving=True))
    looked = observe(wished, hosts, holder=lambda *_: None)

    assert [line for line in lines(made) if "beta" in line] == ["remove host beta beta: remove"]
    assert "remove guest ann alpha: remove" in lines(made)
    assert [facts.name for facts in looked.hosts["beta"].guests] == ["eve"]
