"""From ``up`` to every guest answering: two hosts, four guests, against the same QEMUs from a bare shell script.

The peer's command lines are those that libvirt used in a first, uncounted ``up``, with what only libvirt can give
(file descriptors, secrets) replaced by plain files and names, and started by one ``sh``. Its taps and bridge are
there before its clock starts; ours are made within. Both clocks stop when the last guest's agent answers.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from report import Row, write

CHECKOUT = Path(__file__).parent.parent
DEMO = CHECKOUT / "examples" / "demo.yaml"
NAMESPACE = "orc-bench-up"
LIMIT_SECONDS = 300


class Ours:
    """The demo lab in a state of its own."""

    def __init__(self, folder: Path) -> None:
        self._env = {
            **os.environ,
            "ORCHESTRATOR_STATE": str(folder / "state"),
            "ORCHESTRATOR_RUN": f"/run/{folder.name}",
        }

    def _run(self, *words: str) -> float:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *words, "-f", str(DEMO)],
            env=self._env,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        if done.returncode:
            sys.exit(f"orchestrator {' '.join(words)} failed:\n{done.stderr}")
        return time.monotonic() - began

    def up(self) -> float:
        return self._run("up")

    def down(self) -> float:
        return self._run("down")

    def command_lines(self) -> list[list[str]]:
        """Of every QEMU of this lab."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode().split("\0")[:-1]
                if words and "qemu-system" in words[0] and self._env["ORCHESTRATOR_RUN"] in " ".join(words):
                    found.append(words)
        return found


def bare(words: list[str], index: int, folder: Path) -> list[str]:
    """libvirt's command line as one that a shell can start."""
    pairs = iter(words[1:])
    made = [words[0]]
    for word in pairs:
        value = None if word in _WITHOUT_VALUE else next(pairs)
        if word in ("-S", "-add-fd", "-mon"):
            continue
        if word == "-object" and value and "masterKey" in value:
            continue
        if word == "-chardev" and value:
            if "id=charmonitor" in value:
                continue
            if value.startswith("pty"):
                value = f"file,id=charserial0,path={folder}/console{index}.log"
            else:
                value = re.sub(r"fd=\d+", f"path={folder}/agent{index}.sock", value)
        if word == "-blockdev" and value and (file := re.search(r'"filename":"([^"]+)"', value)):
            disk = folder / f"bench{index}-{Path(file[1]).name}"
            shutil.copy(file[1], disk)  # `down` removes the lab's own
            value = value.replace(file[1], str(disk))
        if word == "-netdev" and value:
            value = f"tap,id={_netdev_id(value)},ifname=bench{index},script=no,downscript=no"
        made += [word] if value is None else [word, value]
    return made


_WITHOUT_VALUE = frozenset({"-S", "-nodefaults", "-no-user-config", "-nographic", "-no-shutdown", "-no-hpet"})


def _netdev_id(value: str) -> str:
    return str(json.loads(value)["id"]) if value.startswith("{") else re.findall(r"id=([^,]+)", value)[0]


class Bare:
    """The peer: a shell script."""

    def __init__(self, folder: Path, command_lines: list[list[str]]) -> None:
        self._folder = folder
        self._count = len(command_lines)
        lines = [shlex.join(bare(words, index, folder)) + " &" for index, words in enumerate(command_lines)]
        self._script = folder / "bare.sh"
        self._script.write_text("#!/bin/sh\n" + "\n".join([*lines, "wait", ""]))

    @contextlib.contextmanager
    def links(self) -> Iterator[None]:
        ip = ["ip", "-n", NAMESPACE]
        subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
        try:
            subprocess.run([*ip, "link", "add", "name", "bench", "type", "bridge"], check=True)
            subprocess.run([*ip, "link", "set", "bench", "up"], check=True)
            for index in range(self._count):
                subprocess.run([*ip, "tuntap", "add", f"bench{index}", "mode", "tap", "vnet_hdr"], check=True)
                subprocess.run([*ip, "link", "set", f"bench{index}", "master", "bench", "up"], check=True)
            yield
        finally:
            subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)

    def up(self) -> float:
        for stale in self._folder.glob("agent*.sock"):
            stale.unlink()
        with self.links(), open(self._folder / "bare.err", "wb") as errors:
            began = time.monotonic()
            process = subprocess.Popen(
                ["ip", "netns", "exec", NAMESPACE, "sh", self._script],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            try:
                for index in range(self._count):
                    _wait_for_agent(self._folder / f"agent{index}.sock", process)
                return time.monotonic() - began
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                time.sleep(1)  # the QEMUs let go of their taps


def _wait_for_agent(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the guest agent behind a socket of QEMU answers. Asked once: QEMU keeps the question until the guest
    opens its port."""
    deadline = time.monotonic() + LIMIT_SECONDS
    with socket.socket(socket.AF_UNIX) as stream:
        while stream.connect_ex(str(path)):
            if process.poll() is not None:
                sys.exit(f"the bare script ended: {path.with_name('bare.err').read_text()}")
            if time.monotonic() > deadline:
                sys.exit(f"nothing listens at {path}")
            time.sleep(0.01)
        stream.settimeout(LIMIT_SECONDS)
        stream.sendall(b'{"execute":"guest-ping"}\n')
        if b"return" not in stream.recv(256):
            sys.exit(f"no guest agent answered at {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each, in turn")
    rounds = parser.parse_args().rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    folder = Path(tempfile.mkdtemp(prefix="orc-bench-", dir="/var/tmp"))
    folder.chmod(0o755)
    ours, again, down, peer = [], [], [], []
    mine = Ours(folder)
    try:
        mine.up()
        other = Bare(folder, mine.command_lines())
        mine.down()
        for number in range(rounds):
            ours.append(mine.up())
            again.append(mine.up())
            down.append(mine.down())
            peer.append(other.up())
            sys.stderr.write(
                f"round {number + 1}: up {ours[-1]:.1f} s, again {again[-1]:.1f} s, down {down[-1]:.1f} s, "
                f"bare {peer[-1]:.1f} s\n"
            )
        name = "bare shell script"
        write(
            "up",
            [
                Row.of("up: 2 hosts, 4 guests answer", "s", ours, peer, name, "lower"),
                Row.of("second up, nothing to do", "s", again, None, None, "lower"),
                Row.of("down", "s", down, None, None, "lower"),
            ],
        )
    finally:
        with contextlib.suppress(SystemExit):
            mine.down()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
