"""What a guest is told about itself: name, keys and addresses, as a NoCloud seed or on the kernel's command line."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from orchestrator import names, paths
from orchestrator.errors import SpecError
from orchestrator.spec.base import parse_mac

# The kernel takes 2047 bytes (COMMAND_LINE_SIZE of x86); the rest is for the image and for what the user adds.
WORDS_MAX = 1700

_HOSTNAME = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
_KEY = re.compile(r"((?:sk-)?(?:ssh|ecdsa)-[a-z0-9@.-]+) ([A-Za-z0-9+/]{16,}={0,2})(?: [^\x00-\x1f\x7f]*)?")


@dataclass(frozen=True)
class SeedNic:
    """One NIC: addresses as ``10.0.0.5/24`` and ``fd00::5/64``, gateways without a length."""

    mac: str
    ipv4: str | None = None
    gateway4: str | None = None
    ipv6: str | None = None
    gateway6: str | None = None
    mtu: int | None = None


def render_seed(
    *, hostname: str, ssh_keys: Sequence[str], nics: Sequence[SeedNic], user_data: str | None
) -> tuple[str, str, str]:
    """``meta-data``, ``user-data`` and ``network-config`` (version 2, NICs by MAC address) of a NoCloud seed.

    The instance id depends on all of it: what changes is applied at the next start.

    :param user_data: takes the place of the generated one, which lets root and the image's user in by ``ssh_keys``.
    :raise SpecError: a name, key or address is none.
    """
    keys = _check(hostname, ssh_keys, nics)
    templates = Environment(
        loader=FileSystemLoader(paths.templates() / "cloud-init"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # not HTML: every value goes through `tojson`, and JSON is YAML
    )
    facts = {"hostname": hostname, "ssh_keys": keys, "nics": nics}
    network = templates.get_template("network-config.j2").render(facts)
    user = user_data if user_data is not None else templates.get_template("user-data.j2").render(facts)
    instance = f"{hostname}-{names.digest(hostname, user, network)}"
    return templates.get_template("meta-data.j2").render(facts, instance=instance), user, network


def tiny_cmdline(*, hostname: str, ssh_keys: Sequence[str], nics: Sequence[SeedNic]) -> str:
    """The words on the kernel's command line that tell a ``tiny`` guest the same facts.

    :raise SpecError: a name, key or address is none, or it is all too long for the command line.
    """
    keys = _check(hostname, ssh_keys, nics)
    words = [f"orc.name={hostname}"]
    for nic in nics:
        facts = (nic.mac, nic.ipv4, nic.gateway4, nic.ipv6, nic.gateway6, nic.mtu)
        words.append("orc.nic=" + ",".join("-" if fact is None else str(fact) for fact in facts))
    words += [f"orc.key={key.replace(' ', ':')}" for key in keys]
    line = " ".join(words)
    if len(line) > WORDS_MAX:
        raise SpecError(
            f"{hostname}: {len(line)} characters of names, addresses and keys do not fit on a kernel's command line",
            hint="use ed25519 keys, which are short, or an image with cloud-init",
        )
    return line


def _check(hostname: str, ssh_keys: Sequence[str], nics: Sequence[SeedNic]) -> list[str]:
    """The keys without their comments; nothing that could end a word, a line or a quotation gets through."""
    if not _HOSTNAME.fullmatch(hostname):
        raise SpecError(f"{hostname!r} is no host name", hint="letters, digits and hyphens, at most 63")
    keys = []
    for key in ssh_keys:
        found = _KEY.fullmatch(key.strip())
        if not found:
            raise SpecError(f"{key[:40]!r} is no public key for ssh", hint="one line as in a file *.pub")
        keys.append(f"{found[1]} {found[2]}")
    for nic in nics:
        try:
            parse_mac(nic.mac)
            for address in filter(None, (nic.ipv4, nic.ipv6)):
                ip_interface(address)
            for gateway in filter(None, (nic.gateway4, nic.gateway6)):
                ip_address(gateway)
        except ValueError as error:
            raise SpecError(f"{hostname}: {error}") from error
    return keys
