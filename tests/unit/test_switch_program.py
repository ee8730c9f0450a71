"""What kernels ask of the dispatcher that this machine's own kernel may be more generous with."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "bpf"
STACK_BYTES = 512
"""``MAX_BPF_STACK``: of a program and all that it calls."""
ROUNDED_TO = 32
"""To what kernels before 6.8 round up each function's part."""
CHAINS = [
    ("dispatch", "from_guest", "rules_say", "look_at_rule"),
    ("dispatch", "from_guest", "flood_port"),
    ("dispatch", "from_underlay", "rules_say", "look_at_rule"),
    ("dispatch", "from_underlay", "flood_port"),
    ("dispatch", "from_host", "rules_say", "look_at_rule"),
    ("uplink", "rules_say", "look_at_rule"),
]


def test_stack_is_small_enough_for_the_oldest_kernel(tmp_path: Path) -> None:
    clang = subprocess.run(["make", "-s", "-C", SOURCES, "flags"], check=True, capture_output=True, text=True)
    target = tmp_path / "dispatch.o"
    words = [*shlex.split(clang.stdout), "-fstack-usage", "-c", SOURCES / "dispatch.bpf.c", "-o", target]
    subprocess.run(words, check=True)
    lines = [line.split("\t") for line in target.with_suffix(".su").read_text().splitlines()]
    used = {place.rpartition(":")[2]: -(-int(size) // ROUNDED_TO) * ROUNDED_TO for place, size, _ in lines}

    chains = {" → ".join(chain): sum(used[name] for name in chain) for chain in CHAINS}

    assert used.keys() == {name for chain in CHAINS for name in chain}, "a function that no chain is known of"
    assert all(total <= STACK_BYTES for total in chains.values()), chains
