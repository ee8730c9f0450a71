"""Field types and the base class that every part of the lab file shares."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

NAME_PATTERN = r"^[a-z][a-z0-9-]{0,31}$"

_SIZE = re.compile(r"^\s*(\d+)\s*([KMGT])(?:i?B)?\s*$", re.IGNORECASE)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Part(BaseModel):
    """A mapping of the lab file: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_size(value: Any) -> int:
    """``256M``, ``2G`` → bytes.

    :raise ValueError: when ``value`` is not a whole number with a unit of K, M, G or T (powers of 1024).
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 20:
        return value  # already bytes: a size that was resolved before
    match = _SIZE.match(value) if isinstance(value, str) else None
    if not match:
        raise ValueError("a size with a unit, such as 256M or 2G")
    return int(match[1]) * _UNITS[match[2].upper()]


def format_size(value: int) -> str:
    """Bytes → the shortest exact form that :func:`parse_size` reads."""
    for unit in "TGMK":
        if value % _UNITS[unit] == 0 and value:
            return f"{value // _UNITS[unit]}{unit}"
    return str(value)


def parse_mac(value: Any) -> str:
    """A unicast MAC address in lower case with colons.

    :raise ValueError: when it is no MAC address, or a multicast one.
    """
    if not isinstance(value, str) or not re.fullmatch(r"(?i)[0-9a-f]{2}([:-][0-9a-f]{2}){5}", value):
        raise ValueError("a MAC address such as 02:00:00:00:00:01")
    mac = value.lower().replace("-", ":")
    if int(mac[:2], 16) & 1:
        raise ValueError("a unicast MAC address (the lowest bit of the first byte must be 0)")
    return mac


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Size = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=str),
    PlainSerializer(format_size, return_type=str, when_used="json"),
]
Mac = Annotated[str, BeforeValidator(parse_mac, json_schema_input_type=str)]
