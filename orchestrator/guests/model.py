"""The ``guests`` part of the lab file."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from orchestrator.spec.base import WHOLE, Name, Part, Ready, Size, Whole, format_size, shorthand
from orchestrator.switch.model import NicSpec

MIN_MEMORY = 64 << 20


class MemorySpec(Part):
    """Memory of a guest: ``256M``, or a mapping."""

    size: Size = Field(ge=MIN_MEMORY, description="memory of the guest, for example 256M")
    max: Size | None = Field(None, description="the guest can grow to this while it runs; default: the size")

    @field_validator("max")
    @classmethod
    def _max_not_below_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("size", 0):
            raise ValueError(f"a maximum of at least the size ({format_size(info.data['size'])})")
        return value


VcpuCount = Annotated[int, Field(ge=1, le=255), WHOLE]


class VcpuSpec(Part):
    """Processors of a guest: a number, or a mapping."""

    count: VcpuCount = Field(1, description="vCPUs that the guest starts with")
    max: VcpuCount | None = Field(None, description="vCPUs that can be plugged while it runs; default: the count")

    @field_validator("max")
    @classmethod
    def _max_not_below_count(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("count", 0):
            raise ValueError(f"a maximum of at least the count ({info.data['count']})")
        return value


class DiskSpec(Part):
    """A disk beside the one that the image brings."""

    name: Name = Field(description="becomes the disk's serial number: /dev/disk/by-id/virtio-NAME")
    size: Size = Field(ge=1 << 20, description="size of the disk, for example 1G")
    bus: Literal["virtio", "scsi"] = Field("virtio", description="how the guest reaches it")


Vcpus = Annotated[
    VcpuSpec,
    BeforeValidator(
        shorthand("count", "a number of vCPUs, or a mapping with `count` and `max`"),
        json_schema_input_type=VcpuCount | VcpuSpec,
    ),
]
Memory = Annotated[
    MemorySpec,
    BeforeValidator(
        shorthand("size", "a size such as 256M, or a mapping with `size` and `max`"),
        json_schema_input_type=Size | MemorySpec,
    ),
]
Nic = Annotated[
    NicSpec,
    BeforeValidator(
        shorthand("network", "the name of a network, or a mapping"), json_schema_input_type=Name | NicSpec
    ),
]


class GuestSpec(Part):
    """One virtual machine."""

    host: Name = Field(description="the host it runs on")
    image: str = Field("tiny", min_length=1, description="tiny, debian, or a name under `images`")
    vcpus: Vcpus = Field(VcpuSpec(), description="processors: a number, or a mapping")
    memory: Memory = Field(MemorySpec(size=256 << 20), description="memory: a size, or a mapping")
    nics: list[Nic] = Field([], description="virtual NICs: names of networks, or mappings")
    disks: list[DiskSpec] = Field([], description="disks beside the image's own")
    disk_size: Size | None = Field(None, description="grow the image's own disk to this size")
    cmdline: str = Field("", max_length=1024, description="appended to the kernel command line")
    user_data: str | None = Field(None, description="cloud-init user data, replacing the generated one")
    accel: Literal["auto", "kvm", "tcg"] = Field(
        "auto", description="auto: kvm where a guest really runs with it, otherwise tcg"
    )
    cpu: str | None = Field(None, description="libvirt CPU mode or model; default: all the accelerator does well")
    machine: Literal["q35", "pc"] = Field("q35", description="QEMU's machine type")
    emulator: str | None = Field(None, description="path of the QEMU to use on the host")
    hotplug_slots: Whole = Field(4, ge=0, le=28, description="spare PCIe slots, for devices plugged later")
    ready: Ready | None = Field(
        None,
        description="what tells that it is up: agent, console:REGEX or none; default: as the image says",
    )
    xml: str | None = Field(None, description="libvirt XML elements put under <domain>, as an escape hatch")
    description: str = Field("", description="free text")
