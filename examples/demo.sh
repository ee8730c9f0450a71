#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make demo`: brings the demo lab up, shows what it proves, takes it down. KEEP=1 leaves it up.
set -euo pipefail
cd "$(dirname "$0")/.."
lab=${LAB:-examples/demo.yaml}
orchestrator() { "$PWD/.venv/bin/orchestrator" "$@"; }
say() { printf '\n== %s\n' "$*"; }

take_down() {
  status=$?
  trap - EXIT
  if [ "${KEEP:-}" = 1 ] && [ "$status" = 0 ]; then
    say "left up: try  sudo .venv/bin/orchestrator ssh --lab demo ann    and  sudo .venv/bin/orchestrator down --lab demo"
  else
    say "orchestrator down"
    orchestrator down -f "$lab" || status=$?
  fi
  exit "$status"
}
trap take_down EXIT
trap 'exit 130' INT TERM

say "orchestrator up -f $lab"
orchestrator up -f "$lab"
say "orchestrator status"
orchestrator status -f "$lab"
say "orchestrator reach: each guest asks for each other guest"
orchestrator reach -f "$lab"
