"""The command line: help, options and their variables, exit codes; and its commands on hosts in memory."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from orchestrator import __version__
from orchestrator.cli import app as cli_app
from orchestrator.cli import output, session, tools
from orchestrator.cli.session import complete_guests, complete_labs
from orchestrator.errors import GuestError, HostError
from orchestrator.hosts.transport import HostFacts
from orchestrator.images import store
from orchestrator.images.store import Image
from orchestrator.state import LabState
from orchestrator.testing import MemoryLab, image_id
from tests.unit.labs import EXAMPLES, demo, one_guest

SOON = 10.0  # seconds; no test waits that long unless it fails

ENV_VAR = re.compile(r"\[env var: (\w+)\]")


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below ``group``, with the words that lead to it."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


cli_app._register()
COMMANDS = dict(commands(typer.main.get_command(cli_app.app)))


def options() -> list[Any]:
    """``(command, long option)`` of every option, but for those that end the command at once."""
    found = []
    for path, command in COMMANDS.items():
        for parameter in command.params:
            long = [word for word in parameter.opts if word.startswith("--")]
            if not long or long[0] in ("--help", "--version", "--install-completion", "--show-completion"):
                continue
            case = (" ".join(path), long[0])
            found.append(pytest.param(*case, id=" ".join(case)))
    return found


@dataclass
class Result:
    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in an empty folder, with state and cache of its own, and expect a status."""
    folder = places / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli_app, "_register", lambda: None)  # done above; once is enough
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(output.stderr, "quiet", False)

    def run(*words: str, status: int = 0) -> Result:
        monkeypatch.setattr(sys, "argv", ["orchestrator", *words])
        with pytest.raises(SystemExit) as ended:
            cli_app.main()
        captured = capsys.readouterr()
        code = ended.value.code if isinstance(ended.value.code, int) else 0 if ended.value.code is None else 1
        assert code == status, f"{words}: {code}\n{captured.out}\n{captured.err}"
        return Result(code, captured.out, captured.err)

    return run


def write_lab(data: Mapping[str, Any] | None = None, file: str = "lab.yaml", **changes: Any) -> Path:
    """The example, or ``data``, as a lab file in the current folder."""
    if data is None:
        data = YAML(typ="safe", pure=True).load((EXAMPLES / "demo.yaml").read_text())
    Path(file).write_text(json.dumps({**data, **changes}))
    return Path(file)


# -- help and usage --------------------------------------------------------------------------------------------------


def test_commands_are_those_that_are_documented() -> None:
    assert {" ".join(path) for path in COMMANDS if path} == {
        "plan", "up", "down", "status", "inspect", "reach", "graph", "inventory", "ssh-config",
        "console", "exec", "ssh", "connect", "logs", "events", "pause", "resume", "start", "stop", "restart",
        "migrate", "guest", "guest migrate",
        "snapshot", "snapshot save", "snapshot restore", "snapshot list", "snapshot delete",
        "image", "image list", "image build", "image prune", "box", "box list", "box build", "box prune",
        "host", "host list", "host facts", "host doctor", "host provision", "host snapshot", "host snapshot save",
        "host snapshot restore", "host snapshot list", "host snapshot delete", "doctor", "schema",
        "switch", "switch show", "switch ports", "switch stats", "switch trace", "switch capture",
    }  # fmt: skip


@functools.cache
def help_of(path: tuple[str, ...]) -> str:
    """What ``--help`` prints, without line breaks in the middle of a sentence."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        patch.setenv("COLUMNS", "300")
        patch.setenv("NO_COLOR", "1")
        typer.main.get_command(cli_app.app).main([*path, "--help"], prog_name="orchestrator")
    return text.getvalue()


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "orchestrator")
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    sentence = str(COMMANDS[path].help).strip().splitlines()[0]

    assert f"Usage: {' '.join(('orchestrator', *path))}" in help_of(path)
    assert sentence[0].isupper()
    assert re.sub(r"\[/?\w*\]", "", sentence)[:50] in help_of(path)


@pytest.mark.parametrize("words", [["-h"], ["up", "-h"], ["snapshot", "save", "-h"]], ids=" ".join)
def test_help_has_a_short_flag(cli: Cli, words: list[str]) -> None:
    assert cli(*words).out == help_of(tuple(words[:-1]))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "orchestrator")
def test_every_option_and_argument_is_explained(path: tuple[str, ...]) -> None:
    for parameter in COMMANDS[path].params:
        assert parameter.help, f"{' '.join(path)}: {parameter.name}"


@pytest.mark.parametrize(("command", "option"), options())
def test_every_option_has_a_variable_of_its_name(command: str, option: str) -> None:
    name = option.removeprefix("--").replace("-", "_").upper()
    words = re.sub(r"\W", "_", command).upper()

    shown = ENV_VAR.findall(help_of(tuple(command.split())))

    assert {f"ORCHESTRATOR_{name}", f"ORCHESTRATOR_{words}_{name}"} & set(shown)


def test_option_is_taken_from_its_variable(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_UP_JOBS", "0")

    shown = cli("up", status=2)

    assert "Invalid value" in shown.err


def test_option_on_the_command_line_comes_before_its_variable(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_FILE", "variable.yaml")

    shown = cli("plan", "-f", "option.yaml", status=3)

    assert "option.yaml: no such file" in shown.err


def test_version_is_printed(cli: Cli) -> None:
    assert cli("--version").out == f"{__version__}\n"


def test_without_a_command_help_is_shown(cli: Cli) -> None:
    shown = cli(status=2)

    assert "Usage: orchestrator" in shown.out + shown.err


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["up", "--nonsense"],
        ["up", "extra"],
        ["up", "--jobs", "many"],
        ["up", "--jobs", "0"],
        ["graph", "--format", "png"],
        ["status", "-o", "xml"],
        ["console"],
        ["connect", "ann", "99999"],
        ["snapshot", "save", "ann"],
        ["stop", "ann", "--timeout", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(cli: Cli, words: list[str]) -> None:
    shown = cli(*words, status=2)

    assert "Usage: orchestrator" in shown.err
    assert shown.out == ""


def test_program_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "orchestrator", "--version"], capture_output=True, check=True)

    assert done.stdout.decode() == f"{__version__}\n"


def test_schema_is_json(cli: Cli) -> None:
    assert "guests" in cli("schema").json()["properties"]


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "up", "down"])
def test_missing_lab_file_ends_with_3_and_a_hint(cli: Cli, command: str) -> None:
    shown = cli(command, status=3)

    assert shown.err.splitlines() == ["error: lab.yaml: no such file", "  hint: name the lab file with -f"]
    assert shown.out == ""


def test_missing_lab_file_is_told_with_one_that_is_near(cli: Cli) -> None:
    write_lab(file="demo.yaml")

    shown = cli("up", "-f", "dmeo.yaml", status=3)

    assert "hint: did you mean 'demo.yaml'?" in shown.err


def test_wrong_lab_file_ends_with_3_and_the_place(cli: Cli) -> None:
    Path("lab.yaml").write_text("lab: demo\nhosts:\n  alpha: {}\nguests:\n  ann: {host: alpah}\n")

    shown = cli("plan", status=3)

    assert "lab.yaml:5:15: guests.ann.host: 'alpah' is not the name of a host" in shown.err
    assert "hint: did you mean 'alpha'?" in shown.err


@pytest.mark.parametrize(
    "words",
    [["status"], ["inspect"], ["console", "ann"], ["logs", "ann"], ["inventory"], ["ssh-config"]],
    ids=" ".join,
)
def test_lab_that_is_not_up_ends_with_1(cli: Cli, words: list[str]) -> None:
    shown = cli(*words, status=1)

    assert shown.err.splitlines() == ["error: no lab is up", "  hint: orchestrator up -f FILE"]


def test_markup_in_an_error_is_shown_as_it_is(cli: Cli) -> None:
    shown = cli("plan", "-f", "[bold]x[/].yaml", status=3)

    assert "[bold]x[/].yaml: no such file" in shown.err


@pytest.mark.parametrize("words", [["--quiet", "plan"], ["-q", "plan"]])
def test_quiet_does_not_hide_errors(cli: Cli, words: list[str]) -> None:
    assert "no such file" in cli(*words, status=3).err


def test_interrupt_ends_with_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "load", interrupted)

    cli("plan", status=130)


# -- with hosts in memory --------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryLab:
    """Hosts in memory behind every command, and images that are there once they were asked for."""
    made = MemoryLab()

    def image(name: str, *_: Any, **__: Any) -> Image:
        made.images[name] = image_id(name)
        return Image(
            id=image_id(name),
            name=name,
            kernel=Path("/image/kernel"),
            initrd=None,
            disk=None,
            disk_format=None,
            cmdline="",
            cloud_init=False,
            ready="agent",
            size=5 << 20,
            created="2026-01-01T00:00:00+00:00",
        )

    monkeypatch.setattr(store, "ensure", image)
    monkeypatch.setattr(store, "find", lambda name, *_: image(name) if made.images.get(name) else None)
    for module in (session, tools):
        monkeypatch.setattr(module, "open_host", made.transport)
    return made


@pytest.fixture
def up(cli: Cli, memory: MemoryLab) -> MemoryLab:
    """The example is up."""
    write_lab()
    cli("up")
    return memory


def guests(memory: MemoryLab) -> dict[str, list[str]]:
    return {name: sorted(host.guests) for name, host in memory.hosts.items() if host.facts.present}


def test_plan_shows_what_up_would_do_and_changes_nothing(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    shown = cli("plan")

    assert shown.out.splitlines()[:2] == ["+ create   host alpha: create", "+ create   network lan on alpha: create"]
    assert "+ create   image tiny: build or fetch" in shown.out
    assert len(shown.out.splitlines()) == 13
    assert guests(memory) == {}
    assert LabState("demo").load() is None


def test_plan_as_json_has_every_operation(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    made = cli("plan", "-o", "json").json()

    assert made["unreachable"] == {}
    assert len(made["operations"]) == 13
    assert made["operations"][1] == {
        "id": "network lan on alpha",
        "host": "alpha",
        "subject": "network lan",
        "summary": "create",
        "impact": "create",
        "method": "network.ensure",
        "needs": ["host alpha"],
        "detail": [],
    }


def test_plan_as_yaml_says_the_same(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    assert YAML(typ="safe", pure=True).load(cli("plan", "-o", "yaml").out) == cli("plan", "-o", "json").json()


def test_plan_with_exit_code_tells_whether_there_are_changes(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    cli("plan", "--exit-code", status=10)
    cli("up")

    assert "lab demo is as its file says" in cli("plan", "--exit-code").err


def test_up_makes_the_lab_and_again_does_nothing(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    first = cli("up")
    second = cli("up")

    assert guests(memory) == {"alpha": ["ann", "bob"], "beta": ["dan", "eve"]}
    assert first.out == second.out == ""
    assert "lab demo is up: 4 guests on 2 hosts" in first.err
    assert first.err.count("✓") == 13
    assert "nothing to do" in second.err


def test_quiet_up_says_nothing(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    shown = cli("-q", "up")

    assert (shown.out, shown.err) == ("", "")


def test_failed_operation_ends_with_1_and_names_what_depends_on_it(cli: Cli, memory: MemoryLab) -> None:
    def refuse(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "network.ensure":
            raise GuestError(
                "no bridge", hint="load the module", command="ip link add", tail=["Operation not supported"]
            )

    write_lab()
    memory.host("alpha").on_call = refuse

    shown = cli("up", status=1)

    for line in (
        "error: no bridge",
        "  │ Operation not supported",
        "  command: ip link add",
        "  hint: load the module",
        "  not done because of this: guest ann, guest bob",
        "error: 1 operation failed, 8 done, 4 not tried",
    ):
        assert line in shown.err.splitlines()
    assert guests(memory)["beta"] == ["dan", "eve"]


def test_unreachable_host_ends_with_4_and_the_others_go_on(cli: Cli, memory: MemoryLab) -> None:
    write_lab()
    memory.host("alpha").problem = "no route to host"

    shown = cli("up", status=4)

    assert "error: host alpha: no route to host" in shown.err
    assert guests(memory) == {"beta": ["dan", "eve"]}
    assert "! unreachable host alpha: no route to host" in cli("plan", status=4).out
    assert "no route to host" in cli("status", status=4).out
    assert "error: host alpha: no route to host" in cli("status", "-o", "json", status=4).err


def test_locked_lab_ends_with_5(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    with LabState("demo").lock():
        shown = cli("up", status=5)

    assert f"lab demo is being changed by process {os.getpid()}" in shown.err
    assert guests(memory) == {}


def test_contents_are_not_lost_without_yes(cli: Cli, up: MemoryLab) -> None:
    data = json.loads(Path("lab.yaml").read_text())
    data["guests"]["ann"]["image"] = "debian"
    write_lab(data)

    refused = cli("up", status=1)
    before = up.host("alpha").guests["ann"].image
    cli("up", "--yes")

    assert "± recreate guest ann on alpha: recreate" in refused.out
    assert "hint: add --yes" in refused.err
    assert before == image_id("tiny")
    assert up.host("alpha").guests["ann"].image == image_id("debian")


def test_lab_of_another_file_is_not_taken_over_unless_asked(cli: Cli, up: MemoryLab) -> None:
    write_lab(file="other.yaml", guests={"ann": {"host": "alpha"}})

    refused = cli("up", "-f", "other.yaml", status=3)
    kept = guests(up)
    cli("up", "-f", "other.yaml", "--take-over")

    assert "lab demo is up from another file" in refused.err
    assert kept == {"alpha": ["ann", "bob"], "beta": ["dan", "eve"]}
    assert guests(up) == {"alpha": ["ann"], "beta": []}


def test_host_that_left_the_file_is_removed(cli: Cli, up: MemoryLab) -> None:
    write_lab(hosts={"alpha": {}}, guests={"ann": {"host": "alpha"}})

    cli("up")

    assert guests(up) == {"alpha": ["ann"]}
    assert LabState("demo").get().former_hosts == {}


def test_host_that_left_the_file_and_does_not_answer_is_remembered(cli: Cli, up: MemoryLab) -> None:
    write_lab(hosts={"alpha": {}}, guests={"ann": {"host": "alpha"}})
    up.host("beta").problem = "no route to host"
    cli("up", status=4)
    assert list(LabState("demo").get().former_hosts) == ["beta"]
    up.host("beta").problem = None

    cli("up")

    assert guests(up) == {"alpha": ["ann"]}
    assert LabState("demo").get().former_hosts == {}


def test_plan_shows_the_removal_of_a_host_that_left_the_file(cli: Cli, up: MemoryLab) -> None:
    write_lab(hosts={"alpha": {}}, guests={"ann": {"host": "alpha"}, "bob": {"host": "alpha"}})

    assert "- remove   host beta: remove" in cli("plan").out


def test_stopped_up_ends_with_130_and_the_next_goes_on(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    def press(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "guest.start" and params["guest"]["name"] == "eve":
            woken = threading.Event()
            call.on_cancel(woken.set)
            os.kill(os.getpid(), signal.SIGINT)
            assert woken.wait(SOON)
            call.check()

    memory.host("beta").on_call = press

    stopped = cli("up", status=130)
    left = guests(memory)
    memory.host("beta").on_call = lambda *_: None
    cli("up")

    assert "rolled back: guest eve: make its taps" in stopped.err
    assert "error: stopped by the user" in stopped.err
    assert "eve" not in left["beta"]
    assert guests(memory) == {"alpha": ["ann", "bob"], "beta": ["dan", "eve"]}


def test_down_removes_the_lab_and_again_does_nothing(cli: Cli, up: MemoryLab, places: Path) -> None:
    first = cli("down")
    second = cli("down")

    assert "lab demo is down" in first.err
    assert "lab demo is down" in second.err
    assert guests(up) == {}
    assert not (places / "state").exists()


def test_down_works_by_name_without_the_lab_file(cli: Cli, up: MemoryLab) -> None:
    Path("lab.yaml").unlink()

    cli("down", "--lab", "demo")

    assert guests(up) == {}


def test_down_with_an_unreachable_host_remembers_the_lab_unless_told_to_forget(cli: Cli, up: MemoryLab) -> None:
    up.host("beta").problem = "no route to host"

    cli("down", status=4)
    remembered = LabState("demo").load()
    cli("down", "--forget")

    assert remembered is not None
    assert LabState("demo").load() is None


def test_down_of_an_unknown_lab_is_an_error_even_beside_a_lab_file(cli: Cli, up: MemoryLab) -> None:
    shown = cli("down", "--lab", "other", status=1)

    assert "error: lab other is not up" in shown.err
    assert guests(up) == {"alpha": ["ann", "bob"], "beta": ["dan", "eve"]}


# -- looking ---------------------------------------------------------------------------------------------------------


def test_status_shows_hosts_and_guests(cli: Cli, up: MemoryLab) -> None:
    rows = [line.split() for line in cli("status").out.splitlines() if line]

    assert ["alpha", "local", "10.213.0.2", "up", "2"] in rows
    assert ["ann", "alpha", "running", "1", "192M", "tcg", image_id("tiny"), "10.10.0.2", "fd10::2"] in rows


def test_status_as_json_has_what_the_table_has(cli: Cli, up: MemoryLab) -> None:
    data = cli("status", "-o", "json").json()

    assert {guest["name"]: guest["state"] for guest in data["guests"]} == dict.fromkeys(
        ("ann", "bob", "eve", "dan"), "running"
    )


def test_status_tells_what_has_changed_since(cli: Cli, up: MemoryLab) -> None:
    up.host("alpha").guests["ann"].state = "off"

    assert "1 change(s) pending: orchestrator plan" in cli("status").out


def test_status_starts_an_agent_that_died(cli: Cli, up: MemoryLab) -> None:
    up.host("alpha").facts = HostFacts(present=True, agent=False)

    cli("status")

    assert up.host("alpha").facts.agent


def test_inspect_shows_wish_and_facts_of_a_guest(cli: Cli, up: MemoryLab) -> None:
    data = cli("inspect", "eve", "-o", "json").json()

    assert data["wish"]["memory_max"] == "512M"
    assert data["observed"]["memory"] == 192 << 20


def test_inspect_of_the_lab_can_be_read_again(cli: Cli, up: MemoryLab) -> None:
    data = YAML(typ="safe", pure=True).load(cli("inspect").out)

    assert sorted(data["wish"]["guests"]) == ["ann", "bob", "dan", "eve"]
    assert data["observed"]["changes"] == 0


@pytest.mark.parametrize("words", [["inspect", "nobody"], ["console", "nobody"], ["stop", "nobody"]], ids=" ".join)
def test_unknown_guest_ends_with_1_and_those_that_there_are(cli: Cli, up: MemoryLab, words: list[str]) -> None:
    shown = cli(*words, status=1)

    assert "error: lab demo has no guest nobody" in shown.err
    assert "hint: its guests: ann, bob, eve, dan" in shown.err


def test_several_labs_must_be_named(cli: Cli, up: MemoryLab) -> None:
    Path("lab.yaml").unlink()
    LabState("one").save(one_guest())

    shown = cli("status", status=1)

    assert "several labs are up: demo, one" in shown.err
    assert cli("status", "--lab", "demo", "-o", "json").json()["lab"] == "demo"


def test_graph_works_before_the_lab_is_up(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    assert cli("graph").out.startswith("flowchart LR\n")
    assert cli("graph", "--format", "dot").out.startswith('graph "demo" {')


def test_graph_of_an_unknown_lab_is_an_error(cli: Cli, memory: MemoryLab) -> None:
    write_lab()

    shown = cli("graph", "--lab", "other", status=1)

    assert "lab other is not up" in shown.err


def test_inventory_is_yaml_and_ssh_config_is_text(cli: Cli, up: MemoryLab) -> None:
    assert "lab_hosts" in YAML(typ="safe", pure=True).load(cli("inventory").out)["all"]["children"]
    assert cli("ssh-config").out.startswith("Host ann demo.ann\n  User root\n")


def test_images_can_be_listed_and_pruned_where_there_are_none(cli: Cli) -> None:
    assert cli("image", "list", "-o", "json").json() == []
    assert "0 images removed" in cli("image", "prune").err


# -- power -----------------------------------------------------------------------------------------------------------


def test_guest_is_paused_resumed_stopped_and_started(cli: Cli, up: MemoryLab) -> None:
    states = []
    for words in (["pause"], ["resume"], ["stop"], ["start"], ["restart", "--hard"]):
        cli(words[0], "ann", *words[1:])
        states.append(up.host("alpha").guests["ann"].state)

    assert states == ["paused", "running", "off", "running", "running"]


def test_guest_that_is_off_cannot_be_paused(cli: Cli, up: MemoryLab) -> None:
    cli("stop", "ann", "--hard")

    assert "guest ann is not running" in cli("pause", "ann", status=1).err


def test_command_starts_an_agent_that_died(cli: Cli, up: MemoryLab) -> None:
    up.host("alpha").facts = HostFacts(present=True, agent=False)

    cli("pause", "ann")

    assert up.host("alpha").guests["ann"].state == "paused"


# -- completion ------------------------------------------------------------------------------------------------------


def test_guests_and_labs_are_completed(places: Path) -> None:
    LabState("demo").save(demo())
    LabState("one").save(one_guest())

    assert sorted(complete_guests("a")) == ["ann", "ann"]
    assert complete_guests("bo") == ["bob"]
    assert complete_labs("") == ["demo", "one"]
    assert complete_labs("o") == ["one"]


def test_completion_survives_a_damaged_state(places: Path) -> None:
    LabState("demo").save(demo())
    (LabState("demo").folder / "lab.json").write_text("{")

    assert complete_guests("") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("orchestrator st", {"status", "start", "stop"}),
        ("orchestrator snapshot ", {"save", "restore", "list", "delete"}),
        ("orchestrator console e", {"eve"}),
        ("orchestrator switch trace ann b", {"bob"}),
        ("orchestrator switch ", {"show", "ports", "stats", "trace", "capture"}),
        ("orchestrator status --lab ", {"demo"}),
        ("orchestrator graph --format ", {"mermaid", "dot", "svg"}),
    ],
)
def test_shell_completes_commands_guests_and_values(places: Path, words: str, expected: set[str]) -> None:
    LabState("demo").save(demo())
    program = shutil.which("orchestrator", path=str(Path(sys.executable).parent))
    assert program, "the package is not installed"
    asked = {"_ORCHESTRATOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}

    done = subprocess.run([program], env={**os.environ, **asked}, capture_output=True, text=True, check=False)

    assert set(done.stdout.split()) == expected


# -- migrate ---------------------------------------------------------------------------------------------------------

FAR: dict[str, Any] = {
    "lab": "far",
    "hosts": {name: {"kind": "ssh", "address": f"192.0.2.{number}"} for number, name in enumerate(("one", "two"), 1)},
    "networks": {"lan": {"ipv4": "10.1.0.0/24"}},
    "guests": {"web": {"host": "one", "nics": ["lan"]}, "eve": {"host": "one", "nics": ["lan"]}},
}


@pytest.fixture
def far(cli: Cli, memory: MemoryLab) -> MemoryLab:
    """A lab of two machines is up, with both guests on the first."""
    for name in ("one", "two"):
        memory.host(name).migrates = True
    write_lab(FAR)
    cli("up")
    return memory


def with_web_on(host: str, **more: Any) -> dict[str, Any]:
    return {**FAR, "guests": {**FAR["guests"], "web": {**FAR["guests"]["web"], "host": host, **more}}}


@pytest.mark.parametrize("words", [["migrate"], ["guest", "migrate"]], ids=" ".join)
def test_migrate_moves_a_guest_and_says_how_it_went(cli: Cli, far: MemoryLab, words: list[str]) -> None:
    shown = cli(*words, "web", "two")

    assert guests(far) == {"one": ["eve"], "two": ["web"]}
    assert "guest web went from one to two in" in shown.err
    assert "stood still for" in shown.err
    assert "guest.remove" not in far.host("one").calls
    assert "web" not in str(far.host("one").networks["lan"].ports)


def test_migrate_gives_its_report_as_json(cli: Cli, far: MemoryLab) -> None:
    report = cli("migrate", "web", "two", "-o", "json").json()

    assert (report["guest"], report["source"], report["target"]) == ("web", "one", "two")
    assert {"seconds", "downtime_seconds", "memory_bytes", "disk_bytes", "passes"} <= set(report)


def test_moved_guest_is_found_and_stays(cli: Cli, far: MemoryLab) -> None:
    cli("migrate", "web", "two")

    up = cli("up")
    plan = cli("plan")
    status = cli("status")
    cli("pause", "web")
    observed = next(each for each in cli("status", "-o", "json").json()["guests"] if each["name"] == "web")

    assert "nothing to do" in up.err
    assert "guest web was moved to two; the file says one" in plan.err
    assert "two (file: one)" in status.out
    assert (observed["host"], observed["home"], observed["state"]) == ("two", "one", "paused")


def test_moved_guest_goes_where_the_file_says_when_it_changes(cli: Cli, far: MemoryLab) -> None:
    cli("migrate", "web", "two")
    write_lab(with_web_on("two"))
    adopted = cli("up")
    write_lab(with_web_on("one"))
    plan = cli("plan")
    up = cli("up")

    assert "nothing to do" in adopted.err
    assert "live     guest web on two: move to one" in plan.out
    assert "move to one" in up.err
    assert guests(far) == {"one": ["eve", "web"], "two": []}


def test_migrate_to_where_the_guest_is_does_nothing(cli: Cli, far: MemoryLab) -> None:
    shown = cli("migrate", "web", "one")

    assert "guest web is on host one" in shown.err
    assert guests(far) == {"one": ["eve", "web"], "two": []}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["bob", "two"], "has no guest bob"), (["web", "three"], "has no host three")],
    ids=["guest", "host"],
)
def test_migrate_of_what_is_not_there(cli: Cli, far: MemoryLab, words: list[str], message: str) -> None:
    assert message in cli("migrate", *words, status=1).err


def test_migrate_between_hosts_of_this_machine_says_why_not(cli: Cli, up: MemoryLab) -> None:
    shown = cli("migrate", "ann", "beta", status=1)

    assert "guest ann cannot move as it runs: host alpha has no libvirtd" in shown.err
    assert "up --yes" in shown.err


def test_migrate_of_a_guest_that_is_off_says_so(cli: Cli, far: MemoryLab) -> None:
    cli("stop", "web")

    assert "guest web cannot move as it runs: it is off" in cli("migrate", "web", "two", status=1).err


def test_migrate_to_a_host_that_does_not_answer(cli: Cli, far: MemoryLab) -> None:
    far.host("two").problem = "no route to host"

    assert "host two: no route to host" in cli("migrate", "web", "two", status=4).err


def test_migrate_does_nothing_else(cli: Cli, far: MemoryLab) -> None:
    far.host("one").guests["web"].state = "paused"
    far.host("one").guests["eve"].state = "off"

    cli("migrate", "web", "two")

    assert far.host("two").guests["web"].state == "paused"
    assert far.host("one").guests["eve"].state == "off"


def test_migrate_that_fails_leaves_nothing_and_the_guest_is_found(cli: Cli, far: MemoryLab) -> None:
    def no_room(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "migration.receive":
            raise GuestError("guest web needs 9 MiB of disk", hint="free some")

    far.host("two").on_call = no_room

    failed = cli("migrate", "web", "two", status=1)
    cli("pause", "web")
    again = cli("up")

    assert "needs 9 MiB of disk" in failed.err
    assert "free some" in failed.err
    assert guests(far) == {"one": ["eve", "web"], "two": []}
    assert not far.host("two").networks
    assert "resume" in again.err


def test_migrate_loses_snapshots_only_if_told_to(cli: Cli, far: MemoryLab) -> None:
    far.host("one").guests["web"].snapshots = ["clean"]

    refused = cli("migrate", "web", "two", status=1)
    stayed = guests(far)
    cli("migrate", "web", "two", "--yes")

    assert "snapshot clean: does not move" in refused.out
    assert "--yes" in refused.err
    assert stayed == {"one": ["eve", "web"], "two": []}
    assert guests(far) == {"one": ["eve"], "two": ["web"]}


def test_up_that_cannot_move_a_guest_still_finds_it(cli: Cli, far: MemoryLab) -> None:
    def no_room(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "migration.receive":
            raise GuestError("no room")

    far.host("two").on_call = no_room
    write_lab(with_web_on("two"))

    cli("up", status=1)
    cli("pause", "web")  # on the host where it is
    paused = far.host("one").guests["web"].state
    far.host("two").on_call = lambda *_: None
    cli("up")

    assert paused == "paused"
    assert guests(far) == {"one": ["eve"], "two": ["web"]}
    assert far.host("two").guests["web"].state == "running"


def cut_short(cli: Cli, far: MemoryLab, *, handed_over: bool) -> None:
    """As a command leaves it that was killed while ``web`` went to host two."""
    if handed_over:

        def gone(method: str, call: Any, params: Mapping[str, Any]) -> None:
            if method == "migration.arrive":
                raise HostError("the agent ended")

        far.host("two").on_call = gone
        cli("migrate", "web", "two", status=1)
        far.host("two").on_call = lambda *_: None
        assert "web" not in far.host("one").guests
    else:
        facts = far.host("one").guests["web"]
        far.host("two").guests["web"] = replace(facts, host="two", state="paused", ready=False, arriving_from="one")
    assert far.host("two").guests["web"].arriving_from == "one"


@pytest.mark.parametrize("handed_over", [False, True])
def test_move_that_was_cut_short_is_healed_by_up(cli: Cli, far: MemoryLab, handed_over: bool) -> None:
    cut_short(cli, far, handed_over=handed_over)

    cli("up")
    again = cli("up")

    assert guests(far) == {"one": ["eve", "web"], "two": []}
    assert far.host("one").guests["web"].state == "running"
    assert "nothing to do" in again.err


@pytest.mark.parametrize("handed_over", [False, True])
def test_move_that_was_cut_short_is_finished_by_the_same_command(cli: Cli, far: MemoryLab, handed_over: bool) -> None:
    cut_short(cli, far, handed_over=handed_over)

    cli("migrate", "web", "two")
    again = cli("up")

    assert guests(far) == {"one": ["eve"], "two": ["web"]}
    assert far.host("two").guests["web"].state == "running"
    assert "nothing to do" in again.err


def test_move_that_was_cut_short_is_left_alone_while_its_source_does_not_answer(cli: Cli, far: MemoryLab) -> None:
    cut_short(cli, far, handed_over=True)
    far.host("one").problem = "no route to host"

    cli("up", status=4)
    refused = cli("migrate", "web", "two", status=1)

    assert far.host("two").guests["web"].arriving_from == "one"
    assert "cannot both be asked now: host one: no route to host" in refused.err


def test_status_tells_a_guest_from_the_copy_of_a_move_that_was_cut_short(cli: Cli, far: MemoryLab) -> None:
    cut_short(cli, far, handed_over=False)

    (web,) = (each for each in cli("status", "-o", "json").json()["guests"] if each["name"] == "web")

    assert (web["host"], web["state"]) == ("one", "running")


def test_down_in_the_middle_of_a_move_removes_both_copies(cli: Cli, far: MemoryLab) -> None:
    cut_short(cli, far, handed_over=False)

    cli("down")

    assert guests(far) == {}
