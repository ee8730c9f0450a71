"""Tells the orchestrator how a playbook goes: one JSON object per line on standard output.

==========================================================  ================================================
``{"event": "begin", "host", "task"}``                      a task begins on a host
``{"event": "end", "host", "task", "status", "result"}``    ok, changed, skipped, ignored, failed or
                                                            unreachable; ``result`` where it went wrong, and
                                                            where a task says what it would change
``{"event": "done"}``                                       Ansible has done with every host
==========================================================  ================================================
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: orchestrator_lines
type: stdout
short_description: one JSON object per line
description: Tells the orchestrator how a playbook goes.
"""

WANTED = ("msg", "stderr", "stdout", "module_stderr", "module_stdout", "cmd", "rc")


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "orchestrator_lines"

    def _say(self, **fields: Any) -> None:
        sys.stdout.write(json.dumps(fields, default=str) + "\n")
        sys.stdout.flush()

    def _end(self, result: Any, status: str, *, why: bool = False) -> None:
        found = result.result
        # of a loop, the first that went wrong says why
        found = next(
            (item for item in found.get("results", ()) if isinstance(item, dict) and item.get("failed")), found
        )
        shown = {key: found[key] for key in WANTED if found.get(key) not in (None, "")} if why else {}
        task = result.task.get_name().strip()
        self._say(event="end", host=result.host.get_name(), task=task, status=status, result=shown)

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        self._say(event="begin", host=host.get_name(), task=task.get_name().strip())

    def v2_runner_on_ok(self, result: Any) -> None:
        says = result.task.action == "ansible.builtin.debug"
        self._end(result, "changed" if result.is_changed() else "ok", why=says)

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._end(result, "skipped")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._end(result, "ignored" if ignore_errors else "failed", why=True)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._end(result, "unreachable", why=True)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        self._say(event="done")
