"""The ``networks`` part of the lab file, and the NICs of a guest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.base import Mac, Name, Part

LINK_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$"


class NetworkSpec(Part):
    """One layer-2 network that spans the hosts of the lab."""

    ipv4: IPv4Network | None = Field(None, description="addresses of the guests, for example 10.10.0.0/24")
    ipv6: IPv6Network | None = Field(None, description="addresses of the guests, for example fd10::/64")
    mtu: int | None = Field(
        None, ge=576, le=65535, description="default: 1500, or less where the underlay cannot carry that"
    )
    uplink: bool = Field(
        False, description="route between this network and the machine's other networks (never translated)"
    )
    bridge: str | None = Field(
        None, pattern=LINK_NAME_PATTERN, description="name of the bridge on each host; default: generated"
    )
    datapath: Literal["bridge"] = Field("bridge", description="what carries the datagrams")

    @model_validator(mode="after")
    def _room_for_guests(self) -> Self:
        if self.ipv4 is not None and self.ipv4.prefixlen > 30:
            raise ValueError("an IPv4 network with room for a gateway and a guest (/30 or shorter)")
        if self.ipv6 is not None and self.ipv6.prefixlen > 126:
            raise ValueError("an IPv6 network with room for a gateway and a guest (/126 or shorter)")
        return self


class NicSpec(Part):
    """One virtual NIC of a guest."""

    network: Name
    ipv4: IPv4Address | None = Field(None, description="assigned if the network has IPv4 and this is absent")
    ipv6: IPv6Address | None = Field(None, description="assigned if the network has IPv6 and this is absent")
    mac: Mac | None = Field(None, description="assigned if absent")
    model: Literal["virtio", "e1000e"] = "virtio"
