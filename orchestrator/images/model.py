"""The ``images`` part of the lab file: images beside the built-in ``tiny`` and ``debian``."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.base import Part


class ImageSpec(Part):
    """A disk image by path or URL."""

    path: Path | None = Field(None, description="relative paths are relative to the lab file")
    url: str | None = Field(None, pattern=r"^(https?|file)://")
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$", description="required with url")
    format: Literal["qcow2", "raw"] | None = Field(None, description="default: looked up in the file")
    cloud_init: bool = Field(True, description="give it a NoCloud seed")
    ready: str = Field("none", pattern=r"^(agent|none|console:.+)$")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.url is None):
            raise ValueError("either `path` or `url`")
        if self.url is not None and self.sha256 is None:
            raise ValueError("`sha256` beside `url`, so that what is fetched can be checked")
        return self
