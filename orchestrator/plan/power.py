"""Hosts that go off, and on again: what that means for what runs on them."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

from orchestrator.plan.operations import Impact, ObservedHost, ObservedLab, Operation, Plan
from orchestrator.spec.resolved import ResolvedLab


def halt(lab: ResolvedLab, observed: ObservedLab) -> Plan:
    """The operations after which nothing of ``lab`` runs, and nothing is lost: guests are shut down, and then hosts
    that are machines of ours powered off."""
    operations: list[Operation] = []
    for name, seen in observed.hosts.items():
        stops = stop_guests(name, seen)
        operations += stops
        host = lab.hosts.get(name) or lab.former_hosts.get(name)
        if host and host.spec.kind == "vagrant" and seen.facts.present and seen.problem is None:
            operations.append(
                Operation(
                    id=f"host {name} off",
                    host=name,
                    subject=f"host {name}",
                    summary="power off",
                    impact=Impact.RESTART,
                    method="host.halt",
                    needs=tuple(stop.id for stop in stops),
                )
            )
    return Plan(tuple(operations), {name: seen.problem for name, seen in observed.hosts.items() if seen.problem})


def stop_guests(host: str, seen: ObservedHost) -> list[Operation]:
    """Shut down every guest that runs on ``host``."""
    return [
        Operation(
            id=f"guest {facts.name} stops on {host}",
            host=host,
            subject=f"guest {facts.name}",
            summary="shut down",
            impact=Impact.RESTART,
            method="guest.stop",
            params={"guest": facts.name},
        )
        for facts in seen.guests
        if facts.is_on
    ]


def after_restart(seen: ObservedHost) -> ObservedHost:
    """What there will be on a host that was off in between: disks, and domains that do not run."""
    guests = tuple(
        replace(facts, state="off", reason="its host restarts") if facts.is_on else facts for facts in seen.guests
    )
    return replace(seen, networks=(), guests=guests)
