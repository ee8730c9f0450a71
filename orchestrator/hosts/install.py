"""The toolkit as a wheel, to be installed on other hosts."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator import __version__, names, paths
from orchestrator.errors import HostError
from orchestrator.run import run


def _sources(checkout: Path) -> str:
    """A digest of everything that goes into the wheel."""
    files = [checkout / "pyproject.toml"]
    for folder in ("orchestrator", "templates"):
        files += sorted(
            path for path in (checkout / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
    return names.digest(*(f"{path.relative_to(checkout)}\0{path.read_bytes().hex()}" for path in files), length=12)


def build_wheel() -> Path:
    """The wheel of this toolkit; built once for each content of the checkout.

    :raise HostError: this toolkit was itself installed from a wheel, so that there is nothing to build from.
    """
    checkout = Path(__file__).parent.parent.parent
    if not (checkout / "pyproject.toml").exists():
        raise HostError(
            "the toolkit runs from an installed package, so it cannot make one for another host",
            hint="install it there by hand and name it with `toolkit:`, or run from a checkout",
        )
    folder = paths.make_dir(paths.cache() / "wheels" / _sources(checkout))
    found = list(folder.glob(f"orchestrator-{__version__}-*.whl"))
    if not found:
        run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, checkout],
            timeout=300,
        )
        found = list(folder.glob(f"orchestrator-{__version__}-*.whl"))
    return found[0]
