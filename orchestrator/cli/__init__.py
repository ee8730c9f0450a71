# SPDX-License-Identifier: Apache-2.0
from orchestrator.cli.app import main

__all__ = ["main"]
