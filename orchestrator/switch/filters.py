"""eBPF programs at links: tc filters of the qdisc ``clsact``, named for who put them there."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.tcmsg import sched_bpf

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3


class _Options(sched_bpf.options):  # type: ignore[misc]
    """The library does not know the number of a filter's program (``TCA_BPF_ID`` of the kernel's ``pkt_cls.h``)."""

    nla_map = (
        *sched_bpf.options.nla_map[:9],
        ("TCA_BPF_FLAGS_GEN", "uint32"),
        ("TCA_BPF_TAG", "hex"),
        ("TCA_BPF_ID", "uint32"),
    )


sched_bpf.options = _Options


class Filter(NamedTuple):
    """:ivar program: number of its program, for :func:`~orchestrator.switch.bpf.program_by_id`."""

    name: str
    program: int
    priority: int


def find(ip: IPRoute, index: int, direction: int, prefix: str) -> Filter | None:
    """The filter at a link whose name begins with ``prefix``."""
    try:
        filters = ip.get_filters(index=index, parent=direction)
    except NetlinkError as error:
        if error.code in (errno.EINVAL, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return None  # the link has no clsact, or has just gone
        raise
    for found in filters:
        options = found.get_attr("TCA_OPTIONS") if found.get_attr("TCA_KIND") == "bpf" else None
        if options is None:
            continue
        name = str(options.get_attr("TCA_BPF_NAME") or "")
        if name.startswith(prefix):
            return Filter(name, int(options.get_attr("TCA_BPF_ID") or 0), found["info"] >> 16)
    return None


def attach(ip: IPRoute, index: int, direction: int, program: int, name: str, priority: int) -> None:
    """Put a program at a link, in place of the one of that priority: no frame is without one meanwhile.

    :param program: its file descriptor.
    """
    with contextlib.suppress(NetlinkError):  # it has one; if not, what follows says so
        ip.tc("add", "clsact", index)
    ip.tc(
        "replace-filter",
        "bpf",
        index,
        fd=program,
        name=name,
        parent=direction,
        classid=1,
        direct_action=True,
        prio=priority,
        handle=1,
    )


def detach(ip: IPRoute, index: int, direction: int, prefix: str) -> None:
    """Take the filter whose name begins with ``prefix`` from a link, and the qdisc if nothing else is at it."""
    found = find(ip, index, direction, prefix)
    if found is None:
        return
    ip.tc("del-filter", "bpf", index, parent=direction, prio=found.priority, handle=1)
    if not any(ip.get_filters(index=index, parent=each) for each in (INGRESS, EGRESS)):
        ip.tc("del", "clsact", index)
