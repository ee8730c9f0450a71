"""The lab file as a whole. Each subsystem describes its own part in its ``model.py``."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pydantic import Field

from orchestrator.guests.model import GuestSpec
from orchestrator.hosts.model import HostSpec, Underlay
from orchestrator.images.model import ImageSpec
from orchestrator.spec.base import Name, Part
from orchestrator.switch.model import NetworkSpec


class LabSpec(Part):
    """A lab: hosts, networks and guests.

    ``include`` and ``defaults`` are resolved by :mod:`orchestrator.spec.load` before this model is built;
    they do not appear here.
    """

    lab: Name = Field(description="name of the lab")
    description: str = Field("", description="free text")
    underlay: Underlay = Field(Underlay(), description="the network between the local hosts")
    hosts: dict[Name, HostSpec] = Field(min_length=1, description="computers that guests run on, by name")
    networks: dict[Name, NetworkSpec] = Field({}, description="networks of the guests, by name")
    images: dict[Name, ImageSpec] = Field({}, description="disk images beside tiny and debian, by name")
    guests: dict[Name, GuestSpec] = Field({}, description="virtual machines, by name")
