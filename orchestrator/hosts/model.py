"""The ``hosts`` and ``underlay`` parts of the lab file."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from orchestrator.spec.base import Ipv4, Ipv4Net, Name, Part, Size, Whole, room_for_two


class LocalHost(Part):
    """A network namespace of this machine, with an agent and a libvirt of its own."""

    kind: Literal["local"] = Field("local", description="local: a network namespace of this machine")
    address: Ipv4 | None = Field(None, description="address on the underlay; assigned if absent")
    description: str = Field("", description="free text")


class SshHost(Part):
    """Any Linux machine that can be reached by SSH."""

    kind: Literal["ssh"] = Field(description="ssh: a machine that is reached by SSH")
    address: str = Field(min_length=1, description="host name or address that SSH connects to")
    port: Whole = Field(22, ge=1, le=65535, description="port of its SSH server")
    user: str = Field("root", min_length=1, description="user to log in as")
    key: Path | None = Field(None, description="private key file; default: the SSH agent and ~/.ssh")
    known_hosts: Path | None = Field(None, description="known hosts file; default: ~/.ssh/known_hosts")
    jump: str | None = Field(None, description="[user@]host[:port] to connect through")
    underlay: Ipv4 | None = Field(
        None, description="address that the other hosts reach it by; default: what `address` resolves to"
    )
    toolkit: str | None = Field(
        None, description="path of the orchestrator command there; default: installed if missing"
    )
    libvirt: Literal["auto", "system", "embed"] = Field(
        "auto", description="system: the host's libvirtd; embed: a driver inside the agent, no daemon"
    )
    description: str = Field("", description="free text")


class HostDisk(Part):
    """A disk of a Vagrant host beside the one that it starts from."""

    name: Name = Field(description="serial number of the disk: /dev/disk/by-id/virtio-NAME")
    size: Size = Field(description="what the host sees; takes room as it is written to")


class VagrantHost(Part):
    """A virtual machine made by Vagrant on this machine and set up by Ansible, with its own kernel and KVM."""

    kind: Literal["vagrant"] = Field(description="vagrant: a virtual machine with its own kernel and /dev/kvm")
    vcpus: Whole = Field(2, ge=1, le=255, description="virtual CPUs")
    memory: Size = Field(2 << 30, ge=512 << 20, description="RAM")
    disks: list[HostDisk] = Field([], max_length=8, description="disks beside the one that it starts from")
    address: Ipv4 | None = Field(None, description="address on the underlay; assigned if absent")
    box: str | None = Field(
        None, min_length=1, description="Vagrant box; default: one that is built from this machine's packages"
    )
    accel: Literal["auto", "kvm", "tcg"] = Field(
        "auto", description="auto: KVM where that can be nested, else QEMU's emulation of a machine that has KVM"
    )
    description: str = Field("", description="free text")


UNDERLAY_HOSTS = (LocalHost, VagrantHost)
"""Hosts whose place on the underlay is made by the toolkit, from ``underlay.cidr``."""


def _kind(value: Any) -> str:
    kind = value.get("kind", "local") if isinstance(value, dict) else getattr(value, "kind", "local")
    return str(kind)


HostSpec = Annotated[
    Annotated[LocalHost, Tag("local")] | Annotated[SshHost, Tag("ssh")] | Annotated[VagrantHost, Tag("vagrant")],
    Discriminator(_kind),
]


class Underlay(Part):
    """The network between the local hosts and Vagrant hosts of the lab. It leads nowhere else."""

    cidr: Ipv4Net = Field(IPv4Network("10.213.0.0/24"), description="addresses of the local and Vagrant hosts")
    mtu: Whole = Field(9000, ge=1280, le=65535, description="largest packet, in bytes")

    _room = field_validator("cidr")(room_for_two)
