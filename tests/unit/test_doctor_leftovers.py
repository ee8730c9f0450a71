"""What is a left-over and what is none: folders and processes, with no privileges."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import names, paths
from orchestrator.doctor import Leftover, clean, leftover
from orchestrator.hosts.agentproc import start_time
from orchestrator.state import LabState

FOREIGN = secrets.token_hex(4)
SLEEP = ["-c", "import time; time.sleep(600)"]

Start = Callable[..., str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State and runtime folders of its own, and no links, namespaces or machines."""
    monkeypatch.setenv("ORCHESTRATOR_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("ORCHESTRATOR_RUN", str(tmp_path / "run"))
    monkeypatch.setattr(leftover, "NETNS", tmp_path / "netns")
    monkeypatch.setattr(leftover, "_links", lambda: [])
    monkeypatch.setattr(leftover, "_machines", lambda: [])
    return tmp_path


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that sleeps, with a command line; its left-over's name."""
    processes = []

    def run(*words: str) -> str:
        process = subprocess.Popen([words[0], *SLEEP, *words[1:]], executable=sys.executable)
        processes.append(process)
        wanted = "\0".join(words[1:]).encode()
        while wanted not in Path(f"/proc/{process.pid}/cmdline").read_bytes():  # until it has called exec
            assert process.poll() is None
        return f"{process.pid}:{start_time(process.pid)}"

    yield run
    for process in processes:
        process.kill()
        process.wait()


def gone(name: str) -> bool:
    """The process has ended; it stays a zombie until its parent waits for it."""
    stat = Path(f"/proc/{name.partition(':')[0]}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "Z"


def keep_lab(lab: str, uid: str | None = None) -> Path:
    folder = paths.make_dir(paths.state() / "labs" / lab)
    (folder / "lab.json").write_text(json.dumps({"uid": uid or names.lab_uid(lab), "lab": lab}))
    return folder


def make_runtime(lab: str, uid: str, host: str = "one", agent: str = "1:0") -> Path:
    folder = paths.make_dir(names.runtime_dir(uid, host))
    pid, _, begin = agent.partition(":")
    owner = {"uid": uid, "lab": lab, "host": host, "pid": int(pid), "start": begin}
    (folder / "owner.json").write_text(json.dumps(owner))
    (folder / "agent.sock").touch()
    return folder


def agent_line(lab: str, uid: str, state: Path) -> list[str]:
    return ["python", leftover.AGENT, f"--lab={lab}", f"--uid={uid}", f"--state-dir={state}"]


def leftovers() -> list[Leftover]:
    """Those that a test made: processes of others, who may be testing too, can be seen from here."""
    uids = {FOREIGN, *map(names.lab_uid, ("dead", "down", "crashed", "back", "odd"))}
    return [one for one in leftover.leftovers() if one.uid in uids]


def found() -> set[tuple[str, str]]:
    return {(one.kind, one.name) for one in leftovers()}


# -- what is one -----------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_there_is_nothing() -> None:
    assert leftovers() == []
    assert clean([]) == []


def test_a_runtime_folder_of_a_lab_without_state_is_removed() -> None:
    uid = names.lab_uid("dead")
    folder = make_runtime("dead", uid)

    (item,) = leftovers()

    assert item == Leftover("runtime", str(folder), "dead", uid, "")
    assert item.why == "its lab has no state folder any more"
    assert clean([item]) == [f"runtime {folder}: removed"]
    assert not folder.exists()


def test_a_dead_agents_folder_is_one_even_of_a_known_lab() -> None:
    keep_lab("down")
    folder = make_runtime("down", names.lab_uid("down"))

    (item,) = leftovers()

    assert (item.name, item.why) == (str(folder), "its agent is dead, and it has neither a QEMU nor a namespace")


def test_processes_of_a_lab_without_state_are_ended(start: Start, place: Path) -> None:
    uid = names.lab_uid("dead")
    agent = start(*agent_line("dead", uid, place / "state" / "labs" / "dead" / "hosts" / "one"))
    folder = make_runtime("dead", uid, agent=agent)
    qemu = start("/usr/bin/qemu-system-x86_64", "-chardev", f"socket,path={folder}/lib/monitor.sock,server=on")

    items = leftovers()
    lines = clean(items)

    assert {item.name for item in items} == {agent, qemu, str(folder)}
    assert [item.kind for item in items] == ["process", "process", "runtime"]
    assert all(line.endswith(": removed") for line in lines)
    assert gone(agent)
    assert gone(qemu)
    assert not folder.exists()


def test_an_agent_whose_state_folder_is_gone_condemns_its_lab_wherever_that_was(start: Start, place: Path) -> None:
    agent = start(*agent_line("elsewhere", FOREIGN, place / "gone"))
    folder = make_runtime("elsewhere", FOREIGN, agent=agent)
    qemu = start("qemu-system-x86_64", f"-S={folder}/x")

    assert found() == {("process", agent), ("process", qemu), ("runtime", str(folder))}


def test_a_foreign_folder_is_one_when_nothing_of_its_lab_lives() -> None:
    folder = make_runtime("elsewhere", FOREIGN)

    assert found() == {("runtime", str(folder))}


# -- what is none ----------------------------------------------------------------------------------------------------


def test_a_lab_that_is_down_is_none() -> None:
    keep_lab("down")
    paths.make_dir(paths.state() / "labs" / "remote" / "hosts" / "one")

    assert leftovers() == []


def test_a_living_lab_is_none(start: Start) -> None:
    state = keep_lab("alive", uid=FOREIGN)
    agent = start(*agent_line("alive", FOREIGN, state))
    folder = make_runtime("alive", FOREIGN, agent=agent)
    start("qemu-system-x86_64", f"-S={folder}/x")

    assert leftovers() == []


def test_a_known_lab_with_a_living_qemu_keeps_its_folder(start: Start) -> None:
    keep_lab("crashed")
    folder = make_runtime("crashed", names.lab_uid("crashed"))
    start("qemu-system-x86_64", f"-S={folder}/x")

    assert leftovers() == []


def test_a_known_lab_with_a_namespace_keeps_its_folder(place: Path) -> None:
    keep_lab("crashed")
    make_runtime("crashed", names.lab_uid("crashed"))
    paths.make_dir(place / "netns")
    (place / "netns" / "orc.crashed.one").touch()

    assert leftovers() == []


def test_a_living_lab_of_another_state_folder_is_none(start: Start, place: Path) -> None:
    agent = start(*agent_line("elsewhere", FOREIGN, paths.make_dir(place / "other" / "state")))
    make_runtime("elsewhere", FOREIGN, agent=agent)
    make_runtime("elsewhere", FOREIGN, host="two")

    assert leftovers() == []


def test_a_qemu_of_another_state_folder_is_none(start: Start) -> None:
    folder = make_runtime("elsewhere", FOREIGN)
    start("qemu-system-x86_64", f"-S={folder}/x")

    assert leftovers() == []


def test_what_is_not_marked_is_never_touched(start: Start) -> None:
    uid = names.lab_uid("dead")
    folder = make_runtime("dead", uid)
    editor = start("vim", f"{folder}/owner.json")
    other_qemu = start("qemu-system-x86_64", f"-S=/elsewhere{folder}/x", f"-S={folder}0/x", f"-S={paths.runtime()}/x")
    talker = start("grep", "-r", f"{leftover.AGENT} --lab=dead --uid={uid}")
    unowned = paths.make_dir(paths.runtime() / "12345678")
    copied = paths.make_dir(paths.runtime() / "87654321")
    (copied / "owner.json").write_text((folder / "owner.json").read_text())
    damaged = paths.make_dir(paths.runtime() / "11111111")
    (damaged / "owner.json").write_text('{"uid": 1')
    (paths.runtime() / "22222222").symlink_to(folder)

    assert found() == {("runtime", str(folder))}
    clean(leftovers())

    assert not folder.exists()
    assert unowned.is_dir()
    assert copied.is_dir()
    assert damaged.is_dir()
    assert not any(map(gone, (editor, other_qemu, talker)))


# -- care ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"lab": "x"}'])
def test_a_state_folder_that_cannot_be_read_is_told_and_kept(content: str | None) -> None:
    folder = paths.make_dir(paths.state() / "labs" / "odd")
    if content is not None:
        (folder / "lab.json").write_text(content)
    make_runtime("odd", FOREIGN, agent=f"{1}:{start_time(1)}")  # lab.json is all that could tell whose this is

    (item,) = leftovers()
    (line,) = clean([item])

    assert (item.kind, item.name, item.lab) == ("state", str(folder), "odd")
    assert "left alone" in line
    assert folder.is_dir()


def test_what_came_back_to_life_is_left_alone() -> None:
    folder = make_runtime("back", names.lab_uid("back"))
    items = leftovers()
    keep_lab("back")
    make_runtime("back", names.lab_uid("back"), agent=f"1:{start_time(1)}")

    assert clean(items) == [f"runtime {folder}: left alone, because it is no left-over any more"]
    assert folder.exists()


def test_a_lab_that_is_being_changed_is_left_alone() -> None:
    folder = make_runtime("dead", names.lab_uid("dead"))

    with LabState("dead").lock():
        (line,) = clean(leftovers())

    assert line.startswith(f"runtime {folder}: left alone: lab dead is being changed by process")
    assert folder.exists()


def test_another_process_of_the_same_number_is_left_alone(start: Start, place: Path) -> None:
    agent = start(*agent_line("dead", names.lab_uid("dead"), place / "gone"))
    (item,) = leftovers()
    earlier = Leftover("process", agent.partition(":")[0] + ":1", item.lab, item.uid, item.why)

    assert "left alone" in clean([earlier])[0]
    assert not gone(agent)


def test_a_folder_with_a_mount_is_not_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_runtime("dead", names.lab_uid("dead"))
    monkeypatch.setattr(leftover, "_mounts", lambda: [Path("/"), folder / "lib"])

    (line,) = clean(leftovers())

    assert line == f"runtime {folder}: cannot be removed: {folder}/lib is mounted there"
    assert (folder / "agent.sock").exists()


def test_what_a_link_in_the_folder_points_to_stays(place: Path) -> None:
    folder = make_runtime("dead", names.lab_uid("dead"))
    shared = paths.make_dir(place / "shared")
    (shared / "file").touch()
    (folder / "shared").symlink_to(shared)

    clean(leftovers())

    assert not folder.exists()
    assert (shared / "file").exists()


def test_the_probe_lists_what_was_found() -> None:
    make_runtime("dead", names.lab_uid("dead"))

    finding = leftover.probe()

    assert finding.ok is False
    assert "(lab dead)" in finding.detail[0]
    assert "--clean" in str(finding.fix)
