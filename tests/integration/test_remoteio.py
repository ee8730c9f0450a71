"""A disk of another host, in a guest of stock QEMU: the server and the stub by hand, without a lab."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import paths
from orchestrator.images import store
from tests.bareguest import Guest, eventually, running

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.skipif(
        not (paths.dataplane() / "orchestrator-iostub").exists(),
        reason="NOT TESTED: remote devices, as there is no Rust",
    ),
]

SIZE = 64 << 20
QUEUES = 2


class Daemon:
    """One of the two, which can be killed and comes back as the same."""

    def __init__(self, program: str, folder: Path, wish: dict[str, Any]) -> None:
        self._program, self._wish = paths.dataplane() / program, wish
        self._control, self._log = folder / f"{program}.sock", folder / f"{program}.log"
        self.start()

    def start(self) -> None:
        self._control.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([self._program, "--control", str(self._control)], stderr=log)
        eventually(self._control.exists, "the control socket")
        self.ask(op="apply", **self._wish)

    def ask(self, **question: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as link:
            eventually(lambda: link.connect_ex(str(self._control)) == 0, "the control socket")
            link.sendall(json.dumps(question).encode() + b"\n")
            answer: dict[str, Any] = json.loads(link.makefile().readline())
        assert answer["ok"], answer
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text()


class World:
    """A server with a disk, a stub, and a guest that has it as ``/dev/vda``."""

    def __init__(self, folder: Path) -> None:
        self.disk = folder / "disk"
        with self.disk.open("wb") as file:
            file.truncate(SIZE)
        module = {
            "name": "data",
            "guests": [{"client": "alpha", "guest": "ann"}],
            "what": {"kind": "block", "path": str(self.disk), "serial": "remote-1"},
        }
        wish = {"name": "beta", "listen": f"127.0.0.1:{_free_port()}", "modules": [module]}
        self.server = Daemon("orchestrator-ioserver", folder, {"wish": wish})
        self.socket = folder / "vu.sock"
        names = {"client": "alpha", "guest": "ann", "server": "beta", "module": "data", "address": wish["listen"]}
        device = {"name": "ann-data", "kind": "block", "socket": str(self.socket), "queues": QUEUES}
        self.stub = Daemon("orchestrator-iostub", folder, {"devices": [device | names]})

    def guest(self, image: Any) -> Any:
        memory = ["-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-machine", "memory-backend=ram"]
        device = ["-chardev", f"socket,id=io,path={self.socket},reconnect=1"]
        device += ["-device", f"vhost-user-blk-pci,chardev=io,num-queues={QUEUES}"]
        return running(image, "orc.name=ann", "-smp", "2", *memory, *device)

    def md5(self, start: int, length: int) -> str:
        """Of the file, which is what the guest does not see."""
        with self.disk.open("rb") as file:
            file.seek(start)
            return hashlib.md5(file.read(length), usedforsecurity=False).hexdigest()

    def device(self) -> dict[str, Any]:
        found: dict[str, Any] = self.stub.ask(op="stats")["devices"]["ann-data"]
        return found

    def is_served(self) -> bool:
        """Requests of the guest have been answered since the stub was started."""
        seen = self.device()
        return bool(seen["connected"] and seen["attached"] and sum(queue["requests"] for queue in seen["queues"]))

    def close(self) -> None:
        """What they have said is shown beside a failure."""
        for daemon in (self.stub, self.server):
            daemon.kill()
            print(daemon.log[-3000:])  # noqa: T201


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def image() -> Any:
    return store.ensure("tiny", None, base=paths.cache(), progress=lambda _: None)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def write(guest: Guest, megabyte: int, count: int = 1) -> str:
    """Write random bytes there, and have them reach the disk; their digest."""
    target = f"dd if=/tmp/data of=/dev/vda bs=1M seek={megabyte} conv=fsync"
    made = guest.shell(f"dd if=/dev/urandom of=/tmp/data bs=1M count={count} && {target} && md5sum /tmp/data")
    return made.split()[0]


def test_guest_reads_and_writes_and_the_file_of_the_server_has_it(world: World, image: Any) -> None:
    with world.guest(image) as guest:
        size, serial = (guest.shell(f"cat /sys/block/vda/{name}").strip() for name in ("size", "serial"))
        written = write(guest, 3, count=4)
        read = guest.shell("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M skip=3 count=4 | md5sum").split()[
            0
        ]

        assert (int(size), serial) == (SIZE // 512, "remote-1")
        assert written == read == world.md5(3 << 20, 4 << 20)
        assert world.device()["connected"]


@pytest.mark.parametrize("booted", [True, False], ids=["up", "booting"])
def test_disk_that_grows_is_larger_in_the_guest_at_once(world: World, image: Any, booted: bool) -> None:
    with world.guest(image) as guest:
        if booted:
            guest.shell("true")
        world.server.ask(op="resize", module="data", size=2 * SIZE)

        def grown() -> bool:
            return int(guest.shell("cat /sys/block/vda/size")) == 2 * SIZE // 512

        eventually(grown, "the new size in the guest", 30)
        assert write(guest, 100) == world.md5(100 << 20, 1 << 20)


@pytest.mark.parametrize("victims", [("server",), ("stub",), ("server", "stub")], ids="-".join)
def test_nothing_is_lost_when_either_side_is_killed_again_and_again_while_the_guest_writes(
    world: World, image: Any, victims: tuple[str, ...]
) -> None:
    script = (
        "for i in $(seq 0 39); do dd if=/dev/urandom of=/tmp/$i bs=64k count=4 2>/dev/null;"
        " dd if=/tmp/$i of=/dev/vda bs=64k seek=$((i * 4)) conv=fsync 2>/dev/null || exit 1; done;"
        " for i in $(seq 0 39); do cat /tmp/$i; done | md5sum;"
        " echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=256k count=40 2>/dev/null | md5sum;"
        " dmesg | grep -ci 'i/o error'; :"
    )
    said: list[str] = []
    with world.guest(image) as guest:
        writer = threading.Thread(target=lambda: said.append(guest.shell(script)))
        writer.start()
        kills = 0
        while writer.is_alive() and kills < 60:
            time.sleep(0.7)
            for name in victims:
                daemon: Daemon = getattr(world, name)
                daemon.kill()
                daemon.start()
                kills += 1
            # QEMU 7.2 gives a device up whose back end dies again before it has been set up again.
            eventually(lambda: world.is_served() or not writer.is_alive(), "requests that are answered")
        writer.join(120)

    written, read, errors = (line.split()[0] for line in said[0].splitlines())
    assert kills >= 3
    assert errors == "0"
    assert written == read == world.md5(0, 40 * 4 * 65536), f"{kills} kills"


def test_guest_waits_for_a_server_that_is_away_and_status_says_since_when(world: World, image: Any) -> None:
    said: list[str] = []
    with world.guest(image) as guest:
        world.server.kill()
        writer = threading.Thread(target=lambda: said.append(write(guest, 1)))
        writer.start()
        away = eventually(lambda: (seen := world.device())["trouble"] and seen, "trouble")
        time.sleep(2)
        later = world.device()
        waits = writer.is_alive()
        world.server.start()
        writer.join(60)

        assert waits
        assert not away["attached"]
        assert later["since_seconds"] > away["since_seconds"] + 1
        assert said == [world.md5(1 << 20, 1 << 20)]
        assert world.device()["trouble"] is None
