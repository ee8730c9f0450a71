"""What is remembered of a lab, and the lock that lets one command at a time change it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from orchestrator import paths, state
from orchestrator.errors import LockedError, NotFoundError, StateError
from orchestrator.state import LabState, all_labs
from tests.unit.labs import demo, one_guest

pytestmark = pytest.mark.usefixtures("places")


@pytest.fixture
def demo_state() -> LabState:
    return LabState("demo")


def test_lab_is_read_back_as_it_was_saved(demo_state: LabState) -> None:
    lab = demo()
    lab = lab.model_copy(update={"former_hosts": {"gamma": lab.hosts["alpha"]}})

    demo_state.save(lab)

    assert demo_state.load() == lab
    assert demo_state.get() == lab
    assert all_labs() == ["demo"]


def test_lab_that_was_never_up_is_nothing(demo_state: LabState) -> None:
    assert demo_state.load() is None
    assert all_labs() == []
    with pytest.raises(NotFoundError, match="lab demo is not up") as caught:
        demo_state.get()
    assert caught.value.hint == "orchestrator up"


def test_lab_that_is_not_up_is_told_with_those_that_are(demo_state: LabState) -> None:
    LabState("one").save(one_guest())

    with pytest.raises(NotFoundError) as caught:
        demo_state.get()

    assert caught.value.hint == "labs that are: one"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"lab": "demo"}', b'{"nonsense": 1}'])
def test_damaged_state_is_an_error_that_says_what_to_do(demo_state: LabState, content: bytes) -> None:
    demo_state.save(demo())
    (demo_state.folder / "lab.json").write_bytes(content)

    with pytest.raises(StateError, match="damaged or of another version") as caught:
        demo_state.load()

    assert "doctor --clean" in str(caught.value.hint)
    assert len(caught.value.tail) <= 5


def test_state_that_is_not_utf8_is_damaged(demo_state: LabState) -> None:
    demo_state.save(demo())
    (demo_state.folder / "lab.json").write_bytes(b'{"lab": "\xff"}')

    with pytest.raises(StateError, match="damaged or of another version"):
        demo_state.load()


def test_state_that_cannot_be_read_is_an_error(demo_state: LabState) -> None:
    (demo_state.folder / "lab.json").mkdir(parents=True)

    with pytest.raises(StateError, match="Is a directory"):
        demo_state.load()


def test_removed_lab_leaves_nothing(demo_state: LabState) -> None:
    demo_state.save(demo())

    demo_state.remove()

    assert not paths.state().exists()
    assert demo_state.load() is None


def test_removed_lab_leaves_the_others(demo_state: LabState) -> None:
    demo_state.save(demo())
    LabState("one").save(one_guest())

    demo_state.remove()
    demo_state.remove()

    assert all_labs() == ["one"]


def test_save_replaces_the_state_in_one_step(demo_state: LabState, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_state.save(demo())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        demo_state.save(one_guest())

    assert demo_state.get().lab == "demo"
    assert [path.name for path in demo_state.folder.iterdir()] == ["lab.json"]


# -- the SSH key -----------------------------------------------------------------------------------------------------


def test_ssh_key_is_made_once_and_only_its_owner_may_read_it(demo_state: LabState) -> None:
    public = demo_state.public_key()

    assert public == demo_state.public_key()
    assert public.startswith("ssh-ed25519 ")
    assert public.endswith(" orchestrator-demo")
    assert stat.S_IMODE(demo_state.ssh_key.stat().st_mode) == 0o600
    private = load_ssh_private_key(demo_state.ssh_key.read_bytes(), None)
    numbers = private.public_key().public_bytes_raw()  # type: ignore[union-attr]
    assert numbers == load_ssh_public_key(public.encode()).public_bytes_raw()  # type: ignore[union-attr]


def test_labs_have_different_keys(demo_state: LabState) -> None:
    assert demo_state.public_key().split()[1] != LabState("one").public_key().split()[1]


# -- the lock --------------------------------------------------------------------------------------------------------


def test_lock_held_by_another_is_told_with_its_process_and_command(
    demo_state: LabState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["orchestrator", "up", "-f", "my lab.yaml"])

    with demo_state.lock(), pytest.raises(LockedError) as caught, LabState("demo").lock():
        pass

    assert str(caught.value) == (
        f"lab demo is being changed by process {os.getpid()} (orchestrator up -f 'my lab.yaml')"
    )


def test_lock_of_another_lab_is_another_lock(demo_state: LabState) -> None:
    with demo_state.lock(), LabState("one").lock():
        assert sorted(path.name for path in paths.runtime().iterdir()) == ["demo.lock", "one.lock"]


@pytest.mark.parametrize("failure", [None, RuntimeError])
def test_released_lock_can_be_taken_again_and_leaves_nothing(
    demo_state: LabState, failure: type[Exception] | None
) -> None:
    def hold() -> None:
        with demo_state.lock():
            if failure:
                raise failure

    for _ in range(2):
        if failure:
            with pytest.raises(failure):
                hold()
        else:
            hold()

    assert not paths.runtime().exists()


def test_lock_of_a_killed_command_is_free(demo_state: LabState) -> None:
    script = "import os; from orchestrator.state import LabState\nwith LabState('demo').lock(): os._exit(1)"
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == 1
    assert (paths.runtime() / "demo.lock").exists()

    with demo_state.lock():
        assert str(os.getpid()) in (paths.runtime() / "demo.lock").read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\x00"])
def test_lock_that_does_not_say_whose_it_is_is_held_all_the_same(demo_state: LabState, content: str) -> None:
    with demo_state.lock():
        (paths.runtime() / "demo.lock").write_text(content)

        with pytest.raises(LockedError, match="is being changed by another command"), demo_state.lock():
            pass


def test_lock_taken_while_the_last_holder_releases_it_excludes_others(
    demo_state: LabState, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, released = fcntl.flock, []

    def flock_after_release(fd: int, mode: int) -> None:
        if not released:  # between our open() and flock() the last holder unlinks its file
            released.append((paths.runtime() / "demo.lock").unlink())
        flock(fd, mode)

    monkeypatch.setattr(state.fcntl, "flock", flock_after_release)

    with demo_state.lock(), pytest.raises(LockedError), LabState("demo").lock():
        pass


# -- files -----------------------------------------------------------------------------------------------------------


def test_made_folders_can_be_entered_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = paths.make_dir(tmp_path / "a" / "b")
    finally:
        os.umask(before)

    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (made, made.parent)] == [0o755, 0o755]


@pytest.mark.parametrize("variable", paths.VARIABLES)
def test_places_follow_their_variables(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "~/elsewhere")
    monkeypatch.setenv("HOME", "/home/me")
    place = {"ORCHESTRATOR_STATE": paths.state, "ORCHESTRATOR_CACHE": paths.cache, "ORCHESTRATOR_RUN": paths.runtime}

    assert place[variable]() == Path("/home/me/elsewhere")


def test_places_of_a_user_are_the_xdg_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*paths.VARIABLES, "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert paths.state() == Path("/home/me/.local/state/orchestrator")
    assert paths.cache() == Path("/fast/orchestrator")
