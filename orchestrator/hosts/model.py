"""The ``hosts`` and ``underlay`` parts of the lab file."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from orchestrator.spec.base import Ipv4, Ipv4Net, Part, Whole, room_for_two


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


def _kind(value: Any) -> str:
    kind = value.get("kind", "local") if isinstance(value, dict) else getattr(value, "kind", "local")
    return str(kind)


HostSpec = Annotated[
    Annotated[LocalHost, Tag("local")] | Annotated[SshHost, Tag("ssh")],
    Discriminator(_kind),
]


class Underlay(Part):
    """The network between the local hosts of the lab. It exists only inside the lab's namespaces."""

    cidr: Ipv4Net = Field(IPv4Network("10.213.0.0/24"), description="addresses of the local hosts")
    mtu: Whole = Field(9000, ge=1280, le=65535, description="largest packet, in bytes")

    _room = field_validator("cidr")(room_for_two)
