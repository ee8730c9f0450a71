# SPDX-License-Identifier: Apache-2.0
"""Doubles for tests of what is built on this package."""

from orchestrator.testing.memory import MemoryHost, MemoryLab, MemoryTransport, image_id, perfect

__all__ = ["MemoryHost", "MemoryLab", "MemoryTransport", "image_id", "perfect"]
