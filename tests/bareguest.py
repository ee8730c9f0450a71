"""QEMU started by hand, so that nothing but a part of ours is under test."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.images.store import Image

PATIENCE = 120.0  # seconds for a guest to do anything at all on a loaded machine


def eventually(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return found


class Guest:
    """A QEMU under TCG with a guest agent, a QMP socket and a console in a file."""

    def __init__(
        self, image: Image, words: str = "", *options: str, memory: str = "256", patience: float = PATIENCE
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="orc-guest-"))
        self.patience = patience
        machine = ["-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", memory, "-display", "none", "-no-reboot"]
        machine += ["-nodefaults", "-no-user-config"]
        machine += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", f"{image.cmdline} {words}"]
        machine += ["-serial", f"file:{self.folder}/console", "-qmp", f"unix:{self.folder}/qmp,server=on,wait=off"]
        machine += ["-chardev", f"socket,id=agent,path={self.folder}/agent,server=on,wait=off"]
        machine += ["-device", "virtio-serial-pci"]
        machine += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        self.process = subprocess.Popen(["qemu-system-x86_64", *machine, *options])
        try:
            self._agent = self._connect("agent")
            self._monitor = self._connect("qmp")
            self._monitor.readline()
            self.qmp("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def _connect(self, name: str) -> Any:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(self.patience)
            eventually(lambda: link.connect_ex(str(self.folder / name)) == 0, f"QEMU's socket {name}")
            return link.makefile("rw")

    def qmp(self, command: str, **arguments: Any) -> Any:
        return self._call(self._monitor, command, arguments)

    def agent(self, command: str, **arguments: Any) -> Any:
        return self._call(self._agent, command, arguments)

    @staticmethod
    def _call(link: Any, command: str, arguments: dict[str, Any]) -> Any:
        link.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        link.flush()
        while "event" in (answer := json.loads(link.readline())):
            pass
        assert "return" in answer, answer
        return answer["return"]

    def shell(self, script: str) -> str:
        """What a shell of the guest says to ``script``, which must not fail."""
        pid = self.agent("guest-exec", path="/bin/sh", arg=["-c", script], **{"capture-output": True})["pid"]

        def ended() -> Any:
            status = self.agent("guest-exec-status", pid=pid)
            return status if status["exited"] else None

        done = eventually(ended, script)
        out, err = (base64.b64decode(done.get(kind, "")).decode() for kind in ("out-data", "err-data"))
        assert done["exitcode"] == 0, f"{script}: {out}{err}"
        return out

    def send_shutdown(self) -> None:
        """Success has no answer: the agent is gone."""
        self._agent.write('{"execute": "guest-shutdown"}\n')
        self._agent.flush()

    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def running(*args: Any, **options: Any) -> Iterator[Guest]:
    guest = Guest(*args, **options)
    try:
        yield guest
    except BaseException:
        print(guest.console()[-3000:])  # noqa: T201 - pytest shows it beside the failure
        raise
    finally:
        guest.close()
