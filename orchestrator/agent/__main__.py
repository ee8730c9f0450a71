"""``python -m orchestrator.agent``: the agent of one host of one lab.

Two processes. The first one stays small: it adopts and reaps the QEMU processes that libvirt detaches (not every
machine has an init that reaps at once, and libvirt waits for that), and starts the second one again if it dies. The
second one, :mod:`orchestrator.agent.serve`, does the work. Guests outlive both.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MS_BIND = 4096
RESTARTS, WITHIN_SECONDS = 5, 60.0

log = logging.getLogger("orchestrator.agent")


def _libc(call: str, *args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="orchestrator agent", description="The agent of one host of one lab.")
    for name in ("lab", "uid", "host", "run-dir", "state-dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--libvirt", choices=("system", "embed"), required=True)
    parser.add_argument("--own-mounts", action="store_true", help="the mount namespace is the agent's own")
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    return parser.parse_args()


def _hide_kvm() -> None:
    """Where KVM does not work, keep libvirt from finding /dev/kvm: it would probe QEMU anew at every step, because
    what root finds and what QEMU's user finds differ. Only in a mount namespace of our own."""
    from orchestrator.hosts import accel

    if accel.KVM.exists():
        _libc("mount", str(accel.no_kvm()).encode(), str(accel.KVM).encode(), None, MS_BIND, None)


def supervise(args: argparse.Namespace) -> int:
    from orchestrator.hosts import accel, agentproc

    agentproc.write_owner(Path(args.run_dir), args.uid, args.lab, args.host, os.getpid())
    _libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if args.own_mounts and args.libvirt == "embed" and (verdict := accel.probe()).kind != "kvm":
        accel.inherit(verdict)
        _hide_kvm()
    parent, child, stopping = os.getpid(), 0, False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        if child:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    starts: list[float] = []
    while not stopping:
        starts = [moment for moment in starts if time.monotonic() - moment < WITHIN_SECONDS] + [time.monotonic()]
        if len(starts) > RESTARTS:
            log.error("the agent died %d times within %.0f s: giving up", RESTARTS, WITHIN_SECONDS)
            return 1
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _libc("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                return 1
            from orchestrator.agent.serve import serve

            serve(args)
            os._exit(0)
        while (ended := os.wait())[0] != child:
            pass
        child = 0
        if not stopping:
            log.warning("the agent ended (%s): starting it again", os.waitstatus_to_exitcode(ended[1]))
    return 0


def main() -> None:
    logging.basicConfig(
        level=os.environ.get("ORCHESTRATOR_AGENT_LOG", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    sys.exit(supervise(_arguments()))


if __name__ == "__main__":
    main()
