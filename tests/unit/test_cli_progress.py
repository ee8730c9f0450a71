"""Lines about work that takes long, where there is no terminal."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time

import pytest

from orchestrator.cli import progress
from orchestrator.plan.operations import Impact, Operation


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(work: progress._Work, clock: list[float], until: float) -> list[str]:
    """What is said of the work in each second until ``until``."""
    said = []
    while clock[0] < until:
        clock[0] += 1
        said.append(work.reminder())
    return [line for line in said if line]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What is written next."""
    deadline = time.monotonic() + 60
    while not (text := capsys.readouterr().err):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return text


def test_work_is_told_when_it_takes_long_and_then_when_it_changes(clock: list[float]) -> None:
    work = progress._Work("box", began=1000, reminded=1000)
    work.text = "packages"

    first = lines(work, clock, 1030)
    work.text = "disk"
    second = lines(work, clock, 1040)

    assert first == ["… box: packages (10 s)"]
    assert second == ["… box: disk (31 s)"]


def test_work_that_says_nothing_is_told_each_minute(clock: list[float]) -> None:
    work = progress._Work("box", began=1000, reminded=1000)

    assert lines(work, clock, 1130) == ["… box (60 s)", "… box (120 s)"]


def test_step_that_comes_just_after_a_line_is_told_though_nothing_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "REMIND_SECONDS", 0.5)

    with progress.waiting("host far") as note:
        note("connecting")
        note("installing")
        told = said(capsys)

    assert told.startswith("… host far: installing (")


def test_each_operation_is_told_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "REMIND_SECONDS", 0.5)
    slow = Operation("a", "alpha", "host alpha", "create", Impact.CREATE, "host.ensure")

    with progress.Progress() as shown:
        shown.begin(slow)
        shown.progress(slow, "starting")
        told = said(capsys)
        shown.end(slow, 2.3, None)

    assert told.startswith("… host alpha: create: starting (")
    assert capsys.readouterr().err == "✓ host alpha: create 2.3 s\n"
