"""Images by path and URL: copied, checked, and refused where they cannot be trusted."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gzip
import hashlib
import http.server
import shutil
import subprocess
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images import files, store
from orchestrator.images.model import ImageSpec
from orchestrator.images.store import Image

CONTENTS = b"a disk" + bytes(3 << 20) + b"its end"
SUM = hashlib.sha256(CONTENTS).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENTS)
    return path


def ensure(base: Path, said: list[str] | None = None, **spec: object) -> Image:
    said = [] if said is None else said
    return store.ensure("mine", ImageSpec.model_validate(spec), base=base, progress=said.append)


def images_in(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.startswith(".lock-")] if cache.exists() else []


def qemu_img(*args: str | Path) -> None:
    subprocess.run(["qemu-img", *args], check=True, stdout=subprocess.DEVNULL)


def test_a_path_is_copied_by_content(disk: Path, tmp_path: Path) -> None:
    image = ensure(tmp_path, path="disk.img", ready="console:login")
    assert image.id == f"mine-{SUM[:12]}"
    assert (image.disk_format, image.cloud_init, image.ready, image.kernel) == ("raw", True, "console:login", None)
    assert image.disk is not None
    assert image.disk.read_bytes() == CONTENTS
    assert image.disk.stat().st_blocks * 512 < len(CONTENTS) / 2, "zeros take no room"
    disk.write_bytes(b"another")
    assert image.disk.read_bytes() == CONTENTS


def test_the_second_time_nothing_is_read(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure(tmp_path, path="disk.img")
    monkeypatch.setattr(files, "receive", lambda *_: pytest.fail("read again"))
    said: list[str] = []
    assert ensure(tmp_path, said, path=str(disk)) == first
    assert said == []


def test_what_the_lab_file_says_of_use_is_not_part_of_the_contents(disk: Path, tmp_path: Path) -> None:
    first = ensure(tmp_path, path="disk.img")
    second = ensure(tmp_path, path="disk.img", cloud_init=False, ready="agent")
    assert (second.id, second.cloud_init, second.ready) == (first.id, False, "agent")


def test_a_changed_file_is_another_image_and_the_old_one_stays(disk: Path, tmp_path: Path) -> None:
    old = ensure(tmp_path, path="disk.img")
    disk.write_bytes(CONTENTS + b"more")
    new = ensure(tmp_path, path="disk.img")
    assert new.id != old.id
    assert {image.id for image in store.all_images()} == {old.id, new.id}


def test_a_touched_file_is_the_same_image(disk: Path, tmp_path: Path, cache: Path) -> None:
    old = ensure(tmp_path, path="disk.img")
    disk.touch()
    assert store.find("mine", ImageSpec(path=disk), tmp_path) is None, "nobody knows before it is read"
    assert ensure(tmp_path, path="disk.img").id == old.id
    assert store.find("mine", ImageSpec(path=disk), tmp_path) is not None
    assert images_in(cache) == [old.id]


def test_missing_path_names_a_file_like_it(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"{tmp_path}/disc.img: no such image") as caught:
        ensure(tmp_path, path="disc.img")
    assert caught.value.hint == f"there is {disk}"


def test_missing_folder_names_what_exists_of_the_way(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such image") as caught:
        ensure(tmp_path, path="not/there/disk.img")
    assert str(tmp_path) in str(caught.value.hint)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not a file"):
        ensure(tmp_path, path=".")


@pytest.mark.parametrize("kind", ["path", "url"])
def test_wrong_checksum_gives_both_and_keeps_nothing(disk: Path, tmp_path: Path, cache: Path, kind: str) -> None:
    place = {"path": str(disk), "url": f"file://{disk}"}[kind]
    with pytest.raises(ImageError, match="another checksum") as caught:
        ensure(tmp_path, None, **{kind: place}, sha256="0" * 64)
    assert caught.value.tail == (f"expected sha256 {'0' * 64}", f"found    sha256 {SUM}")
    assert images_in(cache) == []


def test_a_checksum_is_not_case_sensitive(disk: Path, tmp_path: Path) -> None:
    assert ensure(tmp_path, path="disk.img", sha256=SUM.upper()).id == f"mine-{SUM[:12]}"


def test_a_file_url_that_is_missing_returns_error(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.img could not be fetched"):
        ensure(tmp_path, url=f"file://{tmp_path}/nowhere.img", sha256=SUM)
    assert images_in(cache) == []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENTS) + (self.path == "/short")))
        self.end_headers()
        self.wfile.write(CONTENTS)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_url_is_fetched_once(server: str, tmp_path: Path) -> None:
    said: list[str] = []
    image = ensure(tmp_path, said, url=f"{server}/disk", sha256=SUM)
    assert image.disk is not None
    assert image.disk.read_bytes() == CONTENTS
    assert said[0] == f"fetching {server}/disk"
    assert ensure(tmp_path, url="http://127.0.0.1:1/elsewhere", sha256=SUM) == image, "known by its sum"


@pytest.mark.parametrize(("path", "message"), [("/missing", "404"), ("/short", "announced|could not be fetched")])
def test_a_failed_fetch_keeps_nothing(server: str, tmp_path: Path, cache: Path, path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        ensure(tmp_path, url=server + path, sha256=SUM)
    assert images_in(cache) == []


def test_no_connection_returns_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="could not be fetched"):
        ensure(tmp_path, url="http://127.0.0.1:1/disk", sha256=SUM)


def test_too_little_room_is_told_before_the_first_byte(
    disk: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(ImageError, match=r"3 MiB to come, .* only 1 MiB left"):
        ensure(tmp_path, path="disk.img")
    assert images_in(cache) == []


def test_format_is_looked_up(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "8M")
    assert ensure(tmp_path, path="a.qcow2").disk_format == "qcow2"


def test_another_format_than_the_lab_file_says_returns_error(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is of format raw, not qcow2"):
        ensure(tmp_path, path="disk.img", format="qcow2")


def test_a_foreign_format_returns_error_with_the_way_out(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "vmdk", tmp_path / "a.vmdk", "8M")
    with pytest.raises(ImageError, match="is of format vmdk") as caught:
        ensure(tmp_path, path="a.vmdk")
    assert "qemu-img convert" in str(caught.value.hint)


def test_a_compressed_image_returns_error(tmp_path: Path) -> None:
    (tmp_path / "a.img.gz").write_bytes(gzip.compress(CONTENTS))
    with pytest.raises(ImageError, match="is compressed") as caught:
        ensure(tmp_path, path="a.img.gz")
    assert caught.value.hint == "unpack it with gzip first"


@pytest.mark.parametrize("how", ["backing file", "data file"])
def test_an_image_that_reaches_for_another_file_is_refused(tmp_path: Path, cache: Path, how: str) -> None:
    if how == "backing file":
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", tmp_path / "evil", "8M")
    else:
        options = f"data_file={tmp_path}/outside,data_file_raw=on"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, tmp_path / "evil", "8M")
    with pytest.raises(ImageError, match="refers to another file"):
        ensure(tmp_path, path="evil")
    assert images_in(cache) == []


def test_a_file_that_changes_while_it_is_copied_is_refused(
    disk: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = files.receive

    def slow(*args: object) -> str:
        total = plain(*args)  # type: ignore[arg-type]
        disk.write_bytes(b"meanwhile")
        return total

    monkeypatch.setattr(files, "receive", slow)
    with pytest.raises(ImageError, match="changed while it was copied"):
        ensure(tmp_path, path="disk.img")
    assert images_in(cache) == []
