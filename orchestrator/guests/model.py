"""The ``guests`` part of the lab file."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.spec.base import Name, Part, Size, format_size
from orchestrator.switch.model import NicSpec

MIN_MEMORY = 64 << 20


class MemorySpec(Part):
    """Memory of a guest: ``256M``, or a mapping."""

    size: Size = Field(ge=MIN_MEMORY, description="memory of the guest, for example 256M")
    max: Size | None = Field(None, description="the guest can grow to this while it runs; default: the size")

    @model_validator(mode="after")
    def _max_not_below_size(self) -> Self:
        if self.max is not None and self.max < self.size:
            raise ValueError(f"a maximum of at least the size ({format_size(self.size)})")
        return self


class VcpuSpec(Part):
    """Processors of a guest: a number, or a mapping."""

    count: int = Field(1, ge=1, le=255)
    max: int | None = Field(
        None, ge=1, le=255, description="vCPUs that can be plugged while it runs; default: the count"
    )

    @model_validator(mode="after")
    def _max_not_below_count(self) -> Self:
        if self.max is not None and self.max < self.count:
            raise ValueError(f"a maximum of at least the count ({self.count})")
        return self


class DiskSpec(Part):
    """A disk beside the one that the image brings."""

    name: Name = Field(description="becomes the disk's serial number: /dev/disk/by-id/virtio-NAME")
    size: Size = Field(ge=1 << 20)
    bus: Literal["virtio", "scsi"] = "virtio"


def _short_memory(value: Any) -> Any:
    return {"size": value} if isinstance(value, (str, int)) else value


def _short_vcpus(value: Any) -> Any:
    return {"count": value} if isinstance(value, (int, str)) else value


def _short_nic(value: Any) -> Any:
    return {"network": value} if isinstance(value, str) else value


class GuestSpec(Part):
    """One virtual machine."""

    host: Name = Field(description="the host it runs on")
    image: str = Field("tiny", min_length=1, description="tiny, debian, or a name under `images`")
    vcpus: Annotated[VcpuSpec, BeforeValidator(_short_vcpus, json_schema_input_type=int | VcpuSpec)] = (
        VcpuSpec()
    )
    memory: Annotated[MemorySpec, BeforeValidator(_short_memory, json_schema_input_type=str | MemorySpec)] = (
        MemorySpec(size=256 << 20)
    )
    nics: list[Annotated[NicSpec, BeforeValidator(_short_nic, json_schema_input_type=str | NicSpec)]] = []
    disks: list[DiskSpec] = []
    disk_size: Size | None = Field(None, description="grow the image's own disk to this size")
    cmdline: str = Field("", max_length=1024, description="appended to the kernel command line")
    user_data: str | None = Field(None, description="cloud-init user data, replacing the generated one")
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    cpu: str | None = Field(
        None, description="libvirt CPU mode or model; default: all that the accelerator has"
    )
    machine: Literal["q35", "pc"] = "q35"
    emulator: str | None = Field(None, description="path of the QEMU to use on the host")
    hotplug_slots: int = Field(4, ge=0, le=28, description="spare PCIe slots, for devices plugged later")
    ready: str | None = Field(
        None,
        pattern=r"^(agent|none|console:.+)$",
        description="what tells that it is up: agent, console:REGEX or none; default: as the image says",
    )
    xml: str | None = Field(None, description="libvirt XML elements put under <domain>, as an escape hatch")
    description: str = ""
