"""Images on real guests: QEMU started by hand, so that nothing but the image is under test."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orchestrator.images import disk, seed, store
from orchestrator.images.seed import SeedNic
from orchestrator.images.store import Image
from tests.bareguest import PATIENCE, eventually, running

pytestmark = pytest.mark.privileged

NIC = SeedNic("02:00:00:00:00:01", "10.0.2.15/24", "10.0.2.2", "fd00::5/64", "fd00::2", 1400)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, so that the image is built here and now."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ORCHESTRATOR_CACHE", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Image:
    """Two builders at the same time: one builds, the other waits for it."""
    said: list[list[str]] = [[], []]
    images: list[Image] = []

    def build(number: int) -> None:
        images.append(store.ensure("tiny", None, base=cache, progress=said[number].append))

    threads = [threading.Thread(target=build, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = images
    assert first == second
    waited, built = sorted(said, key=len)
    assert waited == ["waiting for another build of tiny"]
    assert built[0] == "looking up the packages"
    return first


def network(*forward: str) -> list[str]:
    rules = "".join(f",hostfwd={rule}" for rule in forward)
    return ["-netdev", f"user,id=net{rules}", "-device", f"virtio-net-pci,netdev=net,mac={NIC.mac},romfile="]


def test_tiny_is_what_the_command_line_says_when_its_agent_answers(tiny: Image) -> None:
    words = seed.tiny_cmdline(hostname="ann", ssh_keys=[], nics=[NIC])
    with running(tiny, words, *network(), memory="128") as guest:
        guest.agent("guest-ping")
        addresses = guest.shell("ip addr show eth0")
        assert "mtu 1400" in addresses
        assert "inet 10.0.2.15/24 brd 10.0.2.255" in addresses
        assert "inet6 fd00::5/64 scope global" in addresses
        assert "tentative" not in addresses
        assert "default via 10.0.2.2 dev eth0" in guest.shell("ip route")
        assert "default via fd00::2 dev eth0" in guest.shell("ip -6 route")
        assert guest.shell("hostname; cat /etc/hostname").split() == ["ann", "ann"]
        assert "127.0.1.1 ann" in guest.shell("cat /etc/hosts")
        eventually(lambda: "orchestrator: guest ann is up" in guest.console(), "the message on the console")
        eventually(lambda: "ann:/# " in guest.console(), "a shell on the console")
        guest.shell("iperf3 --version && mkdir /tmp/m && mount -t tmpfs m /tmp/m")
        guest.send_shutdown()
        assert guest.process.wait(PATIENCE) == 0


def test_a_base_is_never_written(tiny: Image, tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(os.urandom(1 << 20) + bytes(63 << 20))
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    disk.create_overlay(base, "raw", overlay, 128 << 20)
    options = ["-drive", f"file={overlay},if=virtio", "-device", "virtio-rng-pci"]
    with running(tiny, "orc.name=ann", *options) as guest:
        assert guest.shell("cat /sys/block/vda/size").strip() == str((128 << 20) // 512)
        start = base64.b64encode(base.read_bytes()[:512]).decode()
        assert guest.shell("head -c 512 /dev/vda | base64 -w 0").strip() == start
        guest.shell("mke2fs -F /dev/vda && mkdir /mnt && mount -t ext4 /dev/vda /mnt && echo kept > /mnt/file")
        guest.send_shutdown()
        assert guest.process.wait(PATIENCE) == 0
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before
    with running(tiny, "orc.name=ann", *options) as guest:
        assert guest.shell("mkdir /mnt && mount -t ext4 /dev/vda /mnt && cat /mnt/file") == "kept\n"


def test_what_is_plugged_into_tiny_is_used(tiny: Image) -> None:
    ports = ["-device", "pcie-root-port,id=p0,slot=1", "-device", "pcie-root-port,id=p1,slot=2"]
    spare = ["-smp", "1,maxcpus=2"]
    with running(tiny, "orc.name=ann", *ports, *spare, memory="256,slots=1,maxmem=1G") as guest:
        eventually(lambda: "uevent" in guest.shell("ps"), "the guest listens for events")
        memory = int(guest.shell("awk '/MemTotal/ {print $2}' /proc/meminfo"))
        guest.qmp("netdev_add", type="user", id="n0")
        guest.qmp("device_add", driver="e1000e", id="nic", netdev="n0", mac=NIC.mac, bus="p0")
        guest.qmp("object-add", **{"qom-type": "memory-backend-ram", "id": "m0", "size": 128 << 20})
        guest.qmp("device_add", driver="pc-dimm", id="dimm", memdev="m0")
        slot = next(cpu for cpu in guest.qmp("query-hotpluggable-cpus") if "qom-path" not in cpu)
        guest.qmp("device_add", driver=slot["type"], id="cpu", **slot["props"])
        eventually(lambda: guest.shell("cat /sys/devices/system/cpu/online").strip() == "0-1", "two vCPUs")
        eventually(lambda: "eth0" in guest.shell("ls /sys/class/net"), "the new NIC")
        more = "awk '/MemTotal/ {print $2}' /proc/meminfo"
        eventually(lambda: int(guest.shell(more)) > memory + (100 << 10), "the new memory")
        for address in ("10.9.0.2/24", "10.9.0.3/24"):  # the second time it takes the place of the first
            guest.shell(f"/sbin/orc-nic {NIC.mac} {address} 10.9.0.1 fd09::2/64 - 1300")
        found = guest.shell("ip addr show eth0")
        assert "10.9.0.3/24" in found
        assert "10.9.0.2/24" not in found
        assert "mtu 1300" in found
        assert guest.shell("/sbin/orc-nic 02:00:00:00:00:99 - - - - - 2>&1 || true").startswith("orc-nic: no NIC has")


def test_tiny_takes_ssh_keys_and_obeys_the_power_button(tiny: Image) -> None:
    private, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    words = seed.tiny_cmdline(hostname="ann", ssh_keys=[public.decode()], nics=[NIC])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def hostname_by(key: Ed25519PrivateKey) -> bytes:
        with paramiko.SSHClient() as client:
            client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
            client.connect("127.0.0.1", port, "root", pkey=ssh_key(key), timeout=PATIENCE, banner_timeout=PATIENCE)
            return client.exec_command("hostname", timeout=PATIENCE)[1].read()

    with running(tiny, words, *network(f"tcp:127.0.0.1:{port}-10.0.2.15:22")) as guest:
        guest.agent("guest-ping")
        eventually(lambda: ":22 " in guest.shell("netstat -ltn"), "the ssh server")
        assert hostname_by(private) == b"ann\n"
        with pytest.raises(paramiko.AuthenticationException):
            hostname_by(other)
        guest.qmp("system_powerdown")
        assert guest.process.wait(PATIENCE) == 0


def ssh_key(private: Ed25519PrivateKey) -> paramiko.Ed25519Key:
    with tempfile.NamedTemporaryFile("wb") as file:
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        file.write(private.private_bytes(*form))
        file.flush()
        return paramiko.Ed25519Key.from_private_key_file(file.name)


def test_tiny_panics_when_it_is_told_to(tiny: Image) -> None:
    with running(tiny, "orc.name=ann orc.panic=1", "-device", "pvpanic") as guest:
        guest.process.wait(PATIENCE)  # QEMU's answer to a panic that the guest reports
        assert "Kernel panic - not syncing: sysrq triggered crash" in guest.console()


BUILD = """
import json, sys
from pathlib import Path
from orchestrator.errors import OrchestratorError
from orchestrator.images import store
try:
    store.ensure(sys.argv[1], None, base=Path("/"), progress=lambda text: print(text, flush=True))
except OrchestratorError as error:
    print(json.dumps(error.to_wire()))
"""


def left_in(cache: Path) -> list[str]:
    return [path.name for path in (cache / "images").iterdir() if not path.name.startswith(".lock-")]


@pytest.mark.parametrize(
    ("image", "moment"), [("tiny", "fetching"), ("tiny", "making"), ("debian", "installing debian")]
)
def test_ctrl_c_in_a_build_leaves_nothing(tmp_path: Path, image: str, moment: str) -> None:
    env = os.environ | {"ORCHESTRATOR_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", BUILD, image]
    build = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert build.stdout is not None
        for line in build.stdout:
            if line.startswith(moment):
                break
        time.sleep(0.5)
        os.killpg(build.pid, signal.SIGINT)  # as a terminal does
        _, said = build.communicate(timeout=PATIENCE)
    finally:
        build.kill()
        build.wait()
    assert "KeyboardInterrupt" in said
    assert left_in(tmp_path) == []
    eventually(lambda: not using(tmp_path), "what the build started is gone")
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_a_killed_build_ends_its_processes_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    env = os.environ | {"ORCHESTRATOR_CACHE": str(tmp_path)}
    build = subprocess.Popen([sys.executable, "-c", BUILD, "debian"], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert build.stdout is not None
        for line in build.stdout:
            if line.startswith("installing"):
                break
        eventually(lambda: using(tmp_path), "mmdebstrap runs")
    finally:
        build.kill()
        build.communicate()
    eventually(lambda: not using(tmp_path), "mmdebstrap and what it started are gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
        assert left_in(tmp_path) == [".build-debian"]
        assert store.prune(set()) == []
    assert left_in(tmp_path) == []


def using(folder: Path) -> list[str]:
    """Processes that have ``folder`` on their command line or as their root or working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            places = [str((process / name).readlink()) for name in ("cwd", "root")]
            places += (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if int(process.name) != os.getpid() and any(str(folder) in place for place in places):
                found.append(process.name)
    return found


@pytest.mark.parametrize("megabytes", [20, 200, 450])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, megabytes: int) -> None:
    """Too small for the packages, for what is in them, and for the image; in a mount namespace of its own."""
    script = (
        f"mount -t tmpfs -o size={megabytes}m none {tmp_path} && "
        f'{sys.executable} -c "$BUILD" tiny | tail -n 1 && ls -A {tmp_path}/images'
    )
    env = os.environ | {"ORCHESTRATOR_CACHE": str(tmp_path), "BUILD": BUILD}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=env, capture_output=True, text=True, check=True
    )
    answer, left = done.stdout.strip().split("\n", 1)
    error = json.loads(answer)
    assert error["kind"] == "ImageError"
    assert error["message"] == f"image tiny could not be made: no space left in {tmp_path}/images"
    assert "ORCHESTRATOR_CACHE" in error["hint"]
    assert left == ".lock-tiny"


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    os.environ.get("ORCHESTRATOR_TEST_DEBIAN") != "1",
    reason="NOT TESTED: building and starting debian takes minutes; set ORCHESTRATOR_TEST_DEBIAN=1 to do it",
)
def test_debian_is_what_its_seed_says_when_its_agent_answers(cache: Path, tmp_path: Path) -> None:
    image = store.ensure("debian", None, base=cache, progress=lambda _: None)
    assert str(cache) not in Path("/proc/self/mounts").read_text()
    assert image.disk is not None
    assert image.disk_format is not None
    before = hashlib.sha256(image.disk.read_bytes()).hexdigest()
    disk.create_overlay(image.disk, image.disk_format, tmp_path / "disk", 6 << 30)
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZxgNp0c9eW5wEo7"
    facts = seed.render_seed(hostname="deb", ssh_keys=[public], nics=[NIC], user_data=None)
    disk.create_seed(tmp_path / "seed", *facts)
    drives = ["-drive", f"file={tmp_path}/disk,if=virtio"]
    drives += ["-drive", f"file={tmp_path}/seed,if=virtio,format=raw,readonly=on"]
    with running(image, "", *drives, *network(), memory="512", patience=600) as guest:
        guest.agent("guest-ping")
        addresses = guest.shell("ip addr show eth0")
        assert "mtu 1400" in addresses
        assert "inet 10.0.2.15/24" in addresses
        assert "inet6 fd00::5/64" in addresses
        assert "default via 10.0.2.2" in guest.shell("ip route")
        assert "fd00::2" in guest.shell("ip -6 route show default")
        assert guest.shell("hostname").strip() == "deb"
        assert public in guest.shell("cat /root/.ssh/authorized_keys")
        assert int(guest.shell("df --output=size -B1M / | tail -n 1")) > 5000, "it grew with its disk"
        assert guest.shell("systemctl list-units --failed --no-legend --plain") == ""
        eventually(lambda: "deb login:" in guest.console(), "a login prompt on the console")
        guest.qmp("system_powerdown")
        assert guest.process.wait(PATIENCE) == 0
    assert hashlib.sha256(image.disk.read_bytes()).hexdigest() == before
