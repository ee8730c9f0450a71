"""The table of probes, and the checkup that runs them."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orchestrator
from orchestrator.doctor import kernel, leftover, machine, network, virt
from orchestrator.doctor.model import Finding, Probe, unknown
from orchestrator.errors import NotFoundError, OrchestratorError
from orchestrator.patience import scaled
from orchestrator.run import run

WORKERS = 4

PROBES: tuple[Probe, ...] = (
    Probe("rights", "root or capabilities", machine.rights),
    Probe("accelerator", "KVM or TCG runs a guest", virt.accelerator, isolated=True, seconds=60),
    Probe("qemu", "QEMU's version and devices", virt.qemu, isolated=True),
    Probe("libvirt", "libvirt's embedded driver opens", virt.libvirt, isolated=True, seconds=60),
    Probe("libvirtd", "a libvirt daemon answers", virt.libvirtd, isolated=True),
    Probe("emulator", "QEMU's user reaches its files", virt.emulator_rights, isolated=True),
    Probe("confinement", "refusals by AppArmor or SELinux", machine.confinement),
    Probe("memfd", "shared, sealed memory", kernel.memfd),
    Probe("userfaultfd", "page faults served in user space", kernel.userfaultfd, isolated=True),
    Probe("bpf", "a BPF program is loaded and run", kernel.bpf, isolated=True),
    Probe("tap", "a frame goes through a tap", network.tap, isolated=True),
    Probe("namespaces", "TCP through veth, VXLAN and bridges", network.namespaces, isolated=True),
    Probe("firewall", "br_netfilter and the FORWARD policy", network.firewall, isolated=True),
    Probe("memory", "available memory, huge pages", machine.memory),
    Probe("disk", "room for images and disks", machine.disk, isolated=True),
    Probe("clock", "right, steady and kept in time", machine.clock),
    Probe("limits", "open files, /dev/shm", machine.limits),
    Probe("leftovers", "what dead labs left behind", leftover.probe, isolated=True, seconds=60),
)


def list_probes() -> list[tuple[str, str]]:
    """Name and description of every probe, in the order in which findings come."""
    return [(probe.name, probe.about) for probe in PROBES]


def checkup(*, only: Collection[str] | None = None) -> list[Finding]:
    """Run the probes and return their findings in the table's order.

    :param only: names of the probes to run; None or empty: all.
    :raise NotFoundError: there is no probe of that name.
    """
    known = [probe.name for probe in PROBES]
    if strangers := sorted(set(only or ()) - set(known)):
        raise NotFoundError(f"no probe is called {', '.join(strangers)}", hint=f"there are: {', '.join(known)}")
    chosen = [probe for probe in PROBES if not only or probe.name in only]
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="doctor") as pool:
        return list(pool.map(examine, chosen))


def examine(probe: Probe, *, here: bool = False) -> Finding:
    """The finding of one probe; never raises what the probe raised.

    :param here: in this process, although the probe wants one of its own.
    """
    try:
        finding = _examine_apart(probe) if probe.isolated and not here else probe.look()
    except OrchestratorError as error:
        finding = unknown(f"cannot be told: {error.message}", *error.tail, fix=error.hint)
    except Exception as error:  # a probe must not take the others with it
        finding = unknown(f"cannot be told: {type(error).__name__}: {error}")
    return dataclasses.replace(finding, name=probe.name)


def _examine_apart(probe: Probe) -> Finding:
    """In a process of its own, killed at the deadline.

    :raise CommandError: it did not end in time, or died.
    """
    ours = str(Path(orchestrator.__file__).parents[1])
    search = os.pathsep.join([ours, *(place for place in sys.path if place and place != ours)])
    command = [sys.executable, "-m", "orchestrator.doctor", "--here", probe.name]
    done = run(command, env={"PYTHONPATH": search}, timeout=scaled(probe.seconds))
    return Finding.from_json(json.loads(done.stdout))
