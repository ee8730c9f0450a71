"""``orchestrator``: the command line.

Exit status: 0 done; 1 failed; 2 wrong usage; 3 the lab file is wrong; 4 a host does not answer; 5 another command is
changing the lab; 10 ``plan --exit-code`` found changes; 130 stopped by the user. ``exec`` and ``ssh`` pass on the
status of what they ran.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from orchestrator import __version__
from orchestrator.cli import output
from orchestrator.errors import OrchestratorError

app = typer.Typer(
    name="orchestrator",
    help="One lab file, one command: virtual machines on any computer of a lab.",
    epilog="Exit status: 0 done, 1 failed, 2 usage, 3 lab file wrong, 4 host unreachable, 5 lab locked, 130 stopped. "
    "Every option can be given as ORCHESTRATOR_OPTION or ORCHESTRATOR_COMMAND_OPTION.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "ORCHESTRATOR", "help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        output.stdout.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Show the commands that are run; -vv: everything.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    color: Annotated[
        bool, typer.Option("--color/--no-color", envvar="ORCHESTRATOR_COLOR", help="NO_COLOR is obeyed too.")
    ] = True,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    output.configure(color=color, quiet=quiet)
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(message)s" if verbose < 2 else "%(asctime)s %(name)s: %(message)s")
    if verbose < 2:
        for noisy in ("paramiko", "pyroute2", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


def _register() -> None:
    from orchestrator.cli import box, guest, host, image, lab, read, switch, tools

    for module in (lab, read, guest, host, switch, image, box, tools):
        module.register(app)


ANYWHERE = frozenset({"-q", "--quiet", "-v", "-vv", "--verbose", "--color", "--no-color"})
PASS_ON = frozenset({"exec", "ssh"})


def hoist(words: list[str]) -> list[str]:
    """Let the global flags stand behind the command too; not behind a command that passes its arguments on."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command is None or command in PASS_ON:
        return words
    end = words.index("--") if "--" in words else len(words)
    flags = [word for word in words[:end] if word in ANYWHERE]
    return flags + [word for word in words[:end] if word not in ANYWHERE] + words[end:]


def main() -> None:
    """Run the command line and end the process with its exit status."""
    _register()
    try:
        app(hoist(sys.argv[1:]))
    except OrchestratorError as failure:
        output.error(failure)
        sys.exit(failure.exit_code)
