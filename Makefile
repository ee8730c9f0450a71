# SPDX-License-Identifier: Apache-2.0
# Everything installs what it needs by itself; `make setup` says what.

SHELL := /bin/bash
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
RUN := $(SUDO) env PATH="$(CURDIR)/.venv/bin:$$PATH"
LAB ?= examples/demo.yaml

.PHONY: help setup demo test unit integration lint format lock nested bench bench-up bench-switch clean

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: ## install what is missing: system packages, and Python packages into .venv
	@.ci/setup

demo: setup ## bring up two hosts with four guests, show the result, take it down (KEEP=1 leaves it up)
	@KEEP=$(KEEP) LAB=$(LAB) $(RUN) examples/demo.sh

test: setup ## all tests: unit, and integration with real guests
	@if command -v cargo >/dev/null; then $(MAKE) -s -C dataplane test; else echo "NOT TESTED: dataplane, as there is no Rust"; fi
	@$(RUN) .venv/bin/pytest tests/unit tests/integration

unit: setup ## the tests that need no privileges
	@.venv/bin/pytest tests/unit

integration: setup ## the tests with real guests on this machine
	@$(RUN) .venv/bin/pytest tests/integration

lint: setup ## ruff, mypy --strict, shellcheck, yamllint, ansible-lint, clippy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@git ls-files | xargs grep -lE '^#!.*\b(ba)?sh\b' | xargs shellcheck
	@.venv/bin/yamllint --strict .
	@PATH="$(CURDIR)/.venv/bin:$$PATH" ansible-lint --profile production --offline -q ansible
	@if command -v cargo >/dev/null; then $(MAKE) -s -C dataplane lint; else echo "NOT LINTED: dataplane, as there is no Rust"; fi

format: setup ## format the Python code
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

lock: ## resolve the Python packages anew
	@.ci/setup --lock

nested: ## the tests on two virtual machines with their own KVM (KEEP=1 leaves them up, KEEP=0 never does)
	@.ci/setup --nested
	@KEEP=$(KEEP) $(RUN) .venv/bin/pytest -v --exitfirst --durations=15 tests/nested

bench: bench-up bench-switch ## all measurements against peers

bench-up: setup ## from `up` to every guest answering, against bare QEMU
	@$(RUN) python bench/up.py

bench-switch: setup ## the switch, against a Linux bridge, Open vSwitch and VDE
	@$(RUN) python bench/switch.py

clean: ## remove the virtual environment, what was compiled, and caches of tools
	@$(MAKE) -s -C bpf clean
	@$(MAKE) -s -C dataplane clean
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
