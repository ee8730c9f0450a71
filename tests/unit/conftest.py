"""What the unit tests share."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# On a loaded machine a single example can take long; the number of examples bounds the time.
settings.register_profile("unit", deadline=None, max_examples=50)
settings.load_profile("unit")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """State, cache and runtime folders of the test's own, and no other setting from the environment.

    The runtime folder has a short path, because a socket's path has 107 bytes.
    """
    for variable in [name for name in os.environ if name.startswith("ORCHESTRATOR_")]:
        monkeypatch.delenv(variable)
    short = tempfile.mkdtemp(prefix="orc-")
    monkeypatch.setenv("ORCHESTRATOR_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ORCHESTRATOR_RUN", f"{short}/run")
    yield tmp_path
    shutil.rmtree(short)
