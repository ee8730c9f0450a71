"""The agent as a process: found, started, ended. The agent here is a program that only sleeps."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator import paths
from orchestrator.errors import HostError
from orchestrator.hosts import agentproc
from orchestrator.hosts.agentproc import (
    AgentPlace,
    Owner,
    answers,
    connect,
    end_process,
    read_owner,
    start_time,
    stop,
)

SLEEPS = ["sh", "-c", "exec sleep 60", "agent"]  # what would be the agent's command line are its arguments
STUBBORN = ["sh", "-c", "trap '' TERM; while :; do sleep 60 & wait; done", "agent"]
DIES = ["sh", "-c", "echo no libvirt here >&2; exit 1", "agent"]

# A detached agent outlives the object that started it, which Python takes for an oversight.
pytestmark = [pytest.mark.usefixtures("places"), pytest.mark.filterwarnings("ignore:.*:ResourceWarning")]


@pytest.fixture
def place(places: Path) -> Iterator[AgentPlace]:
    made = AgentPlace.of("demo", "0123abcd", "alpha", "embed")
    yield made
    if (owner := read_owner(made.run_dir)) and owner.alive:
        os.killpg(owner.pid, signal.SIGKILL)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen(["sleep", "60"])
    yield made
    made.kill()
    made.wait()


def start(place: AgentPlace, command: list[str] | None = None) -> Owner:
    agentproc.start(place, prefix=command or SLEEPS)
    owner = read_owner(place.run_dir)
    assert owner is not None
    return owner


def environment_of(pid: int) -> list[bytes]:
    """A process that was just started is seen for a moment without any."""
    for _ in range(1000):
        if text := Path(f"/proc/{pid}/environ").read_bytes():
            return text.split(b"\0")
        time.sleep(0.01)
    raise AssertionError(f"process {pid} has no environment")


def wait_for_end(pid: int) -> None:
    """Until the process has ended; it stays a zombie unless somebody reaps it."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def refusal(place: AgentPlace) -> HostError:
    """Why nobody answers. Whoever looks through /proc may hold a socket a little longer than its process does."""
    for _ in range(1000):
        try:
            connect(place).close()
        except HostError as error:
            return error
        time.sleep(0.01)
    raise AssertionError(f"somebody answers at {place.socket}")


# -- who is it -------------------------------------------------------------------------------------------------------


def test_start_time_tells_processes_apart(process: subprocess.Popen[bytes]) -> None:
    assert start_time(process.pid) == start_time(process.pid)
    assert str(start_time(os.getpid())).isdigit()


def test_start_time_of_a_process_with_a_hostile_name(tmp_path: Path) -> None:
    program = tmp_path / ") 1 2 S (x"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        assert str(start_time(process.pid)).isdigit()
    finally:
        process.kill()
        process.wait()


def test_no_process_and_a_zombie_have_no_start_time(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    wait_for_end(process.pid)
    zombie = start_time(process.pid)
    process.wait()

    assert zombie is None
    assert start_time(process.pid) is None


def test_owner_is_alive_only_with_its_own_start_time(process: subprocess.Popen[bytes]) -> None:
    owner = Owner("0123abcd", "demo", "alpha", process.pid, start_time(process.pid) or "")

    assert owner.alive
    assert not replace(owner, start="1").alive
    assert not replace(owner, start="").alive


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"1", b'{"pid": 1}', b"\xff", b'{"nonsense": 1}'])
def test_damaged_owner_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_bytes(content)

    assert read_owner(tmp_path) is None


def test_owner_is_read_back(tmp_path: Path) -> None:
    owner = Owner("0123abcd", "demo", "alpha", 7, "99")
    (tmp_path / "owner.json").write_text(json.dumps(asdict(owner)))

    assert read_owner(tmp_path) == owner
    assert read_owner(tmp_path / "gone") is None


def test_arguments_are_those_that_the_agent_takes(place: AgentPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.agent.__main__ import _arguments

    monkeypatch.setattr("sys.argv", ["agent", *place.arguments(), "--fd=3"])

    got = vars(_arguments())

    assert {key: str(value) for key, value in got.items() if key in asdict(place)} == {
        key: str(value) for key, value in asdict(place).items()
    }
    assert got["fd"] == 3


# -- starting --------------------------------------------------------------------------------------------------------


def test_started_agent_is_reached_at_once(place: AgentPlace) -> None:
    owner = start(place)

    connect(place).close()

    assert answers(place)
    assert (owner.lab, owner.uid, owner.host) == ("demo", "0123abcd", "alpha")
    assert place.socket.stat().st_mode & 0o777 == 0o600


def test_agent_that_runs_is_not_started_again(place: AgentPlace) -> None:
    first = start(place)

    assert start(place) == first


def test_agent_that_died_is_started_again(place: AgentPlace) -> None:
    first = start(place)
    os.kill(first.pid, signal.SIGKILL)
    wait_for_end(first.pid)
    assert not answers(place)

    second = start(place)

    assert second.pid != first.pid
    assert answers(place)


def test_agent_that_lives_but_does_not_answer_is_replaced(place: AgentPlace) -> None:
    first = start(place)
    place.socket.unlink()
    assert not answers(place)

    second = start(place)

    assert not first.alive
    assert second.alive
    assert answers(place)


def test_agent_gets_its_place_and_the_folders_of_the_caller(place: AgentPlace) -> None:
    owner = start(place)

    words = environment_of(owner.pid)
    parent = Path(f"/proc/{owner.pid}/cwd").readlink()

    assert f"ORCHESTRATOR_STATE={paths.state()}".encode() in words
    assert f"ORCHESTRATOR_CACHE={paths.cache()}".encode() in words
    assert parent == Path("/")
    assert os.getsid(owner.pid) == owner.pid


def test_agent_that_ends_at_once_is_told_with_the_end_of_its_log(place: AgentPlace) -> None:
    owner = start(place, DIES)
    wait_for_end(owner.pid)

    error = refusal(place)

    assert "alpha: no agent answers" in str(error)
    assert error.tail == ("no libvirt here",)
    assert not answers(place)


def test_agent_that_was_never_started_does_not_answer(place: AgentPlace) -> None:
    assert not answers(place)
    with pytest.raises(HostError, match="No such file") as caught:
        connect(place)
    assert caught.value.hint == "`orchestrator up` starts it"


# -- ending ----------------------------------------------------------------------------------------------------------


def test_stopped_agent_leaves_its_state_but_no_runtime_folder(place: AgentPlace) -> None:
    owner = start(place)

    stop(place)

    assert not owner.alive
    assert not paths.runtime().exists()
    assert place.log.exists()


def test_stopping_what_does_not_run_does_nothing(place: AgentPlace) -> None:
    stop(place)

    assert not paths.runtime().exists()


def test_stop_leaves_the_runtime_folders_of_others(place: AgentPlace) -> None:
    other = AgentPlace.of("demo", "0123abcd", "beta", "embed")
    start(place)
    paths.make_dir(other.run_dir)

    stop(place)

    assert [path.name for path in paths.runtime().iterdir()] == [other.run_dir.name]


def test_process_that_ignores_sigterm_is_killed(place: AgentPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentproc, "END_SECONDS", 0.3)
    owner = start(place, STUBBORN)

    end_process(owner.pid, owner.start, "the agent")

    assert not owner.alive


def test_process_of_the_same_number_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    end_process(process.pid, "1", "the agent")

    assert process.poll() is None


def test_process_that_is_gone_is_ended(process: subprocess.Popen[bytes]) -> None:
    began = start_time(process.pid)
    process.kill()
    process.wait()

    end_process(process.pid, str(began), "the agent")

    assert start_time(process.pid) is None


def test_process_that_does_not_end_is_an_error(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentproc, "END_SECONDS", 0.01)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)

    with pytest.raises(HostError, match=rf"the agent \(pid {process.pid}\) does not end") as caught:
        end_process(process.pid, str(start_time(process.pid)), "the agent")

    assert caught.value.hint == f"cat /proc/{process.pid}/stack"
