"""The ``networks`` part of the lab file, and the NICs of a guest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from orchestrator.spec.base import (
    WHOLE,
    Ipv4,
    Ipv4Net,
    Ipv6,
    Ipv6Net,
    Mac,
    Name,
    Part,
    Pattern,
    room_for_two,
)

MIN_IPV6_MTU = 1280  # RFC 8200, section 5

Mtu = Annotated[int, Field(ge=576, le=65535), WHOLE]
LinkName = Annotated[
    str,
    Pattern(
        r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$",
        "the name of a link: letters, digits, '_', '.' and '-', at most 15 characters",
    ),
]


class NetworkSpec(Part):
    """One layer-2 network that spans the hosts of the lab."""

    ipv4: Ipv4Net | None = Field(None, description="addresses of the guests, for example 10.10.0.0/24")
    ipv6: Ipv6Net | None = Field(None, description="addresses of the guests, for example fd10::/64")
    mtu: Mtu | None = Field(None, description="default: 1500, or less where the underlay cannot carry that")
    uplink: bool = Field(
        False, description="route between this network and the machine's other networks (never translated)"
    )
    bridge: LinkName | None = Field(None, description="name of the bridge on each host; default: generated")
    datapath: Literal["ebpf", "bridge"] = Field(
        "ebpf", description="what carries the datagrams: the switch, or a Linux bridge that checks nothing"
    )
    multicast: Literal["drop", "flood"] = Field("drop", description="multicast and broadcast of the guests")

    _room = field_validator("ipv4", "ipv6")(room_for_two)

    @field_validator("mtu")
    @classmethod
    def _carries_ipv6(cls, mtu: int | None, info: ValidationInfo) -> int | None:
        if mtu is not None and mtu < MIN_IPV6_MTU and info.data.get("ipv6"):
            raise ValueError(f"at least {MIN_IPV6_MTU}, which IPv6 needs")
        return mtu


class NicSpec(Part):
    """One virtual NIC of a guest."""

    network: Name = Field(description="the network it is plugged into")
    ipv4: Ipv4 | None = Field(None, description="assigned if the network has IPv4 and this is absent")
    ipv6: Ipv6 | None = Field(None, description="assigned if the network has IPv6 and this is absent")
    mac: Mac | None = Field(None, description="assigned if absent")
    model: Literal["virtio", "e1000e"] = Field("virtio", description="the device that the guest sees")
