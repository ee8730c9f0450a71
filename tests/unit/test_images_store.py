"""The cache of images: built once, whole or not at all, and cleaned up."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import CommandError, ImageError
from orchestrator.images import store
from orchestrator.images.recipe import Built, Progress, Recipe
from orchestrator.images.store import Image


class Kitchen:
    """A built-in image ``toy`` that is quick to make; a test changes how it is made."""

    def __init__(self) -> None:
        self.source = "recipe 1"
        self.digest = "a1" * 6
        self.built = 0
        self.error: BaseException | None = None
        self.go_on = threading.Event()
        self.go_on.set()

    def recipe(self) -> Recipe:
        return Recipe(self.source, self.build)

    def build(self, folder: Path, progress: Progress) -> Built:
        self.built += 1
        progress("cooking")
        (folder / "kernel").write_bytes(b"kernel")
        assert self.go_on.wait(10)
        if self.error:
            raise self.error
        return Built(self.digest, kernel="kernel", cmdline="quiet", ready="agent")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def kitchen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Kitchen:
    made = Kitchen()
    monkeypatch.setitem(store.BUILT_IN, "toy", made.recipe)
    return made


def ensure(said: list[str] | None = None, *, refresh: bool = False) -> Image:
    said = [] if said is None else said
    return store.ensure("toy", None, base=Path("/"), progress=said.append, refresh=refresh)


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith(".lock-"))


def test_ensure_builds_once_and_finds_it_later(kitchen: Kitchen, cache: Path) -> None:
    assert store.find("toy", None, Path("/")) is None
    said: list[str] = []
    image = ensure(said)
    assert image.id == "toy-a1a1a1a1a1a1"
    assert image.kernel == cache / image.id / "kernel"
    assert (image.cmdline, image.ready, image.disk) == ("quiet", "agent", None)
    assert image.size >= 6
    assert said[0] == "cooking"
    again: list[str] = []
    assert ensure(again) == image == store.find("toy", None, Path("/"))
    assert (kitchen.built, again) == (1, [])
    assert store.all_images() == [image]


def test_an_image_can_be_read_by_everybody(kitchen: Kitchen, cache: Path) -> None:
    old = os.umask(0o077)
    try:
        image = ensure()
    finally:
        os.umask(old)
    assert image.kernel is not None
    assert image.kernel.stat().st_mode & 0o777 == 0o644
    assert (image.folder / store.MANIFEST).stat().st_mode & 0o777 == 0o644
    assert {folder.stat().st_mode & 0o777 for folder in (image.folder, cache, cache.parent)} == {0o755}


def test_json_keeps_every_field(kitchen: Kitchen) -> None:
    image = ensure()
    assert Image.from_json(json.loads(json.dumps(image.to_json()))) == image


def test_a_manifest_with_paths_of_another_machine_is_read_by_its_own_folder(kitchen: Kitchen, cache: Path) -> None:
    image = ensure()
    data = image.to_json() | {"kernel": "/elsewhere/kernel"}
    (image.folder / store.MANIFEST).write_text(json.dumps(data))
    assert store.all_images() == [image]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CommandError("cook failed", command="cook", tail=["burnt"]), "image toy could not be made: cook failed"),
        (ImageError("no kernel"), "no kernel"),
        (PermissionError(errno.EACCES, "Permission denied"), "image toy could not be made: .*Permission denied"),
    ],
)
def test_a_failed_build_leaves_nothing(kitchen: Kitchen, cache: Path, error: Exception, expected: str) -> None:
    kitchen.error = error
    with pytest.raises(ImageError, match=expected) as caught:
        ensure()
    assert visible(cache) == []
    if isinstance(error, CommandError):
        assert (caught.value.command, caught.value.tail) == ("cook", ("burnt",))
    kitchen.error = None
    assert ensure().id == "toy-a1a1a1a1a1a1"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        CommandError(
            "dpkg-deb failed with exit status 2", tail=["tar: lib/x: No space left on device", "error exit"]
        ),
        CommandError("apt-get failed with exit status 100", tail=["You don't have enough free space in /x"]),
    ],
)
def test_a_full_disk_is_told_in_plain_words(kitchen: Kitchen, cache: Path, error: Exception) -> None:
    kitchen.error = error
    with pytest.raises(ImageError, match=f"no space left in {cache}") as caught:
        ensure()
    assert "ORCHESTRATOR_CACHE" in str(caught.value.hint)
    assert visible(cache) == []


def test_an_interrupted_build_leaves_nothing(kitchen: Kitchen, cache: Path) -> None:
    kitchen.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ensure()
    assert visible(cache) == []


def test_a_new_recipe_makes_a_new_image_and_keeps_the_old(kitchen: Kitchen) -> None:
    old = ensure()
    kitchen.source, kitchen.digest = "recipe 2", "b2" * 6
    new = ensure()
    assert new.id != old.id
    assert {image.id for image in store.all_images()} == {old.id, new.id}
    assert store.find("toy", None, Path("/")) == new


def test_refresh_with_other_contents_keeps_the_old_image(kitchen: Kitchen) -> None:
    old = ensure()
    time.sleep(1.1)  # `created` counts seconds
    kitchen.digest = "b2" * 6
    new = ensure(refresh=True)
    assert new.id == "toy-b2b2b2b2b2b2"
    assert ensure() == new
    assert old.kernel is not None
    assert old.kernel.exists()


def test_refresh_with_the_same_contents_does_not_touch_the_files(kitchen: Kitchen, cache: Path) -> None:
    old = ensure()
    assert old.kernel is not None
    inode = old.kernel.stat().st_ino
    new = ensure(refresh=True)
    assert (new.id, kitchen.built) == (old.id, 2)
    assert old.kernel.stat().st_ino == inode
    assert visible(cache) == [old.id]


@pytest.mark.parametrize("damage", ["{", '{"id": "toy"}', "[]"])
def test_a_damaged_image_is_made_again(kitchen: Kitchen, cache: Path, damage: str) -> None:
    image = ensure()
    (image.folder / store.MANIFEST).write_text(damage)
    assert store.all_images() == []
    assert ensure().id == image.id
    assert kitchen.built == 2
    assert visible(cache) == [image.id]


def test_an_image_that_lost_a_file_is_made_again(kitchen: Kitchen) -> None:
    image = ensure()
    assert image.kernel is not None
    image.kernel.unlink()
    assert ensure().kernel == image.kernel
    assert image.kernel.read_bytes() == b"kernel"


def test_the_second_builder_waits_says_so_and_uses_the_result(kitchen: Kitchen) -> None:
    kitchen.go_on.clear()
    said: list[list[str]] = [[], []]
    images: list[Image] = []
    threads = [threading.Thread(target=lambda n=n: images.append(ensure(said[n]))) for n in range(2)]
    threads[0].start()
    until(lambda: "cooking" in said[0])
    threads[1].start()
    until(lambda: bool(said[1]))
    assert said[1] == ["waiting for another build of toy"]
    kitchen.go_on.set()
    for thread in threads:
        thread.join(10)
    assert kitchen.built == 1
    assert images[0] == images[1]


def test_what_a_killed_build_left_is_removed_by_the_next(kitchen: Kitchen, cache: Path) -> None:
    left = cache / ".build-toy" / "work"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"x")
    image = ensure()
    assert visible(cache) == [image.id]


def test_prune_removes_leftovers_but_not_a_build_that_runs(kitchen: Kitchen, cache: Path) -> None:
    (cache / ".build-dead").mkdir(parents=True)
    (cache / "damaged-0123456789ab").mkdir()
    kitchen.go_on.clear()
    said: list[str] = []
    thread = threading.Thread(target=ensure, args=(said,))
    thread.start()
    until(lambda: "cooking" in said)
    assert store.prune(set()) == []
    assert visible(cache) == [".build-toy"]
    kitchen.go_on.set()
    thread.join(10)
    assert len(store.all_images()) == 1


@pytest.fixture
def three(kitchen: Kitchen) -> list[Image]:
    images = []
    for number in range(3):
        kitchen.source, kitchen.digest = f"recipe {number}", f"{number}" * 12
        images.append(ensure())
    return images


def test_prune_keeps_what_is_in_use(three: list[Image]) -> None:
    assert {image.id for image in store.prune({three[1].id})} == {three[0].id, three[2].id}
    assert store.all_images() == [three[1]]


def test_prune_keeps_what_was_used_lately(three: list[Image], kitchen: Kitchen) -> None:
    for image in three:
        os.utime(image.folder / store.MANIFEST, (0, 0))
    kitchen.source = "recipe 2"
    ensure()
    assert {image.id for image in store.prune(set(), older_than=3600)} == {three[0].id, three[1].id}
    assert store.prune(set(), older_than=3600) == []


def test_remove_twice_is_no_error(three: list[Image], cache: Path) -> None:
    store.remove(three[0])
    store.remove(three[0])
    assert visible(cache) == sorted(image.id for image in three[1:])


def test_nothing_in_the_cache_yet(cache: Path) -> None:
    assert store.all_images() == []
    assert store.prune(set()) == []


def test_unknown_name_returns_error(cache: Path) -> None:
    with pytest.raises(ImageError, match="no image called fedora") as caught:
        store.find("fedora", None, Path("/"))
    assert "tiny or debian" in str(caught.value.hint)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)
