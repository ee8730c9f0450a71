"""How long to wait: deadlines that grow with the load of the machine; and what is done meanwhile."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

EMULATION_FACTOR = 4
"""A guest under TCG runs this many times slower, roughly."""


def scaled(seconds: float, *, emulated: bool = False) -> float:
    """``seconds`` on a quiet machine → seconds on this one, as loaded as it is now."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return seconds * max(1.0, load) * (EMULATION_FACTOR if emulated else 1)


class Deadline:
    """A point in time; ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0.0


@contextlib.contextmanager
def every(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Do ``action`` every so many seconds, not at once, in a thread beside the block, until that has ended."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, name="every", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
