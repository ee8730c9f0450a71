"""The gateway to other programs: what it returns, and how it tells failures apart."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import CommandError
from orchestrator.run import describe_exit, run, shell_line, spawn, tail_of

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_run_returns_both_outputs() -> None:
    done = run(sh("echo out; echo err >&2"))

    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 0)


def test_run_feeds_standard_input() -> None:
    assert run(["cat"], feed=b"\x00food").stdout == b"\x00food"


def test_run_gives_no_standard_input_of_ours() -> None:
    assert run(["cat"]).stdout == b""


def test_run_adds_variables_and_keeps_the_others() -> None:
    done = run(sh('echo "$ADDED"; [ -n "$PATH" ]'), env={"ADDED": "yes"})

    assert done.stdout == b"yes\n"


def test_run_works_in_a_folder(tmp_path: Path) -> None:
    assert run(["pwd"], cwd=tmp_path).stdout.decode().strip() == str(tmp_path)


def test_run_without_check_returns_failures() -> None:
    assert run(sh("exit 3"), check=False).returncode == 3


def test_failure_carries_status_command_and_tail() -> None:
    with pytest.raises(CommandError) as caught:
        run(sh("for i in $(seq 30); do echo line $i >&2; done; exit 3"), hint="mend it", env={"A": "b c"})

    error = caught.value
    assert error.message == "sh failed with exit status 3"
    assert error.command == "A='b c' sh -c 'for i in $(seq 30); do echo line $i >&2; done; exit 3'"
    assert error.tail == tuple(f"line {number}" for number in range(16, 31))
    assert error.hint == "mend it"


def test_failure_that_wrote_to_standard_output_only_has_that_as_its_tail() -> None:
    with pytest.raises(CommandError) as caught:
        run(sh("echo why; exit 1"))

    assert caught.value.tail == ("why",)


def test_signal_is_told_by_name() -> None:
    with pytest.raises(CommandError, match="sh was ended by SIGKILL"):
        run(sh("kill -KILL $$"))


def test_program_that_is_not_there_is_told_apart() -> None:
    with pytest.raises(CommandError, match="nonsense-program: not found") as caught:
        run(["nonsense-program", "a b"])

    assert caught.value.command == "nonsense-program 'a b'"
    assert caught.value.hint == "install nonsense-program"


def test_program_that_is_not_there_keeps_the_callers_hint() -> None:
    with pytest.raises(CommandError) as caught:
        run(["nonsense-program"], hint="apt install sense")

    assert caught.value.hint == "apt install sense"


def test_folder_that_is_not_there_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="gone: no such folder"):
        run(["true"], cwd=tmp_path / "gone")


def test_program_that_may_not_be_run_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text("no program")
    file.chmod(0o644)

    with pytest.raises(CommandError, match="data: permission denied"):
        run([file])


@pytest.mark.parametrize("name", ["program", "program/inside"])
def test_file_that_is_no_program_is_told_apart(name: str, tmp_path: Path) -> None:
    file = tmp_path / "program"
    file.write_bytes(b"\x01\x02")
    file.chmod(0o755)

    with pytest.raises(CommandError, match="program"):
        run([tmp_path / name])


def test_time_out_ends_the_program_and_keeps_what_it_said() -> None:
    began = time.monotonic()

    with pytest.raises(CommandError, match="sh did not end within 1 s") as caught:
        run(sh("echo waiting >&2; sleep 60 & wait"), timeout=1)

    assert caught.value.tail == ("waiting",)
    assert time.monotonic() - began < 30


def test_spawn_returns_at_once_with_a_session_of_its_own_when_detached() -> None:
    process = spawn(["sleep", "60"], detach=True)
    try:
        assert process.poll() is None
        assert os.getsid(process.pid) == process.pid
        assert Path(f"/proc/{process.pid}/cwd").readlink() == Path("/")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_spawn_passes_the_descriptors_that_it_is_given() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as ours:
        process = spawn(sh(f"echo through > /proc/self/fd/{write}"), pass_fds=[write])
        os.close(write)
        assert ours.read() == b"through\n"
        assert process.wait() == 0


def test_spawn_of_what_is_not_there_is_an_error() -> None:
    with pytest.raises(CommandError, match="nonsense-program: not found"):
        spawn(["nonsense-program"])


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_shell_line_can_be_pasted(words: list[str]) -> None:
    assert shlex.split(shell_line(words)) == words


def test_shell_line_has_variables_and_folder(tmp_path: Path) -> None:
    line = shell_line(["printenv", "A"], {"A": "it's"}, tmp_path)

    done = subprocess.run(["sh", "-c", line], capture_output=True, check=True)

    assert done.stdout == b"it's\n"


@pytest.mark.parametrize(
    ("code", "text"),
    [(1, "failed with exit status 1"), (-15, "was ended by SIGTERM"), (-99, "was ended by signal 99")],
)
def test_exit_is_described(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_tail_has_the_last_lines_that_are_not_empty() -> None:
    assert tail_of("a\n\n  \nb \nc\n", lines=2) == ["b", "c"]
    assert tail_of(b"\xff\n", lines=2) == ["\N{REPLACEMENT CHARACTER}"]
    assert tail_of("") == []
