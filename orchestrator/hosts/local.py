"""Hosts of kind ``local``: network namespaces of this machine.

One namespace per host, ``orc.LAB.HOST``, and one, ``orc.LAB``, that holds nothing but the underlay's bridge, so that
no link of a lab appears among the machine's own. Each namespace's ``lo`` carries the ownership mark as its alias.
A network with an uplink adds one veth pair to the machine's namespace, with routes to the guests' addresses; the next
hops are IPv6 link-local addresses (RFC 5549), so that no address of the machine's own networks is used up.

In a lab that has Vagrant hosts too, a veth pair joins the underlay's bridge with the one that those are plugged into
(:mod:`orchestrator.hosts.underlay`), so that all of them are on one underlay.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetNS, netns
from pyroute2.netlink.exceptions import NetlinkError

from orchestrator import names
from orchestrator.errors import CommandError, StateError, TakenError
from orchestrator.hosts import agentproc
from orchestrator.hosts.agentproc import AgentPlace
from orchestrator.hosts.rpc import Progress, Stream
from orchestrator.hosts.transport import HostFacts, SharedAgent
from orchestrator.run import shell_line, spawn, tail_of
from orchestrator.spec.resolved import ResolvedHost, ResolvedLab

NETNS_DIR = Path("/run/netns")
_NAMESPACES = threading.Lock()  # the hosts of a lab, made in parallel, share the underlay's namespace

UNDERLAY = "underlay"
JOINT = "joint"
UPLINK = "uplink"
ROOT_NEXT_HOP = "fe80::1"
HOST_NEXT_HOP = "fe80::2"


def _index(ip: IPRoute, name: str) -> int | None:
    found = ip.link_lookup(ifname=name)
    return int(found[0]) if found else None


def _alias(ip: IPRoute, index: int) -> str | None:
    alias = ip.link("get", index=index)[0].get("ifalias")
    return str(alias) if alias else None


@contextmanager
def _inside(namespace: str) -> Iterator[IPRoute]:
    with NetNS(namespace, flags=0) as ip:
        yield ip


class LocalTransport(SharedAgent):
    """A network namespace of this machine, with an agent and an embedded libvirt of its own."""

    shares_files = True
    disposable = False

    def __init__(self, lab: ResolvedLab, host: ResolvedHost) -> None:
        self.host = host
        self.lab = lab
        self.place = AgentPlace.of(lab.lab, lab.uid, host.name, "embed")
        self.state_dir = self.place.state_dir
        self.namespace = names.namespace(lab.lab, host.name)
        self.underlay_namespace = names.namespace(lab.lab)
        self._port = names.link("h", lab.uid, host.name)
        self._uplink = names.link("u", lab.uid, host.name)
        self._uplink_mark = names.mark(lab.uid, "uplink", host.name)
        self._joint = names.link("j", lab.uid, UNDERLAY)
        self._joins = any(other.spec.kind == "vagrant" for other in lab.hosts.values())

    # -- what is there -------------------------------------------------------------------------------------------

    def _exists(self, namespace: str) -> bool:
        """:raise TakenError: the namespace is there but is not ours."""
        if not (NETNS_DIR / namespace).exists():
            return False
        try:
            with _inside(namespace) as ip:
                owner = names.parse_mark(_alias(ip, 1))
        except OSError as error:
            if error.errno == errno.EINVAL:  # a file left by a machine that went down: nothing is mounted on it
                return False
            raise
        if owner is None or owner[0] != self.lab.uid:
            raise TakenError(
                f"network namespace {namespace} belongs to somebody else",
                hint=f"rename the lab, or remove it: ip netns del {namespace}",
            )
        return True

    def _uplink_routes(self) -> set[str]:
        """Addresses of the guests here that the machine's own namespace routes to."""
        return {
            address
            for guest in self.lab.guests_of(self.host.name)
            for nic in guest.nics
            if self.lab.networks[nic.network].uplink
            for address in nic.addresses
        }

    def facts(self) -> HostFacts:
        _need_root()
        parts = [self._exists(self.underlay_namespace), self._exists(self.namespace)]
        if not any(parts):
            return HostFacts()
        if not all(parts):
            return HostFacts(present=True, problems=("a network namespace is missing",), broken=True)
        problems = []
        with _inside(self.namespace) as ip:
            index = _index(ip, UNDERLAY)
            wanted = f"{self.host.underlay}/{self.lab.underlay_prefix}"
            if index is None:
                problems.append("the underlay's link is missing")
            else:
                link = ip.link("get", index=index)[0]
                if link.get("mtu") != self.lab.underlay_mtu:
                    problems.append(f"underlay mtu: {link.get('mtu')} → {self.lab.underlay_mtu}")
                have = [
                    f"{a.get('local') or a.get('address')}/{a['prefixlen']}"
                    for a in ip.get_addr(index=index, family=2)
                ]
                if have != [wanted]:
                    problems.append(f"underlay address: {', '.join(have) or 'none'} → {wanted}")
        if self._joins and not self._is_joined():
            problems.append("the underlay does not reach the Vagrant hosts")
        if not self._joins and self._has_joint():
            problems.append("the underlay leads to Vagrant hosts that are gone")
        wanted_routes = self._uplink_routes()
        have_routes = self._have_routes()
        if wanted_routes != have_routes:
            problems.append(f"uplink routes: {len(have_routes)} → {len(wanted_routes)}")
        agent = agentproc.answers(self.place)
        return HostFacts(present=True, agent=agent, problems=tuple(problems))

    def _have_routes(self) -> set[str]:
        with IPRoute() as ip:
            index = _index(ip, self._uplink)
            if index is None:
                return set()
            self._check_uplink_is_ours(ip, index)
            return {
                str(route.get("dst"))
                for family, full in ((2, 32), (10, 128))
                for route in ip.get_routes(family=family, oif=index, table=254)
                if route["dst_len"] == full and not str(route.get("dst")).startswith("fe80")
            }

    def _check_uplink_is_ours(self, ip: IPRoute, index: int) -> None:
        if not names.is_link_ours(self._uplink, _alias(ip, index), self._uplink_mark):
            raise TakenError(f"link {self._uplink} belongs to somebody else", hint=f"ip link del {self._uplink}")

    # -- making it -----------------------------------------------------------------------------------------------

    def ensure(self, progress: Progress, cancel: threading.Event | None = None) -> None:
        _need_root()
        progress("network namespace")
        with _NAMESPACES:
            self._ensure_namespace(self.underlay_namespace, "underlay")
            self._ensure_namespace(self.namespace, self.host.name)
            self._ensure_underlay()
            if self._joins and not self._is_joined():
                progress("joining the underlay of the Vagrant hosts")
                self._join()
            elif not self._joins:
                self._part()
        self._ensure_uplink()
        progress("agent")
        self.start_agent()

    def start_agent(self) -> None:
        if agentproc.serves(self.place):
            return  # calls may be under way
        self.forget_agent()
        agentproc.start(self.place, ["ip", "netns", "exec", self.namespace], ["--own-mounts"])

    def _ensure_namespace(self, namespace: str, name: str) -> None:
        if self._exists(namespace):
            return
        stale = NETNS_DIR / namespace
        if stale.exists():
            stale.unlink()
        _make_namespace(namespace, names.mark(self.lab.uid, "host", name))

    def _ensure_underlay(self) -> None:
        mtu = self.lab.underlay_mtu
        with _inside(self.underlay_namespace) as ip:
            bridge = _index(ip, UNDERLAY)
            if bridge is None:
                ip.link("add", ifname=UNDERLAY, kind="bridge")
                bridge = _index(ip, UNDERLAY)
            ip.link("set", index=bridge, state="up", mtu=mtu)
            port = _index(ip, self._port)
            if port is None:
                ip.link(
                    "add",
                    ifname=self._port,
                    kind="veth",
                    peer={"ifname": UNDERLAY, "net_ns_fd": self.namespace},
                )
                port = _index(ip, self._port)
            ip.link("set", index=port, master=bridge, mtu=mtu, state="up")
        with _inside(self.namespace) as ip:
            index = _index(ip, UNDERLAY)
            ip.link("set", index=index, mtu=mtu, state="up")
            wanted = (self.host.underlay, self.lab.underlay_prefix)
            for address in ip.get_addr(index=index, family=2):
                if (address.get("address"), address["prefixlen"]) != wanted:
                    ip.addr("del", index=index, address=address.get("address"), prefixlen=address["prefixlen"])
            ip.addr("replace", index=index, address=wanted[0], prefixlen=wanted[1])

    def _is_joined(self) -> bool:
        from orchestrator.hosts import underlay  # libvirt, which labs of local hosts alone do without

        with IPRoute() as ip:
            bridge, joint = _index(ip, underlay.bridge_name(self.lab)), _index(ip, self._joint)
            return bridge is not None and joint is not None and ip.link("get", index=joint)[0].get("master") == bridge

    def _join(self) -> None:
        from orchestrator.hosts import libvirtd, underlay

        mtu = self.lab.underlay_mtu
        with libvirtd.session() as conn, IPRoute() as ip:
            underlay.ensure(self.lab, conn)
            joint = _index(ip, self._joint)
            if joint is None:
                peer = {"ifname": JOINT, "net_ns_fd": self.underlay_namespace}
                ip.link("add", ifname=self._joint, kind="veth", peer=peer)
                joint = _index(ip, self._joint)
            mark = names.mark(self.lab.uid, "underlay", self.lab.lab)
            bridge = _index(ip, underlay.bridge_name(self.lab))
            ip.link("set", index=joint, ifalias=mark, master=bridge, mtu=mtu, state="up")
        with _inside(self.underlay_namespace) as ip:
            ip.link("set", index=_index(ip, JOINT), master=_index(ip, UNDERLAY), mtu=mtu, state="up")

    def _has_joint(self) -> bool:
        with IPRoute() as ip:
            return _index(ip, self._joint) is not None

    def _part(self) -> None:
        with IPRoute() as ip:
            index = _index(ip, self._joint)
            if index is not None:
                ip.link("del", index=index)

    def _ensure_uplink(self) -> None:
        wanted = self._uplink_routes()
        with IPRoute() as ip:
            index = _index(ip, self._uplink)
            if index is not None:
                self._check_uplink_is_ours(ip, index)
            if not wanted:
                if index is not None:
                    ip.link("del", index=index)
                return
            if index is None:
                ip.link("add", ifname=self._uplink, kind="veth", peer={"ifname": UPLINK, "net_ns_fd": self.namespace})
                index = _index(ip, self._uplink)
            ip.link("set", index=index, state="up", ifalias=self._uplink_mark)
            with _inside(self.namespace) as inside:
                peer = _index(inside, UPLINK)
                inside.link("set", index=peer, state="up")
                inside.addr("replace", index=peer, address=HOST_NEXT_HOP, prefixlen=64, flags=0x02)  # nodad
                ip.addr("replace", index=index, address=ROOT_NEXT_HOP, prefixlen=64, flags=0x02)
                for family in (2, 10):
                    inside.route("replace", **_default(family), oif=peer, **_via(family, ROOT_NEXT_HOP))
            for address in wanted:
                family, plen = (10, 128) if ":" in address else (2, 32)
                ip.route("replace", dst=f"{address}/{plen}", oif=index, **_via(family, HOST_NEXT_HOP))
            for address in self._have_routes() - wanted:
                family, plen = (10, 128) if ":" in address else (2, 32)
                ip.route("del", dst=f"{address}/{plen}", oif=index, family=family)

    # -- taking it away ------------------------------------------------------------------------------------------

    def halt(self, progress: Progress) -> None:
        pass  # it is not ours to power off

    def remove(self, progress: Progress) -> None:
        _need_root()
        progress("agent")
        self.forget_agent()
        agentproc.stop(self.place)
        with IPRoute() as ip:
            index = _index(ip, self._uplink)
            if index is not None:
                self._check_uplink_is_ours(ip, index)
                ip.link("del", index=index)
        progress("network namespace")
        with _NAMESPACES:
            self._remove_namespaces()

    def _remove_namespaces(self) -> None:
        self._remove_namespace(self.namespace)
        if not self._exists(self.underlay_namespace):
            return
        with _inside(self.underlay_namespace) as ip:
            port = _index(ip, self._port)
            if port is not None:
                with contextlib.suppress(NetlinkError):  # it goes by itself when its peer's namespace has gone
                    ip.link("del", index=port)
            last = all(link.get("ifname") in ("lo", UNDERLAY, JOINT) for link in ip.get_links())
        if last:
            self._remove_namespace(self.underlay_namespace)
            if self._joins:
                self._remove_joined_underlay()

    def _remove_joined_underlay(self) -> None:
        from orchestrator.hosts import libvirtd, underlay

        with libvirtd.session() as conn:
            underlay.remove(self.lab, conn)

    def _remove_namespace(self, namespace: str) -> None:
        if not self._exists(namespace):
            (NETNS_DIR / namespace).unlink(missing_ok=True)
            return
        for pid in netns.ns_pids().get(namespace, []):
            start = agentproc.start_time(pid)
            if start is not None and pid != os.getpid():
                agentproc.end_process(pid, start, f"a process in {namespace}")
        netns.remove(namespace)

    # -- talking to it -------------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        return agentproc.connect(self.place)


def _make_namespace(name: str, mark: str) -> None:
    """Make a network namespace that has its mark when it gets its name: who is killed meanwhile leaves none.

    :raise CommandError: it cannot be made.
    """
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up alias "$1" && echo && exec cat', "sh", mark]
    with spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.readline():
            raise CommandError(
                f"network namespace {name} cannot be made",
                command=shell_line(command),
                tail=tail_of(process.stderr.read()),
                hint="orchestrator doctor",
            )
        netns.attach(name, process.pid)


def _need_root() -> None:
    if os.geteuid() != 0:
        raise StateError(
            "local hosts are network namespaces, which only root can make",
            hint="run the command with sudo, or use hosts of kind ssh",
        )


def _default(family: int) -> dict[str, Any]:
    return {"dst": "default", "family": family}


def _via(family: int, next_hop: str) -> dict[str, Any]:
    return {"via": {"family": 10, "addr": next_hop}} if family == 2 else {"gateway": next_hop}
