"""Which installation of the toolkit runs. It is asked at each connection to a host, so it imports little."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path


@functools.cache
def installed_digest() -> str | None:
    """The digest of the bundle that installed the code that runs; None where none did."""
    from orchestrator.hosts.installer import ABOUT

    try:
        return str(json.loads((Path(sys.prefix) / ABOUT).read_text())["digest"])
    except (OSError, ValueError, KeyError):
        return None
