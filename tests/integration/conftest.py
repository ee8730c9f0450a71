"""The integration tier needs root, QEMU and libvirt; without them it fails and says so, it does not skip."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def _root() -> None:
    if os.geteuid() != 0:
        pytest.fail("the integration tests make network namespaces: run them as root (make test uses sudo)")


@pytest.fixture(autouse=True, scope="session")
def _tiny_image(_root: None) -> None:
    """Build the tiny image once, outside the time limits of single tests."""
    from orchestrator.images import store

    store.ensure("tiny", None, base=Path.cwd(), progress=lambda _: None)
