"""Field types and the base class that every part of the lab file shares."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
)
from pydantic_core import CoreSchema, core_schema

SIZE_PATTERN = r"^\s*([0-9]{1,15})\s*([KMGTkmgt])(?:[iI]?[bB])?\s*$"
MAC_PATTERN = r"^[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}$"

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MAX_SIZE = 1 << 60

A = TypeVar("A", IPv4Address, IPv6Address)
N = TypeVar("N", IPv4Network, IPv6Network)
AnyNetwork = TypeVar("AnyNetwork", IPv4Network, IPv6Network, None)


class Part(BaseModel):
    """A mapping of the lab file: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Pattern:
    """Text that matches ``regex`` from end to end; ``expected`` says in words what that is."""

    regex: str
    expected: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": self.regex}

    def _check(self, value: str) -> str:
        if not re.fullmatch(self.regex, value):
            raise ValueError(self.expected)
        return value


def shorthand(key: str, expected: str) -> Callable[[Any], Any]:
    """A validator for a mapping that may be written as the value of its most used key.

    :param expected: both forms in words, for anything that is neither.
    """

    def expand(value: Any) -> Any:
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return {key: value}
        if not isinstance(value, (dict, Part)):
            raise ValueError(expected)
        return value

    return expand


def parse_whole(value: Any) -> int:
    """A whole number, or the text of one: what ``${VAR}`` gives is text.

    :raise ValueError: when ``value`` is anything else; ``true`` is no number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        return int(value)
    raise ValueError("a whole number")


def parse_size(value: Any) -> int:
    """``256M``, ``2G`` → bytes.

    :raise ValueError: when ``value`` is not a whole number with a unit of K, M, G or T (powers of 1024).
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 20:
        return value  # already bytes: a size that was resolved before
    match = re.match(SIZE_PATTERN, value) if isinstance(value, str) else None
    if not match:
        raise ValueError("a size with a unit, such as 256M or 2G")
    size = int(match[1]) * _UNITS[match[2].upper()]
    if size >= _MAX_SIZE:
        raise ValueError(f"a size below {format_size(_MAX_SIZE)}")
    return size


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
    if not isinstance(value, str) or not re.fullmatch(MAC_PATTERN, value):
        raise ValueError("a MAC address such as 02:00:00:00:00:01")
    mac = value.lower().replace("-", ":")
    if int(mac[:2], 16) & 1:
        raise ValueError("a unicast MAC address (the lowest bit of the first byte must be 0)")
    return mac


def _address(kind: type[A], expected: str) -> BeforeValidator:
    def parse(value: Any) -> A:
        if isinstance(value, kind):
            return value
        try:  # only text without a zone: ipaddress would take 5 as 0.0.0.5
            if isinstance(value, str) and "%" not in value:
                return kind(value)
        except ValueError:
            pass
        raise ValueError(expected)

    return BeforeValidator(parse)


def _network(kind: type[N], expected: str) -> BeforeValidator:
    def parse(value: Any) -> N:
        if isinstance(value, kind):
            return value
        if not isinstance(value, str) or "%" in value:
            raise ValueError(expected)
        try:
            network = kind(value, strict=False)
        except ValueError:
            raise ValueError(expected) from None
        if kind(value.split("/")[0]).network_address != network.network_address:
            raise ValueError(f"the first address of a network; here that is {network}")
        if network.is_multicast or network.is_loopback or network.is_link_local:
            raise ValueError("a network for a lab (multicast, loopback and link-local have uses of their own)")
        return network

    return BeforeValidator(parse)


Name = Annotated[
    str,
    Pattern(
        r"^[a-z][a-z0-9-]{0,31}$",
        "a name: lower-case letters, digits and '-', a letter first, at most 32 characters",
    ),
]
Ready = Annotated[str, Pattern(r"^(agent|none|console:.+)$", "agent, none or console:REGEX")]
WHOLE = BeforeValidator(parse_whole)
Whole = Annotated[int, WHOLE]
Size = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=Annotated[str, Field(pattern=SIZE_PATTERN)]),
    PlainSerializer(format_size, return_type=str, when_used="json"),
]
Mac = Annotated[str, BeforeValidator(parse_mac, json_schema_input_type=Annotated[str, Field(pattern=MAC_PATTERN)])]
Ipv4 = Annotated[IPv4Address, _address(IPv4Address, "an IPv4 address such as 10.10.0.2")]
Ipv6 = Annotated[IPv6Address, _address(IPv6Address, "an IPv6 address such as fd10::2")]
Ipv4Net = Annotated[IPv4Network, _network(IPv4Network, "an IPv4 network such as 10.10.0.0/24")]
Ipv6Net = Annotated[IPv6Network, _network(IPv6Network, "an IPv6 network such as fd10::/64")]


def room_for_two(network: AnyNetwork) -> AnyNetwork:
    """A field validator.

    :raise ValueError: the network has no room for two addresses beside its own (and IPv4's broadcast).
    """
    if network is not None and network.prefixlen > (longest := network.max_prefixlen - 2):
        raise ValueError(f"a network with room for two addresses (/{longest} or shorter)")
    return network
