"""The ``images`` part of the lab file: images beside the built-in ``tiny`` and ``debian``."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.base import Part, Pattern, Ready

Url = Annotated[str, Pattern(r"^(https?|file)://.+$", "a URL of http, https or file")]
Sha256 = Annotated[str, Pattern(r"^[0-9a-fA-F]{64}$", "a SHA-256 of 64 hexadecimal digits")]


class ImageSpec(Part):
    """A disk image by path or URL."""

    path: Path | None = Field(None, description="a file; relative paths are relative to the lab file")
    url: Url | None = Field(None, description="where to fetch it from")
    sha256: Sha256 | None = Field(None, description="required with url")
    format: Literal["qcow2", "raw"] | None = Field(None, description="default: looked up in the file")
    cloud_init: bool = Field(True, description="give it a NoCloud seed")
    ready: Ready = Field("none", description="what tells that a guest is up: agent, console:REGEX or none")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.url is None):
            raise ValueError("either `path` or `url`")
        if self.url is not None and self.sha256 is None:
            raise ValueError("`sha256` beside `url`, so that what is fetched can be checked")
        return self
