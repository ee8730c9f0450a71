"""The roles in ``ansible/`` as contents, and the mark of a machine on which they were played."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from pathlib import PurePosixPath

from orchestrator import names, paths

MARK = PurePosixPath("/etc/orchestrator/provisioned")
"""A file with the digest of the roles that were played on the machine."""


@functools.cache
def digest() -> str:
    """Of the playbooks and their roles: a machine with this mark need not be provisioned again."""
    files = paths.sources(paths.ansible())
    return names.digest(*(f"{path.relative_to(paths.ansible())}\0{path.read_text()}" for path in files), length=12)
