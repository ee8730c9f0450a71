"""Carrying a plan out: operations in parallel, as far as their needs allow.

An operation that fails stops what needs it and nothing else. When the user stops the command, what is under way is
given up, subjects that are half-made are rolled back, and what is whole stays.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from orchestrator.errors import CancelledError, ImageError, OrchestratorError
from orchestrator.guests import migration
from orchestrator.guests.domain import GuestImage
from orchestrator.hosts.rpc import Client
from orchestrator.hosts.transport import Transport, client
from orchestrator.images import store
from orchestrator.images.push import push
from orchestrator.images.store import Image
from orchestrator.plan.operations import MIGRATE, Impact, Operation, Plan
from orchestrator.spec.resolved import ResolvedLab

NEEDS_KEYS = frozenset({"guest.start", "guest.restart"})


class Reporter(Protocol):
    """Who is told how it goes; called from many threads."""

    def begin(self, operation: Operation) -> None: ...
    def progress(self, operation: Operation, text: str) -> None: ...
    def end(self, operation: Operation, seconds: float, error: OrchestratorError | None) -> None: ...


@dataclass
class Outcome:
    """What became of a plan."""

    done: list[Operation] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    """Operation's id → what its call returned."""
    failed: list[tuple[Operation, OrchestratorError]] = field(default_factory=list)
    skipped: list[Operation] = field(default_factory=list)
    rolled_back: list[Operation] = field(default_factory=list)
    cancelled: bool = False


class Executor:
    """Carries out the operations of one lab.

    :param bandwidth: MiB/s that a guest which moves may take; 0: no limit.
    """

    def __init__(
        self, lab: ResolvedLab, transports: Mapping[str, Transport], keys: list[str], *, bandwidth: int = 0
    ) -> None:
        self._lab = lab
        self._transports = transports
        self._keys = keys
        self._bandwidth = bandwidth
        self._images: dict[tuple[str, str], GuestImage] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def _lock_of(self, name: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(name, threading.Lock())

    def _agent(self, host: str) -> Client:
        with self._lock_of(f"agent of {host}"):
            return self._transports[host].agent()

    def call(
        self,
        host: str,
        method: str,
        params: Mapping[str, Any],
        progress: Callable[[str], None] = lambda _: None,
        cancel: threading.Event | None = None,
    ) -> Any:
        return self._agent(host).call(method, params, progress=progress, cancel=cancel)

    def image(self, name: str, host: str, progress: Callable[[str], None]) -> GuestImage:
        """The image's files on ``host``; copied there if the host does not see ours."""
        with self._lock_of(f"image {name} on {host}"):
            if (name, host) not in self._images:
                image = store.ensure(name, self._lab.images.get(name), base=self._lab.file.parent, progress=progress)
                self._images[name, host] = self._bring(image, host, progress)
            return self._images[name, host]

    def _bring(self, image: Image, host: str, progress: Callable[[str], None]) -> GuestImage:
        transport = self._transports[host]
        if not transport.shares_files:
            image = push(self._agent(host), lambda: client(transport), image, progress)
        return GuestImage(
            id=image.id,
            kernel=str(image.kernel) if image.kernel else None,
            initrd=str(image.initrd) if image.initrd else None,
            disk=str(image.disk) if image.disk else None,
            disk_format=image.disk_format,
            cmdline=image.cmdline,
            cloud_init=image.cloud_init,
            ready=image.ready,
        )

    def _image_of(self, guest: str, image_id: str, host: str, progress: Callable[[str], None]) -> GuestImage:
        """The image that a guest runs from, which need not be the one that it would be started from now.

        :raise ImageError: it is no longer in the cache.
        """
        name = self._lab.guests[guest].image
        known = store.find(name, self._lab.images.get(name), self._lab.file.parent)
        if known is not None and known.id == image_id:
            return self.image(name, host, progress)
        for image in store.all_images():
            if image.id == image_id:
                with self._lock_of(f"image {name} on {host}"):
                    return self._bring(image, host, progress)
        raise ImageError(
            f"guest {guest} runs from {image_id}, which is no longer in the cache",
            hint="it can stay where it is; `orchestrator up --yes` makes it anew from the present image",
        )

    def _migrate(
        self, operation: Operation, progress: Callable[[str], None], cancel: threading.Event
    ) -> dict[str, Any]:
        """Move a guest as it runs: a :class:`~orchestrator.guests.migration.Report` as JSON."""
        guest, target = str(operation.params["guest"]), str(operation.params["target"])

        def end(host: str) -> migration.End:
            return migration.End(self._agent(host), lambda: client(self._transports[host]))

        wanted = migration.Wanted(
            guest=guest,
            address=self._lab.hosts[target].underlay,
            image=self._image_of(guest, str(operation.params["image"]), target, progress),
            bandwidth=self._bandwidth,
            lose=tuple(operation.params["lose"]),
        )
        return migration.migrate(wanted, end(operation.host), end(target), progress, cancel).to_json()

    def carry_out(self, operation: Operation, progress: Callable[[str], None], cancel: threading.Event) -> Any:
        """What the agent's call returns.

        :raise OrchestratorError: it failed.
        """
        transport = self._transports.get(operation.host)
        if operation.method == "host.ensure":
            assert transport
            return transport.ensure(progress, cancel)
        if operation.method == "host.halt":
            assert transport
            transport.halt(progress)
        elif operation.method == "host.remove":
            assert transport
            transport.remove(progress)
        elif operation.method == "image.ensure":
            name = operation.params["name"]
            store.ensure(name, self._lab.images.get(name), base=self._lab.file.parent, progress=progress)
        elif operation.method == MIGRATE:
            return self._migrate(operation, progress, cancel)
        else:
            params = dict(operation.params)
            if operation.image:
                params["image"] = asdict(self.image(operation.image, operation.host, progress))
            if operation.method in NEEDS_KEYS:
                params["keys"] = self._keys
            return self.call(operation.host, operation.method, params, progress, cancel)
        return None


def apply(
    plan: Plan,
    executor: Executor,
    reporter: Reporter,
    *,
    jobs: int,
    stop: Callable[[], bool] = lambda: False,
    done: Callable[[Operation], None] = lambda _: None,
) -> Outcome:
    """Carry ``plan`` out with at most ``jobs`` operations at a time.

    :param stop: asked a few times a second; True gives up what is under way and rolls back what is half-made.
    :param done: called, in this thread, with each operation that has ended well.
    """
    return _Run(plan, executor, reporter, jobs, stop, done).run()


class _Run:
    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        reporter: Reporter,
        jobs: int,
        stop: Callable[[], bool],
        done: Callable[[Operation], None],
    ) -> None:
        self._stop = stop
        self._done = done
        self._waiting = list(plan.operations)
        self._executor = executor
        self._reporter = reporter
        self._jobs = jobs
        self._cancel = threading.Event()
        self._outcome = Outcome()
        self._finished: set[str] = set()
        self._given_up: set[str] = set()

    def run(self) -> Outcome:
        with concurrent.futures.ThreadPoolExecutor(self._jobs, "apply") as pool:
            try:
                self._work(pool)
            except BaseException:
                self._cancel.set()  # the pool waits for what is under way
                raise
        self._outcome.cancelled = self._cancel.is_set()
        if self._outcome.cancelled:
            self._outcome.skipped += self._waiting
            self._roll_back()
        return self._outcome

    def _work(self, pool: concurrent.futures.ThreadPoolExecutor) -> None:
        running: dict[concurrent.futures.Future[Any], Operation] = {}
        while True:
            while len(running) < self._jobs and (operation := self._next()):
                running[pool.submit(self._one, operation)] = operation
            if not running:
                break
            if not self._cancel.is_set() and self._stop():
                self._cancel.set()
            done, _ = concurrent.futures.wait(running, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                self._settle(running.pop(future), future)

    def _next(self) -> Operation | None:
        """An operation whose needs are met; those that can never be are dropped on the way."""
        if self._cancel.is_set():
            return None
        for operation in list(self._waiting):
            if self._given_up.intersection(operation.needs):  # needs stand before: one pass finds all that follow
                self._waiting.remove(operation)
                self._given_up.add(operation.id)
                self._outcome.skipped.append(operation)
            elif self._finished.issuperset(operation.needs):
                self._waiting.remove(operation)
                return operation
        return None

    def _one(self, operation: Operation) -> Any:
        self._reporter.begin(operation)
        began = time.monotonic()
        failure: OrchestratorError | None = None
        try:
            return self._executor.carry_out(
                operation, lambda text: self._reporter.progress(operation, text), self._cancel
            )
        except OrchestratorError as error:
            failure = error
            raise
        except Exception as error:
            failure = OrchestratorError(f"{operation.subject}: {error!r}", hint="this is a defect: please report it")
            raise failure from error
        finally:
            self._reporter.end(operation, time.monotonic() - began, failure)

    def _settle(self, operation: Operation, future: concurrent.futures.Future[Any]) -> None:
        error = future.exception()
        if error is None:
            self._finished.add(operation.id)
            self._outcome.done.append(operation)
            self._outcome.results[operation.id] = future.result()
            self._done(operation)
            return
        self._given_up.add(operation.id)
        if isinstance(error, CancelledError):
            self._outcome.skipped.append(operation)
        elif isinstance(error, OrchestratorError):
            self._outcome.failed.append((operation, error))
        else:
            raise error

    def _roll_back(self) -> None:
        """Take back the finished steps of subjects that were being made and did not get whole."""
        unfinished = {
            operation.subject
            for operation in self._outcome.skipped
            if (operation.impact == Impact.CREATE and operation.undo) or operation.method == MIGRATE
        }
        for operation in reversed(self._outcome.done):
            if operation.undo and operation.subject in unfinished:
                with contextlib.suppress(OrchestratorError):
                    self._executor.call(operation.host, operation.undo.method, operation.undo.params)
                    self._outcome.rolled_back.append(operation)
