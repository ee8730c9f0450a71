"""``python -m orchestrator.doctor [--json] [NAME …]``: the checkup without the command line's other parts.

``--here NAME`` runs one probe in this very process and prints its finding as JSON; that is how probes that want a
process of their own are run.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import sys

from orchestrator.doctor.model import Finding
from orchestrator.doctor.table import PROBES, checkup, examine
from orchestrator.errors import NotFoundError

_WORDS = {True: "ok", False: "FAIL", None: "?"}


def main(arguments: list[str]) -> int:
    """:return: exit status: 0, or 1 if something does not work."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.doctor")
    parser.add_argument("names", nargs="*", metavar="NAME", help="probes to run; default: all")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.here:
        probe = next(probe for probe in PROBES if probe.name == chosen.names[0])
        sys.stdout.write(json.dumps(examine(probe, here=True).to_json()))
        return 0
    try:
        findings = checkup(only=chosen.names or None)
    except NotFoundError as error:
        parser.error(f"{error.message}; {error.hint}")
    if chosen.json:
        sys.stdout.write(json.dumps([finding.to_json() for finding in findings], indent=2) + "\n")
    else:
        sys.stdout.write("".join(map(_text, findings)))
    return int(any(finding.ok is False for finding in findings))


def _text(finding: Finding) -> str:
    lines = [f"{_WORDS[finding.ok]:5}{finding.name:12} {finding.summary}"]
    lines += [f"{'':18}{line}" for line in finding.detail]
    if finding.fix:
        lines.append(f"{'':18}→ {finding.fix}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
