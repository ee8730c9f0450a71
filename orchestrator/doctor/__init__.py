"""What this host can do, found out by doing it, and what dead labs left on it.

A probe makes the thing that a lab would make (a tap, a page fault, a guest), says True, False or None (cannot be
told), and names the fix. Runs on any lab host; it needs neither a lab file nor the command line.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from orchestrator.doctor.leftover import Leftover, clean, leftovers
from orchestrator.doctor.model import Finding
from orchestrator.doctor.table import checkup, list_probes

__all__ = ["Finding", "Leftover", "checkup", "clean", "leftovers", "list_probes"]
