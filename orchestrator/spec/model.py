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
    description: str = ""
    underlay: Underlay = Underlay()
    hosts: dict[Name, HostSpec] = Field(min_length=1)
    networks: dict[Name, NetworkSpec] = {}
    images: dict[Name, ImageSpec] = {}
    guests: dict[Name, GuestSpec] = {}
