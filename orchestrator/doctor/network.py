"""Probes of the network: taps, namespaces joined by links, and what the firewall does to bridges.

Links are only made inside network namespaces that have no name and so vanish with the process that looks. pyroute2 is
imported where it is used, because that takes longer than most probes.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

from orchestrator.doctor.kernel import LIBC
from orchestrator.doctor.model import Finding, bad, good, unknown
from orchestrator.run import run

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_VNET_HEADER = 12  # struct virtio_net_hdr_v1
_ETHERTYPE = 0x88B5  # for local experiments (IEEE 802)
_SECONDS = 5.0
_NEEDS_ROOT = "run as root"
_SYSCTL = Path("/proc/sys/net")


def _enter_new_namespace() -> int:
    """Move the calling thread to a network namespace of its own; a descriptor of it.

    :raise OSError: not permitted, or the kernel has no namespaces.
    """
    if LIBC.unshare(_CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def tap() -> Finding:
    """Guests' NICs are taps with virtio headers: make one and send a frame through it."""
    from pyroute2 import IPRoute

    try:
        os.close(_enter_new_namespace())
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return bad("there is no /dev/net/tun", "modprobe tun")
    except OSError as error:
        return bad(f"no tap can be made: {error.strerror}", _NEEDS_ROOT)
    with os.fdopen(tun, "r+b", buffering=0) as device, IPRoute() as ip:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_MULTI_QUEUE
        try:
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"tap0", flags))
            fcntl.ioctl(device, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER))
            fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
        except OSError as error:
            return bad(f"no tap with virtio headers and queues: {error.strerror}", _NEEDS_ROOT)
        ip.link("set", index=ip.link_lookup(ifname="tap0")[0], state="up")
        frame = b"\xff" * 6 + b"\x02\0\0\0\0\x01" + struct.pack("!H", _ETHERTYPE) + b"doctor".ljust(46, b"\0")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE)) as listener:
            listener.bind(("tap0", _ETHERTYPE))
            listener.settimeout(_SECONDS)
            device.write(bytes(_VNET_HEADER) + frame)
            received = listener.recv(2048)
    if received != frame:
        return bad("a frame changes on its way through a tap", "use another kernel: this one is broken")
    return good("a frame went through a tap with virtio headers, offloads and queues")


def namespaces() -> Finding:
    """Local hosts are namespaces: join two by veth, VXLAN and bridges, and connect by TCP through all of them."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        there, far = _enter_new_namespace(), IPRoute()
        here, near = _enter_new_namespace(), IPRoute()
    except OSError as error:
        return bad(f"no network namespace can be made: {error.strerror}", _NEEDS_ROOT)
    with near, far:
        kind = "veth"
        try:
            near.link("add", ifname="wire", kind=kind, peer={"ifname": "wire", "net_ns_fd": there})
            for ip, number in ((near, 1), (far, 2)):
                wire = _up(ip, "wire", f"192.0.2.{number}")
                kind = "bridge"
                ip.link("add", ifname="bridge", kind=kind)
                bridge = _up(ip, "bridge", f"198.51.100.{number}")
                kind = "vxlan"
                tunnel = {"vxlan_id": 7, "vxlan_link": wire, "vxlan_group": f"192.0.2.{3 - number}"}
                ip.link("add", ifname="vx", kind=kind, vxlan_port=4789, **tunnel)
                ip.link("set", index=_index(ip, "vx"), master=bridge, state="up")
        except NetlinkError as error:
            return bad(f"no {kind} link can be made: {error}", f"modprobe {kind}, or use a kernel that has it")
        try:
            _talk(there, here)
        except OSError as error:
            return bad(f"TCP does not get across veth, VXLAN and bridge: {error}", "see the kernel log: dmesg")
    return good("TCP went from one namespace to another through veth, VXLAN and bridges")


def _index(ip: Any, name: str) -> int:
    return int(ip.link_lookup(ifname=name)[0])


def _up(ip: Any, name: str, address: str) -> int:
    index = _index(ip, name)
    ip.link("set", index=index, state="up")
    ip.addr("add", index=index, address=address, prefixlen=24)
    return index


def _talk(there: int, here: int) -> None:
    """Connect from the namespace ``here`` to 198.51.100.2 in the namespace ``there``.

    :raise OSError: no connection, or nothing arrives in time.
    """
    _enter(there)
    with socket.create_server(("198.51.100.2", 0)) as listener:
        _enter(here)
        listener.settimeout(_SECONDS)
        client = socket.create_connection(listener.getsockname(), timeout=_SECONDS)
        with client, listener.accept()[0] as served:
            client.sendall(b"doctor")
            served.settimeout(_SECONDS)
            served.recv(16)


def _enter(namespace: int) -> None:
    if LIBC.setns(namespace, _CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def firewall() -> Finding:
    """With br_netfilter, frames that a bridge forwards pass the FORWARD chain, which Docker sets to DROP."""
    switches = {name: _sysctl(f"bridge/{name}") for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables")}
    forwarding = {name: _sysctl(name) for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding")}
    facts = [f"{name.replace('/', '.')} = {value}" for name, value in (switches | forwarding).items() if value]
    if "1" not in switches.values():
        return good("bridged frames do not pass the firewall of this host", *facts)
    rules = _rules()
    if rules is None:
        why = "bridged frames pass the firewall (br_netfilter), whose rules cannot be read here"
        return unknown(why, *facts, fix="install iptables or nftables; run as root")
    if not drops_forwarded(rules):
        return good("bridged frames pass the firewall, and its FORWARD policy lets them", *facts)
    fix = f"sysctl {' '.join(f'net.bridge.{name}=0' for name in switches)}, or accept them in FORWARD"
    return bad("the firewall's FORWARD policy drops bridged frames", fix, *facts)


def _sysctl(name: str) -> str | None:
    try:
        return (_SYSCTL / name).read_text().strip()
    except OSError:
        return None


def _rules() -> str | None:
    """What the firewall programs of this host print; None where none of them can tell."""
    commands = (["iptables-save"], ["ip6tables-save"], ["nft", "list", "ruleset"])
    done = [run(command, check=False, timeout=20) for command in commands if shutil.which(command[0])]
    said = [one.stdout.decode(errors="replace") for one in done if one.returncode == 0]
    return "\n".join(said) if said else None


def drops_forwarded(rules: str) -> bool:
    """Whether a base chain of the forward hook has the policy DROP, in the output of iptables-save or nft."""
    nft = re.search(r"\bhook forward\b[^\n]*\bpolicy drop\b", rules)
    return bool(nft or re.search(r"^:FORWARD DROP\b", _filter_tables(rules), re.MULTILINE))


def _filter_tables(rules: str) -> str:
    return "\n".join(re.findall(r"^\*filter$.*?^COMMIT$", rules, re.MULTILINE | re.DOTALL))
