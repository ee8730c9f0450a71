"""Which way dependencies point (docs/architecture.md), and that importing a module does nothing else."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator

PACKAGE = Path(orchestrator.__file__).parent

#: What everything may import, and what imports only of its own kind: errors, the gateway to programs, plain data.
FOUNDATION = {"", "errors", "names", "paths", "patience", "run", "spec.base", "spec.resolved", "sshkeys"}

#: Beside the foundation and itself, what each part may import. A subsystem imports no other; the exceptions are
#: those of docs/architecture.md.
MAY_IMPORT = {
    "spec": set(),
    "hosts": set(),
    "state": set(),
    "images": {"hosts"},
    "switch": {"hosts"},
    "guests": {"hosts", "images"},  # guests boot from images
    "doctor": {"hosts", "state"},
    "agent": {"hosts", "images", "switch", "guests", "doctor"},  # puts the services of a host together
    "plan": {"hosts", "images", "switch", "guests"},
    "reach": set(),
    "boxes": {"hosts", "images"},  # an image of a lab host, handed to Vagrant
    "apply": {"plan", "hosts", "images", "guests"},
    "render": {"plan", "state"},
    "testing": {"plan", "hosts", "switch", "guests"},
    "cli": {
        "apply", "render", "reach", "plan", "spec", "state", "agent", "hosts", "images", "switch", "guests", "doctor",
        "boxes",
    },
    "__main__": {"cli"},
}  # fmt: skip
SUBSYSTEMS = {"images", "switch", "guests", "remoteio", "memory", "span", "interpose"}


def name_of(path: Path) -> str:
    """``…/orchestrator/hosts/rpc.py`` → ``hosts.rpc``; a package is its folder, ours the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_templates" not in path.parts}


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever in its text it does."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide where an arrow points"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("orchestrator.") in MODULES else str(node.module))
    ours = {each for each in found if each == "orchestrator" or each.startswith("orchestrator.")}
    return {each.removeprefix("orchestrator").removeprefix(".") for each in ours}


def is_foundation(name: str) -> bool:
    return name in FOUNDATION or name.endswith(".model")


def part(name: str) -> str:
    return name.partition(".")[0]


def test_modules_are_found() -> None:
    assert {"", "errors", "hosts.rpc", "cli.app", "plan.build", "spec.resolved"} <= set(MODULES)
    assert imports("plan.build") >= {"guests.control", "switch.control", "plan.operations"}


@pytest.mark.parametrize("name", [name for name in MODULES if not is_foundation(name)])
def test_module_imports_only_what_its_part_may(name: str) -> None:
    allowed = MAY_IMPORT[part(name)] | {part(name)}

    wrong = {each for each in imports(name) if not is_foundation(each) and part(each) not in allowed}

    assert not wrong, f"{name} may not import {', '.join(sorted(wrong))}: see docs/architecture.md"


@pytest.mark.parametrize("name", [name for name in MODULES if is_foundation(name) and name])
def test_foundation_imports_only_of_its_kind(name: str) -> None:
    wrong = {each for each in imports(name) if not is_foundation(each) and part(each) != part(name)}

    assert not wrong, f"{name} may not import {', '.join(sorted(wrong))}"


def test_arrows_between_parts_make_no_circle() -> None:
    order: list[str] = []
    left = {name: set(targets) for name, targets in MAY_IMPORT.items()}
    while free := [name for name, targets in left.items() if targets <= set(order)]:
        order += free
        for name in free:
            del left[name]

    assert not left


def test_nothing_but_the_entry_point_imports_the_command_line() -> None:
    importers = {name for name in MODULES if any(part(each) == "cli" for each in imports(name))}

    assert {part(name) for name in importers} <= {"cli", "__main__"}


def test_subsystems_import_no_other_but_for_the_documented_exception() -> None:
    arrows = {
        (part(name), part(each))
        for name in MODULES
        if part(name) in SUBSYSTEMS
        for each in imports(name)
        if part(each) in SUBSYSTEMS and part(each) != part(name) and not is_foundation(each)
    }

    assert arrows <= {("guests", "images")}


def test_every_part_is_in_the_table_and_every_row_is_a_part() -> None:
    parts = {part(name) for name in MODULES if not is_foundation(name)}

    assert parts == set(MAY_IMPORT)


# -- importing -------------------------------------------------------------------------------------------------------

LOOK = """
import ctypes, importlib, json, os, struct, sys, threading
importlib.import_module("orchestrator")  # starting Python and finding the package is not what is looked at
before = {"cwd": os.getcwd(), "environ": dict(os.environ), "fds": len(os.listdir("/proc/self/fd"))}
import signal
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
if ctypes.CDLL(None).capset(struct.pack("II", 0x20080522, 0), bytes(24)):  # root without any of its capabilities
    sys.exit("capset failed")
for name in sys.argv[1:]:
    importlib.import_module(name)
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
print(json.dumps({
    "threads": [thread.name for thread in threading.enumerate()],
    "children": children,
    "fds": len(os.listdir("/proc/self/fd")) - before["fds"],
    "cwd": os.getcwd() == before["cwd"],
    "environ": dict(os.environ) == before["environ"],
    "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers,
    "modules": sorted(set(sys.modules) & {"paramiko", "libvirt", "pyroute2", "hypothesis", "pytest"}),
}))
"""


def look(*names: str) -> dict[str, object]:
    """What there is in a new Python without privileges after it imported ``names``."""
    done = subprocess.run([sys.executable, "-c", LOOK, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


EVERY_MODULE = [f"orchestrator.{name}" for name in MODULES if name and not name.endswith("__main__")]
NOTHING = {"threads": ["MainThread"], "children": [], "fds": 0, "cwd": True, "environ": True, "signals": True}


def test_importing_every_module_needs_no_privilege_and_has_no_effect() -> None:
    seen = look(*EVERY_MODULE)

    assert {key: seen[key] for key in NOTHING} == NOTHING


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("orchestrator.cli.app", {"paramiko", "libvirt", "pyroute2"}),
        ("orchestrator.hosts.transport", {"paramiko", "libvirt", "pyroute2"}),
        ("orchestrator.spec.load", {"paramiko", "libvirt", "pyroute2"}),
        ("orchestrator.agent.__main__", {"paramiko"}),
        ("orchestrator.testing", {"paramiko", "pytest"}),
    ],
)
def test_heavy_packages_are_imported_only_where_they_are_needed(module: str, heavy: set[str]) -> None:
    assert not heavy & set(look(module)["modules"])  # type: ignore[call-overload]
