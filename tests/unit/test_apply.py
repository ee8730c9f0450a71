"""Carrying plans out: order, parallelism, failures, cancelling, rolling back."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.apply import Executor, Outcome, apply
from orchestrator.errors import CancelledError, GuestError, HostError, ImageError, OrchestratorError
from orchestrator.hosts.rpc import Stream
from orchestrator.images import store
from orchestrator.images.store import Image
from orchestrator.plan.build import build, build_removal
from orchestrator.plan.operations import MIGRATE, Impact, ObservedLab, Operation, Plan, Undo
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.testing import MemoryLab, MemoryTransport, image_id, perfect
from tests.unit.labs import demo, resolved

SOON = 10.0  # seconds; no test waits that long unless it fails

Action = Callable[[threading.Event], None]


def operation(
    name: str, *needs: str, subject: str | None = None, undo: bool = False, live: bool = False
) -> Operation:
    return Operation(
        id=name,
        host="alpha",
        subject=subject or name,
        summary="do",
        impact=Impact.LIVE if live else Impact.CREATE,
        method=f"do.{name}",
        needs=needs,
        undo=Undo(f"undo.{name}", {"name": name}) if undo else None,
    )


class Recorder:
    """An executor that does what the test says for each operation, and a reporter; both keep what they see."""

    def __init__(self, actions: Mapping[str, Action] | None = None, undo_fails: bool = False) -> None:
        self._actions = actions or {}
        self._undo_fails = undo_fails
        self._lock = threading.Lock()
        self.log: list[str] = []
        self.running = 0
        self.most = 0
        self.undone: list[tuple[str, str, dict[str, Any]]] = []
        self.errors: dict[str, OrchestratorError | None] = {}

    def _note(self, line: str) -> None:
        with self._lock:
            self.log.append(line)

    def carry_out(self, operation: Operation, progress: Callable[[str], None], cancel: threading.Event) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            progress("working")
            self._actions.get(operation.id, lambda cancel: None)(cancel)
        finally:
            with self._lock:
                self.running -= 1

    def call(self, host: str, method: str, params: Mapping[str, Any]) -> None:
        self.undone.append((host, method, dict(params)))
        if self._undo_fails:
            raise HostError("gone")

    def begin(self, operation: Operation) -> None:
        self._note(f"begin {operation.id}")

    def progress(self, operation: Operation, text: str) -> None:
        self._note(f"{text} {operation.id}")

    def end(self, operation: Operation, seconds: float, error: OrchestratorError | None) -> None:
        assert seconds >= 0
        self.errors[operation.id] = error
        self._note(f"end {operation.id}")


def carry_out(
    operations: list[Operation],
    actions: Mapping[str, Action] | None = None,
    *,
    jobs: int = 8,
    stop: Callable[[], bool] = lambda: False,
    undo_fails: bool = False,
) -> tuple[Outcome, Recorder]:
    recorder = Recorder(actions, undo_fails)
    outcome = apply(Plan(tuple(operations)), recorder, recorder, jobs=jobs, stop=stop)  # type: ignore[arg-type]
    return outcome, recorder


def ids(operations: list[Operation]) -> list[str]:
    return [each.id for each in operations]


def fails(message: str = "it broke") -> Action:
    def fail(cancel: threading.Event) -> None:
        raise GuestError(message, hint="mend it")

    return fail


# -- order and parallelism -------------------------------------------------------------------------------------------


def test_empty_plan_is_done() -> None:
    outcome, recorder = carry_out([])

    assert outcome == Outcome()
    assert recorder.log == []


def test_operation_waits_for_all_that_it_needs() -> None:
    outcome, recorder = carry_out([operation("a"), operation("b"), operation("c", "a", "b"), operation("d", "c")])

    assert sorted(ids(outcome.done)) == ["a", "b", "c", "d"]
    assert recorder.log.index("begin c") > max(recorder.log.index("end a"), recorder.log.index("end b"))
    assert recorder.log.index("begin d") > recorder.log.index("end c")


def test_operations_that_need_nothing_run_together() -> None:
    together = threading.Barrier(4, timeout=SOON)
    meet: dict[str, Action] = {name: lambda cancel: together.wait() and None for name in "abcd"}

    outcome, recorder = carry_out([operation(name) for name in "abcd"], meet, jobs=4)

    assert len(outcome.done) == 4
    assert recorder.most == 4


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_operations_run_at_once_than_there_are_jobs(jobs: int) -> None:
    brief: dict[str, Action] = {str(number): lambda cancel: cancel.wait(0.002) and None for number in range(20)}

    outcome, recorder = carry_out([operation(str(number)) for number in range(20)], brief, jobs=jobs)

    assert len(outcome.done) == 20
    assert recorder.most == jobs


def test_one_job_keeps_the_order_of_the_plan() -> None:
    outcome, _ = carry_out([operation(name) for name in "dacb"], jobs=1)

    assert ids(outcome.done) == ["d", "a", "c", "b"]


def test_slow_operation_does_not_hold_up_others() -> None:
    others = threading.Event()

    def slow(cancel: threading.Event) -> None:
        assert others.wait(SOON)

    actions: dict[str, Action] = {"slow": slow, "last": lambda cancel: others.set()}

    outcome, _ = carry_out([operation("slow"), operation("a"), operation("last", "a")], actions, jobs=2)

    assert sorted(ids(outcome.done)) == ["a", "last", "slow"]


def test_reporter_hears_begin_progress_and_end_of_each_operation() -> None:
    outcome, recorder = carry_out([operation("a"), operation("b", "a")], {"b": fails()})

    assert recorder.log == ["begin a", "working a", "end a", "begin b", "working b", "end b"]
    assert recorder.errors["a"] is None
    assert str(recorder.errors["b"]) == "it broke"
    assert ids(outcome.done) == ["a"]


# -- failures --------------------------------------------------------------------------------------------------------


def test_failure_skips_what_needs_it_and_nothing_else() -> None:
    plan = [
        operation("a"),
        operation("b", "a"),
        operation("c", "b"),
        operation("d"),
        operation("e", "d"),
        operation("f", "c", "e"),
    ]

    outcome, recorder = carry_out(plan, {"a": fails()})

    assert [(failed.id, str(error)) for failed, error in outcome.failed] == [("a", "it broke")]
    assert sorted(ids(outcome.skipped)) == ["b", "c", "f"]
    assert sorted(ids(outcome.done)) == ["d", "e"]
    assert not outcome.cancelled
    assert "begin b" not in recorder.log


def test_failure_rolls_nothing_back() -> None:
    plan = [operation("taps", subject="guest", undo=True), operation("start", "taps", subject="guest", undo=True)]

    outcome, recorder = carry_out(plan, {"start": fails()})

    assert outcome.rolled_back == []
    assert recorder.undone == []


def test_defect_in_an_operation_is_its_failure() -> None:
    def divide(cancel: threading.Event) -> None:
        raise ZeroDivisionError("by zero")

    outcome, _ = carry_out([operation("a"), operation("b", "a"), operation("c")], {"a": divide})

    ((_, error),) = outcome.failed
    assert "ZeroDivisionError('by zero')" in str(error)
    assert error.hint == "this is a defect: please report it"
    assert ids(outcome.done) == ["c"]
    assert ids(outcome.skipped) == ["b"]


def test_failure_that_very_many_operations_need_skips_them_all() -> None:
    many = [operation("host"), *(operation(str(number), "host") for number in range(1500))]

    outcome, _ = carry_out(many, {"host": fails()})

    assert len(outcome.skipped) == 1500


@given(st.data())
def test_every_operation_ends_up_in_one_place(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 12))
    plan = [
        operation(
            str(number),
            *(str(need) for need in data.draw(st.sets(st.integers(0, number - 1)) if number else st.just(set()))),
        )
        for number in range(count)
    ]
    bad = data.draw(st.sets(st.sampled_from([each.id for each in plan]))) if plan else set()

    outcome, recorder = carry_out(plan, dict.fromkeys(bad, fails()), jobs=data.draw(st.integers(1, 4)))

    failed = [each.id for each, _ in outcome.failed]
    assert sorted([*ids(outcome.done), *failed, *ids(outcome.skipped)]) == sorted(ids(plan))
    assert set(failed) <= bad
    for each in plan:
        lost = {*failed, *ids(outcome.skipped)}
        assert (each.id in ids(outcome.skipped)) == bool(lost & set(each.needs))
    assert sum(line.startswith("begin") for line in recorder.log) == len(outcome.done) + len(failed)


# -- stopping --------------------------------------------------------------------------------------------------------


class Stop:
    """Says stop once an operation has begun to wait for it."""

    def __init__(self) -> None:
        self.waiting = threading.Event()

    def __call__(self) -> bool:
        return self.waiting.is_set()

    def wait(self, cancel: threading.Event) -> None:
        """An operation that is under way until it is given up."""
        self.waiting.set()
        assert cancel.wait(SOON)
        raise CancelledError("given up")

    def finish(self, cancel: threading.Event) -> None:
        """An operation that cannot be given up."""
        self.waiting.set()
        assert cancel.wait(SOON)


def guest(name: str) -> list[Operation]:
    """A guest's two operations: its taps, then itself."""
    subject = f"guest {name}"
    return [
        operation(f"ports of {name}", subject=subject, undo=True),
        operation(subject, f"ports of {name}", subject=subject, undo=True),
    ]


def test_stop_gives_up_what_is_under_way_and_begins_nothing_more() -> None:
    stop = Stop()

    outcome, recorder = carry_out(
        [operation("a"), operation("b", "a"), operation("c", "b")], {"b": stop.wait}, stop=stop
    )

    assert outcome.cancelled
    assert ids(outcome.done) == ["a"]
    assert ids(outcome.skipped) == ["b", "c"]
    assert outcome.failed == []
    assert isinstance(recorder.errors["b"], CancelledError)
    assert "begin c" not in recorder.log


def test_stop_takes_back_the_steps_of_subjects_that_are_half_made() -> None:
    stop = Stop()

    outcome, recorder = carry_out([*guest("ann"), *guest("bob")], {"guest bob": stop.wait}, jobs=1, stop=stop)

    assert ids(outcome.done) == ["ports of ann", "guest ann", "ports of bob"]
    assert ids(outcome.rolled_back) == ["ports of bob"]
    assert recorder.undone == [("alpha", "undo.ports of bob", {"name": "ports of bob"})]


def test_stop_keeps_subjects_that_are_whole() -> None:
    stop = Stop()
    network = operation("network", undo=True)

    outcome, recorder = carry_out(
        [network, *guest("ann"), *guest("bob")], {"ports of bob": stop.wait}, jobs=1, stop=stop
    )

    assert ids(outcome.done) == ["network", "ports of ann", "guest ann"]
    assert recorder.undone == []


def test_stop_takes_steps_back_in_reverse_order() -> None:
    stop = Stop()
    steps = [operation(name, subject="guest", undo=True) for name in ("one", "two", "three")]

    _, recorder = carry_out(steps, {"three": stop.wait}, jobs=1, stop=stop)

    assert [method for _, method, _ in recorder.undone] == ["undo.two", "undo.one"]


def test_stop_leaves_changes_of_what_was_there() -> None:
    stop = Stop()
    steps = [operation("ports", subject="guest", undo=True), operation("change", "ports", subject="guest", live=True)]

    outcome, recorder = carry_out(steps, {"change": stop.wait}, stop=stop)

    assert ids(outcome.skipped) == ["change"]
    assert recorder.undone == []


def test_operation_that_ends_well_after_the_stop_counts_as_done() -> None:
    stop = Stop()

    outcome, recorder = carry_out([*guest("ann")], {"guest ann": stop.finish}, stop=stop)

    assert ids(outcome.done) == ["ports of ann", "guest ann"]
    assert outcome.cancelled
    assert recorder.undone == []


def test_step_that_cannot_be_taken_back_does_not_keep_the_others() -> None:
    stop = Stop()
    steps = [operation(name, subject="guest", undo=True) for name in ("one", "two", "three")]

    outcome, recorder = carry_out(steps, {"three": stop.wait}, jobs=1, stop=stop, undo_fails=True)

    assert len(recorder.undone) == 2
    assert outcome.rolled_back == []


def test_stop_after_a_failure_keeps_both() -> None:
    stop = Stop()
    actions: dict[str, Action] = {"bad": fails(), "slow": stop.wait}

    outcome, _ = carry_out([operation("bad"), operation("slow")], actions, stop=stop)

    assert [failed.id for failed, _ in outcome.failed] == ["bad"]
    assert ids(outcome.skipped) == ["slow"]
    assert outcome.cancelled


def test_stop_is_noticed_while_operations_run() -> None:
    asked = threading.Event()
    began = time.monotonic()

    def stop() -> bool:
        asked.set()
        return True

    outcome, _ = carry_out([operation("slow")], {"slow": lambda cancel: cancel.wait(SOON) and None}, stop=stop)

    assert asked.is_set()
    assert outcome.cancelled
    assert time.monotonic() - began < SOON


def test_interrupt_gives_up_what_is_under_way() -> None:
    given_up: list[bool] = []
    begun = threading.Event()

    def slow(cancel: threading.Event) -> None:
        begun.set()
        given_up.append(cancel.wait(0.5))

    def interrupted() -> bool:
        assert begun.wait(SOON)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out([operation("slow")], {"slow": slow}, stop=interrupted)

    assert given_up == [True]


def test_interrupt_leaves_no_thread_behind() -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out([operation("slow")], {"slow": lambda cancel: cancel.wait(0.05) and None}, stop=interrupted)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("apply")]


# -- with hosts in memory, over real streams -------------------------------------------------------------------------


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images are made at once; the names of those that were."""
    made: list[str] = []

    def ensure(name: str, *_: Any, **__: Any) -> Image:
        made.append(name)
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
            size=0,
            created="",
        )

    monkeypatch.setattr(store, "ensure", ensure)
    return made


class Run:
    """A lab in memory, and plans carried out on it by the real executor."""

    def __init__(self) -> None:
        self.lab = demo()
        self.memory = MemoryLab()
        self.transports: list[MemoryTransport] = []

    def executor(self, lab: ResolvedLab | None = None) -> Executor:
        lab = lab or self.lab
        hosts = {name: self.memory.transport(lab, name) for name in lab.hosts}
        self.transports += hosts.values()
        return Executor(lab, hosts, ["ssh-ed25519 AAAA"])

    def up(self, stop: Callable[[], bool] = lambda: False) -> Outcome:
        plan = build(self.lab, self.memory.observe())
        return apply(plan, self.executor(), Recorder(), jobs=4, stop=stop)


@pytest.fixture
def run(images: list[str]) -> Iterator[Run]:
    made = Run()
    yield made
    for transport in made.transports:
        transport.close()


def test_up_on_hosts_in_memory_makes_the_perfect_lab(run: Run, images: list[str]) -> None:
    outcome = run.up()

    assert outcome.failed == []
    assert {name: host.observed() for name, host in run.memory.hosts.items()}.keys() == {"alpha", "beta"}
    for name, host in perfect(run.lab).hosts.items():
        seen = run.memory.host(name).observed()
        assert {facts.name: facts for facts in seen.guests} == {facts.name: facts for facts in host.guests}
        assert seen.networks == host.networks
    assert "tiny" in images


def test_failed_start_is_mended_by_the_next_up(run: Run) -> None:
    def no_memory(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "guest.start" and params["guest"]["name"] == "bob":
            raise GuestError("bob does not fit", tail=["out of memory"])

    run.memory.host("alpha").on_call = no_memory
    first = run.up()
    run.memory.host("alpha").on_call = lambda *_: None

    second = run.up()

    assert [(failed.id, error.tail) for failed, error in first.failed] == [("guest bob on alpha", ("out of memory",))]
    assert ids(second.done) == ["image tiny", "guest bob on alpha"]


def test_stopped_up_gives_up_the_call_on_the_agent_and_takes_its_taps_back(run: Run) -> None:
    stop = Stop()

    def wait(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "guest.start" and params["guest"]["name"] == "eve":
            woken = threading.Event()
            call.on_cancel(woken.set)
            stop.waiting.set()
            assert woken.wait(SOON)
            call.check()

    run.memory.host("beta").on_call = wait

    outcome = run.up(stop)

    assert "ports of eve on beta" in ids(outcome.rolled_back)
    assert "guest eve on beta" in ids(outcome.skipped)
    seen = run.memory.host("beta").observed()
    assert "eve" not in [facts.name for facts in seen.guests]
    assert not [owner for facts in seen.networks for owner in facts.ports.values() if owner.startswith("eve/")]


def test_image_that_cannot_be_made_stops_only_what_needs_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Image:
        raise ImageError("no space left")

    monkeypatch.setattr(store, "ensure", fail)

    outcome = run.up()

    assert [failed.id for failed, _ in outcome.failed] == ["image tiny"]
    assert sorted(ids(outcome.skipped)) == [
        f"guest {name}" for name in ("ann on alpha", "bob on alpha", "dan on beta", "eve on beta")
    ]
    assert len(outcome.done) == 8


def test_host_that_dies_meanwhile_fails_its_operations_only(run: Run) -> None:
    def die(method: str, call: Any, params: Mapping[str, Any]) -> None:
        raise HostError("alpha: the agent ended")

    run.memory.host("alpha").on_call = die

    outcome = run.up()

    assert {failed.host for failed, _ in outcome.failed} == {"alpha"}
    assert sorted(facts.name for facts in run.memory.host("beta").observed().guests) == ["dan", "eve"]


def test_host_that_restarts_is_connected_to_anew(run: Run) -> None:
    run.up()
    alpha = run.memory.host("alpha")
    executor = run.executor()
    executor.call("alpha", "guest.facts", {})
    alpha.facts = replace(alpha.facts, restart=True)
    restart = replace(operation("restart"), method="host.ensure")

    executor.carry_out(restart, lambda _: None, threading.Event())

    assert executor.call("alpha", "guest.facts", {})


def test_guests_get_the_labs_keys_and_the_images_files(run: Run) -> None:
    got: list[Mapping[str, Any]] = []

    def keep(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "guest.start":
            got.append(params)

    run.memory.host("alpha").on_call = keep

    run.up()

    assert [params["keys"] for params in got] == [["ssh-ed25519 AAAA"]] * 2
    assert {params["image"]["kernel"] for params in got} == {"/image/kernel"}


def test_removed_lab_in_memory_leaves_nothing(run: Run) -> None:
    run.up()

    outcome = apply(build_removal(run.lab, run.memory.observe()), run.executor(), Recorder(), jobs=4)

    assert outcome.failed == []
    assert not any(host.facts.present or host.guests or host.networks for host in run.memory.hosts.values())


def test_executor_shares_one_connection_for_each_host(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.up()
    opened: list[str] = []
    stream = MemoryTransport.stream

    def counted(transport: MemoryTransport) -> Stream:
        opened.append(transport.host.name)
        return stream(transport)

    monkeypatch.setattr(MemoryTransport, "stream", counted)
    executor = run.executor()

    for host in ("alpha", "beta", "alpha", "alpha"):
        executor.call(host, "guest.facts", {})

    assert opened == ["alpha", "beta"]


# -- guests that move ------------------------------------------------------------------------------------------------


def test_stop_takes_back_what_was_made_for_a_move_and_nothing_after_it() -> None:
    stop = Stop()
    move = Operation(
        id="move",
        host="alpha",
        subject="guest ann",
        summary="move",
        impact=Impact.LIVE,
        method=MIGRATE,
        needs=("taps",),
    )
    steps = [operation("taps", subject="guest ann", undo=True), move]

    outcome, recorder = carry_out(steps, {"move": stop.wait}, stop=stop)

    assert ids(outcome.skipped) == ["move"]
    assert [method for _, method, _ in recorder.undone] == ["undo.taps"]


def test_whoever_asked_is_told_of_what_was_done_in_the_thread_that_asked() -> None:
    told: list[tuple[str, str]] = []
    plan = Plan((operation("a"), operation("b"), operation("c", "b")))
    recorder = Recorder({"b": fails()})

    apply(
        plan,
        recorder,  # type: ignore[arg-type]
        recorder,
        jobs=2,
        done=lambda each: told.append((each.id, threading.current_thread().name)),
    )

    assert told == [("a", threading.current_thread().name)]


@pytest.fixture
def pair(images: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Two machines that can send and receive guests; ``ann`` is on the first."""
    made = Run()
    hosts = {
        name: {"kind": "ssh", "address": f"192.0.2.{number}"} for number, name in enumerate(("alpha", "beta"), 1)
    }
    data = {"lab": "far", "hosts": hosts, "networks": {"lan": {"ipv4": "10.1.0.0/24"}}}
    made.lab = resolved({**data, "guests": {"ann": {"host": "alpha", "nics": ["lan"]}}})
    made.memory = MemoryLab(perfect(made.lab))
    monkeypatch.setattr(
        store, "find", lambda name, *_: store.ensure(name, None, base=Path(), progress=lambda _: None)
    )
    yield made
    for transport in made.transports:
        transport.close()


def elsewhere(run: Run) -> ResolvedLab:
    return run.lab.with_guest(run.lab.guests["ann"].model_copy(update={"host": "beta"}))


def test_guest_moves_by_way_of_both_agents(pair: Run) -> None:
    wish = elsewhere(pair)

    outcome = apply(build(wish, pair.memory.observe()), pair.executor(wish), Recorder(), jobs=4)

    assert outcome.failed == []
    assert {name: sorted(host.guests) for name, host in pair.memory.hosts.items()} == {"alpha": [], "beta": ["ann"]}
    assert outcome.results["guest ann to beta"]["target"] == "beta"
    assert not build(wish, pair.memory.observe())


def test_move_that_fails_leaves_the_guest_and_the_next_try_works(pair: Run) -> None:
    wish = elsewhere(pair)

    def no_room(method: str, call: Any, params: Mapping[str, Any]) -> None:
        if method == "migration.receive":
            raise GuestError("no room")

    pair.memory.host("beta").on_call = no_room
    first = apply(build(wish, pair.memory.observe()), pair.executor(wish), Recorder(), jobs=4)
    left = pair.memory.host("alpha").guests["ann"].state
    pair.memory.host("beta").on_call = lambda *_: None

    second = apply(build(wish, pair.memory.observe()), pair.executor(wish), Recorder(), jobs=4)

    assert [failed.id for failed, _ in first.failed] == ["guest ann to beta"]
    assert left == "running"
    assert second.failed == []
    assert not build(wish, pair.memory.observe())


def test_guest_whose_image_is_no_longer_there_cannot_move(pair: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = elsewhere(pair)
    pair.memory.host("alpha").guests["ann"].image = "tiny-ffffffffffff"
    monkeypatch.setattr(store, "all_images", lambda: [])
    observed = pair.memory.observe()
    plan = build(wish, ObservedLab(observed.hosts, {"tiny": None}))

    outcome = apply(plan, pair.executor(wish), Recorder(), jobs=4)

    ((failed, error),) = outcome.failed
    assert failed.method == MIGRATE
    assert "runs from tiny-ffffffffffff, which is no longer in the cache" in str(error)
    assert pair.memory.host("alpha").guests["ann"].state == "running"
