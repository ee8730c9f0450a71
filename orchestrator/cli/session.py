"""What every command needs: which lab, its hosts, its agents."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.output import Format
from orchestrator.cli.progress import waiting
from orchestrator.errors import HostError, HostLostError, NotFoundError, OrchestratorError, SpecError
from orchestrator.hosts.opening import open_host
from orchestrator.hosts.rpc import Client, Stream
from orchestrator.hosts.transport import Transport, client
from orchestrator.plan.observe import observe
from orchestrator.plan.operations import ObservedLab
from orchestrator.spec.load import load
from orchestrator.spec.resolve import resolve
from orchestrator.spec.resolved import ResolvedGuest, ResolvedHost, ResolvedLab
from orchestrator.state import LabState, all_labs

DEFAULT_FILE = Path("lab.yaml")


def complete_guests(incomplete: str) -> list[str]:
    """Shell completion: guests of every lab that is up."""
    with contextlib.suppress(OrchestratorError):
        found = [name for lab in all_labs() for name in LabState(lab).get().guests]
        return [name for name in found if name.startswith(incomplete)]
    return []


def complete_hosts(incomplete: str) -> list[str]:
    """Shell completion: hosts of every lab that is up."""
    with contextlib.suppress(OrchestratorError):
        found = [name for lab in all_labs() for name in LabState(lab).get().hosts]
        return [name for name in found if name.startswith(incomplete)]
    return []


def complete_labs(incomplete: str) -> list[str]:
    return [lab for lab in all_labs() if lab.startswith(incomplete)]


FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", envvar="ORCHESTRATOR_FILE", help="The lab file. Default: lab.yaml here."),
]
LabOption = Annotated[
    str | None,
    typer.Option(
        "--lab", "-l", envvar="ORCHESTRATOR_LAB", help="A lab that is up, by name.", autocompletion=complete_labs
    ),
]
OutputOption = Annotated[
    Format, typer.Option("--output", "-o", envvar="ORCHESTRATOR_OUTPUT", help="How to print the result.")
]
WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again until Ctrl-C.")]
EveryOption = Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks.")]
HostArgument = Annotated[str, typer.Argument(help="Name of the host.", autocompletion=complete_hosts)]
GuestArgument = Annotated[str, typer.Argument(help="Name of the guest.", autocompletion=complete_guests)]


def wished(file: Path | None) -> tuple[ResolvedLab, LabState]:
    """The lab as its file wishes it, resolved with what was assigned before.

    :raise SpecError: the file is wrong.
    """
    loaded = load(file or DEFAULT_FILE)
    state = LabState(loaded.spec.lab)
    return resolve(loaded.spec, loaded.file.absolute(), state.load()), state


def current(file: Path | None, lab: str | None) -> tuple[ResolvedLab, LabState]:
    """The lab to look at: ``--lab``, else the one of the lab file, else the only one that is up.

    :raise NotFoundError: there is none, or there are several.
    """
    if lab is None and (file is not None or DEFAULT_FILE.exists()):
        lab = load(file or DEFAULT_FILE).spec.lab
    if lab is None:
        labs = all_labs()
        if len(labs) != 1:
            raise NotFoundError(
                f"several labs are up: {', '.join(labs)}" if labs else "no lab is up",
                hint="name one with --lab" if labs else "orchestrator up -f FILE",
            )
        lab = labs[0]
    state = LabState(lab)
    return state.get(), state


def _box(progress: Callable[[str], None]) -> str:
    from orchestrator import boxes  # only who makes a machine of Vagrant's needs it

    return boxes.ensure(progress)


@contextlib.contextmanager
def transports(lab: ResolvedLab) -> Iterator[dict[str, Transport]]:
    """Every host of the lab, also those that it had before and that are not cleared yet."""
    opened = {name: open_host(lab, name, _box) for name in {**lab.former_hosts, **lab.hosts}}
    try:
        yield opened
    finally:
        for transport in opened.values():
            transport.close()


def look(lab: ResolvedLab, hosts: Mapping[str, Transport], *, leaving: bool = False) -> ObservedLab:
    """What there is, for a command that holds the lab's lock; see :func:`~orchestrator.plan.observe.observe`."""
    with waiting("looking at the hosts") as progress:

        def told(host: str, text: str) -> None:
            progress(f"host {host}: {text}")

        return observe(lab, hosts.values(), holder=told, leaving=leaving)


def host_of(lab: ResolvedLab, name: str) -> ResolvedHost:
    """:raise NotFoundError: with the hosts that there are."""
    if name not in lab.hosts:
        raise NotFoundError(f"lab {lab.lab} has no host {name}", hint=f"its hosts: {', '.join(lab.hosts)}")
    return lab.hosts[name]


def agent_of(transport: Transport) -> Client:
    """A connection to the host's agent, which is started if it has died.

    :raise HostError: the host does not answer, or is not made yet.
    """
    with contextlib.suppress(HostLostError):
        return _greeted(client(transport))
    seen = transport.facts()
    if not seen.present or seen.broken:
        why = "; ".join(seen.problems) or "it is not there"
        raise HostError(f"host {transport.host.name}: {why}", hint="`orchestrator up` makes it")
    if not seen.agent:
        transport.start_agent()
    return client(transport)


def _greeted(agent: Client) -> Client:
    try:
        agent.call("host.hello")
    except HostLostError:
        agent.close()
        raise
    return agent


def guest_of(lab: ResolvedLab, name: str) -> ResolvedGuest:
    """:raise NotFoundError: with the guests that there are."""
    if name not in lab.guests:
        raise NotFoundError(
            f"lab {lab.lab} has no guest {name}", hint=f"its guests: {', '.join(lab.guests) or 'none'}"
        )
    return lab.guests[name]


class GuestSession:
    """One guest of a lab that is up, and the agent of its host."""

    def __init__(self, guest: str, file: Path | None, lab: str | None) -> None:
        self.lab, self.state = current(file, lab)
        self.guest = guest_of(self.lab, guest)
        self.transport = open_host(self.lab, self.guest.host)

    def __enter__(self) -> GuestSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()

    def call(self, method: str, progress: Callable[[str], None] | None = None, **params: Any) -> Any:
        with agent_of(self.transport) as agent:
            return agent.call(method, {"guest": self.guest.name, **params}, progress=progress)

    def open(self, method: str, **params: Any) -> Stream:
        """A raw stream about the guest."""
        return self.open_host(method, {"guest": self.guest.name, **params})

    def open_host(self, method: str, params: Mapping[str, Any]) -> Stream:
        """A raw stream of its host's agent, which is started if it has died."""

        def opened() -> Stream:
            return client(self.transport).open(method, params)[1]

        try:
            return opened()
        except HostLostError:
            agent_of(self.transport).close()
            return opened()


def refuse_other_file(state: LabState, lab: ResolvedLab, take_over: bool) -> None:
    """:raise SpecError: a lab of this name is up from another file, and would be changed into this one."""
    before = state.load()
    if before and before.file != lab.file and before.file.exists() and not take_over:
        raise SpecError(
            f"lab {lab.lab} is up from another file: {before.file}",
            hint="give this one another name (`lab:`), or make it follow this file with --take-over",
        )
