"""Guests without virtual machines: network namespaces, plugged into whatever carries their datagrams.

Each guest has a veth whose other end stands where its tap would be; the switch knows ports by link. The same
namespaces are carried by our switch and by a Linux bridge in turn. Peers in user space have namespaces of their own,
because they keep the links that they serve.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import array
import contextlib
import fcntl
import functools
import itertools
import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tools
from pyroute2 import netns

from orchestrator.spec.resolved import ResolvedNetwork, ResolvedNic
from orchestrator.switch import bridge, dispatcher, links
from orchestrator.switch.membership import Listed, Membership

UID = "be7c0001"
PREFIX = "orc-bench-"
OWN = f"{PREFIX}{os.getpid()}-"
"""What the names of our namespaces and folders begin with."""
MTU = 1500
UNDERLAY_MTU = 1600
UNDERLAY = ("10.213.0.2", "10.213.0.3")
PATIENCE_SECONDS = 15
RATES = ("TCP_RR", "TCP throughput")
"""What peers in user space are measured by: what they cost is the time of other processes, which the rates of
processor time would not see."""
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17

Datapath = Literal["ebpf", "bridge", "vhost-user"]
_numbers = itertools.count()


def run(*words: str | Path) -> str:
    """Run a program in this namespace to its end."""
    done = subprocess.run(words, env=tools.environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, words))}: {done.stderr or done.stdout}")
    return done.stdout


def pinned(processor: int, *words: str | Path) -> list[str | Path]:
    """The command line that keeps a program on a processor; of a machine that has so many."""
    return ["taskset", "-c", str(processor % (os.cpu_count() or 1)), *words]


def fresh_name(label: str) -> str:
    """A name that :func:`remove_what_was_left` knows."""
    return f"{OWN}{next(_numbers)}-{label}"


class Space:
    """A network namespace, for as long as ``stack`` is open."""

    def __init__(self, stack: contextlib.ExitStack, label: str) -> None:
        self.name = fresh_name(label)
        netns.create(self.name)
        stack.callback(netns.remove, self.name)
        self._stack = stack
        self.ip("link", "set", "lo", "up")

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """What is done meanwhile, and whatever is started, is in the namespace."""
        netns.pushns(self.name)
        try:
            yield
        finally:
            netns.popns()

    def ip(self, *words: str) -> None:
        run("ip", "-n", self.name, *words)

    def run(self, *words: str | Path) -> str:
        with self.entered():
            return run(*words)

    def start(self, *words: str | Path, **settings: Any) -> subprocess.Popen[str]:
        """Start a program that is killed with the namespace, or with us, at the latest."""
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        env = tools.environment() | settings.pop("env", {})
        with self.entered():
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                env=env,
                text=True,
                start_new_session=True,
                **(quiet | settings),
            )
        self._stack.callback(_end, process)
        return process

    def dress(self, number: int, link: str) -> None:
        """Make ``link`` the NIC of guest ``number``."""
        self.ip("link", "set", link, "name", "eth0", "address", mac(number), "mtu", str(MTU), "addrgenmode", "none")
        self.ip("link", "set", "eth0", "up")
        self.ip("addr", "add", f"{address(number)}/16", "dev", "eth0")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def _is_left(name: str) -> bool:
    words = name.removeprefix(PREFIX).split("-")
    return name.startswith(PREFIX) and words[0].isdecimal() and not Path(f"/proc/{words[0]}").exists()


def remove_what_was_left() -> None:
    """Namespaces and folders of measurements that were killed."""
    for name in filter(_is_left, netns.listnetns()):
        netns.remove(name)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_left(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def mac(number: int) -> str:
    return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"


def address(number: int) -> str:
    return f"10.10.{number >> 8}.{number & 255}"


def nic(number: int) -> ResolvedNic:
    """The NIC of guest ``number``; numbers start at 2, as 1 is the gateway's."""
    return ResolvedNic(
        network="lan",
        mac=mac(number),
        tap=f"ot-{number:08x}",
        model="virtio",
        mtu=MTU,
        ipv4=f"{address(number)}/16",
        ipv6=f"fd10::{number:x}/64",
        gateway4=address(1),
        gateway6="fd10::1",
    )


def network(datapath: Datapath) -> ResolvedNetwork:
    return ResolvedNetwork(
        name="lan",
        vni=77,
        mtu=MTU,
        bridge="lan",
        vxlan="ox-00000077",
        ipv4="10.10.0.0/16",
        ipv6="fd10::/64",
        gateway4=f"{address(1)}/16",
        gateway6="fd10::1/64",
        gateway_mac=mac(1),
        uplink=False,
        datapath=datapath,
        hosts=["alpha", "beta"],
    )


def small_frame(sender: int, receiver: int) -> bytes:
    """A UDP datagram in a frame that is, with its checksum, of 64 bytes."""
    mine, other = nic(sender), nic(receiver)
    head = bytearray(b"\x45\0\0\x2e\0\0\0\0\x40\x11\0\0")
    head += bytes(int(part) for each in (mine, other) for part in each.addresses[0].split("."))
    total = sum(struct.unpack(">10H", head))
    head[10:12] = (0xFFFF - (total % 0xFFFF)).to_bytes(2, "big")
    udp = struct.pack(">HHHH", 7, 7, 26, 0)
    return bytes.fromhex((other.mac + mine.mac).replace(":", "")) + b"\x08\0" + head + udp + bytes(18)


class Host:
    """A host of the toolkit: a namespace with guests, and what carries their datagrams.

    :param number: which host of the network; where it is the only one, there is no underlay.
    """

    def __init__(self, stack: contextlib.ExitStack, label: str, number: int = 0) -> None:
        self.space = Space(stack, label)
        self.at = UNDERLAY[number]
        self.listed: list[Listed] = []
        self._stack = stack

    def plug(self, number: int) -> Space:
        """A guest with a veth."""
        guest, made = Space(self._stack, f"guest{number}"), nic(number)
        self.space.ip("link", "add", made.tap, "type", "veth", "peer", "name", "guest", "netns", guest.name)
        self.space.ip("link", "set", made.tap, "alias", links.port_mark(UID, f"guest{number}", made))
        self.space.ip("link", "set", made.tap, "addrgenmode", "none")
        guest.dress(number, "guest")
        self.listed.append(Listed(f"guest{number}", self.at, made))
        return guest

    def plug_taps(self, numbers: range) -> None:
        """Taps that nobody opens."""
        with self.space.entered(), links.netlink("taps") as netlink:
            for number in numbers:
                links.ensure_tap(netlink, UID, f"guest{number}", nic(number))
                self.listed.append(Listed(f"guest{number}", self.at, nic(number)))

    def ensure(self, datapath: Datapath, others: tuple[Host, ...] = ()) -> float:
        """Have ``datapath`` carry the network; how long that took, in seconds."""
        listed = (*self.listed, *itertools.chain.from_iterable(other.listed for other in others))
        wanted = Membership(network(datapath), self.at, tuple(other.at for other in others), "no", listed)
        with self.space.entered():
            began = time.monotonic()
            (dispatcher if datapath == "ebpf" else bridge).ensure(UID, wanted)
            return time.monotonic() - began

    def filter_bridged(self, yes: bool) -> None:
        """Whether what is bridged here goes through the packet filter too, as it does by default where Linux has
        ``br_netfilter``."""
        with self.space.entered():
            for setting in _HOOKS.glob("bridge-nf-call-*tables"):
                setting.write_text(str(int(yes)))


_HOOKS = Path("/proc/sys/net/bridge")


def bridges() -> dict[str, bool]:
    """The kinds of bridge there are: whether what they carry is filtered."""
    return {"Linux bridge": False, **({"Linux bridge, br_netfilter": True} if _HOOKS.is_dir() else {})}


@dataclass
class Way:
    """From one guest to another one.

    :ivar select: have it be this that carries them.
    :ivar only: what to measure by; None: everything.
    """

    name: str
    client: Space
    server: Space
    address: str
    select: Callable[[], object] = lambda: None
    only: Container[str] | None = None

    def use(self) -> None:
        """Select it, and see that it carries something."""
        self.select()
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self.client.entered():
            while subprocess.run(["ping", "-c1", "-W1", "-q", self.address], capture_output=True).returncode:
                if time.monotonic() > deadline:
                    sys.exit(f"{self.name} carries nothing")


def _ways(client: Space, server: Space, hosts: dict[Host, tuple[Host, ...]], peers: dict[str, bool]) -> list[Way]:
    """Ours, and the peers that the kernel has.

    :param hosts: the others of each host.
    :param peers: name → whether what is bridged is filtered.
    """

    def switched() -> None:
        for host, others in hosts.items():
            host.ensure("ebpf", others)

    def bridged(filtered: bool) -> None:
        for host, others in hosts.items():
            host.filter_bridged(filtered)
            host.ensure("bridge", others)

    to = functools.partial(Way, client=client, server=server, address=address(3))
    return [
        to("ours", select=switched),
        *(to(name, select=functools.partial(bridged, filtered)) for name, filtered in peers.items()),
    ]


def on_one_host(stack: contextlib.ExitStack) -> list[Way]:
    """Ours, and a bridge of each kind."""
    host = Host(stack, "host")
    return _ways(host.plug(2), host.plug(3), {host: ()}, bridges())


def connected(stack: contextlib.ExitStack) -> tuple[Host, Host]:
    """Two hosts that one wire connects."""
    hosts = Host(stack, "alpha", 0), Host(stack, "beta", 1)
    one, other = (host.space for host in hosts)
    one.ip("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", other.name)
    for host in hosts:
        host.space.ip("addr", "add", f"{host.at}/24", "dev", "wire")
        host.space.ip("link", "set", "wire", "mtu", str(UNDERLAY_MTU), "addrgenmode", "none", "up")
    return hosts


def on_two_hosts(stack: contextlib.ExitStack) -> list[Way]:
    """Ours, and the bridge with a VXLAN."""
    one, other = connected(stack)
    client, server = one.plug(2), other.plug(3)
    return _ways(client, server, {one: (other,), other: (one,)}, {"Linux bridge, VXLAN": False})


# -- peers in user space ---------------------------------------------------------------------------------------------


def _without_checksum_offload(link: str) -> None:
    """Open vSwitch in user space takes frames as they are: they must be whole."""
    value = array.array("B", struct.pack("II", ETHTOOL_STXCSUM, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        where = value.buffer_info()[0]
        fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sQ", link.encode(), where))


def scratch(stack: contextlib.ExitStack) -> Path:
    """A folder, for as long as ``stack`` is open."""
    folder = Path(tempfile.mkdtemp(prefix=OWN))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


class OpenVSwitch:
    """It in user space, with a bridge ``ovs``, for as long as ``stack`` is open.

    :param switchd: the daemon's command line.
    :param options: its ``other_config``; ``_`` stands for ``-``.
    :raise MissingError: its package cannot be had.
    """

    def __init__(
        self, stack: contextlib.ExitStack, space: Space, switchd: Sequence[str | Path], **options: str
    ) -> None:
        tool, server, self._vsctl, self._ofctl = (
            tools.find(program, "openvswitch-switch")
            for program in ("ovsdb-tool", "ovsdb-server", "ovs-vsctl", "ovs-ofctl")
        )
        self._folder = scratch(stack)
        self._database = f"unix:{self._folder}/db.sock"
        env = {f"OVS_{name}DIR": str(self._folder) for name in ("RUN", "DB", "LOG")}
        run(tool, "create", self._folder / "conf.db", tools.shared("openvswitch/vswitch.ovsschema"))
        space.start(server, self._folder / "conf.db", f"--remote=p{self._database}", env=env)
        self.set("--no-wait", "init")
        for name, value in options.items():
            option = f'other_config:{name.replace("_", "-")}="{value}"'
            self.set("--no-wait", "set", "Open_vSwitch", ".", option)
        space.start(*switchd, self._database, env=env)
        self.set("add-br", "ovs", "--", "set", "bridge", "ovs", "datapath_type=netdev")

    def set(self, *words: str) -> None:
        """Call ``ovs-vsctl``."""
        run(self._vsctl, f"--db={self._database}", "--retry", f"--timeout={PATIENCE_SECONDS}", *words)

    def add_port(self, name: str, *settings: str) -> None:
        self.set("add-port", "ovs", name, *(("--", "set", "interface", name, *settings) if settings else ()))

    def have_only(self, flow: str) -> None:
        """Forward by one OpenFlow rule instead of by what it learns."""
        place = f"unix:{self._folder}/ovs.mgmt"
        run(self._ofctl, "del-flows", place)
        run(self._ofctl, "add-flow", place, flow)


def open_vswitch(stack: contextlib.ExitStack) -> Way:
    """
    :raise MissingError: its package cannot be had.
    """
    host = Host(stack, "ovs")
    client, server = host.plug(2), host.plug(3)
    switch = OpenVSwitch(stack, host.space, [tools.find("ovs-vswitchd", "openvswitch-switch")])
    for listed in host.listed:
        switch.add_port(listed.nic.tap)
        host.space.ip("link", "set", listed.nic.tap, "up")
        with host.space.entered():
            _without_checksum_offload(listed.nic.tap)
    for guest in (client, server):
        with guest.entered():
            _without_checksum_offload("eth0")
    return Way("Open vSwitch, user space", client, server, address(3), only=RATES)


def vde(stack: contextlib.ExitStack) -> Way:
    """
    :raise MissingError: its package cannot be had.
    """
    program = tools.find("vde_switch", "vde2")
    folder = scratch(stack)
    space, taps = Space(stack, "vde"), ["vde2", "vde3"]
    process = space.start(
        program,
        *("-s", folder / "switch", "-M", folder / "control"),
        *itertools.chain.from_iterable(("-t", tap) for tap in taps),
        stdin=subprocess.PIPE,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (folder / "control").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise tools.MissingError("vde_switch does not start")
        time.sleep(0.01)
    guests = [Space(stack, tap) for tap in taps]
    for number, (guest, tap) in enumerate(zip(guests, taps, strict=True), 2):
        space.ip("link", "set", tap, "netns", guest.name)
        guest.dress(number, tap)
    return Way("VDE", guests[0], guests[1], address(3), only=RATES)
