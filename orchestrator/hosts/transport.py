"""How a host is reached. Everything above this module is the same for every kind of host."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from orchestrator.hosts.rpc import Client, Progress, Stream
from orchestrator.spec.resolved import ResolvedHost


@dataclass(frozen=True)
class HostFacts:
    """What can be seen of a host without its agent.

    :param present: the host can be worked on: its namespace exists, or it answers to SSH.
    :param agent: its agent answers.
    :param problems: what differs from the wish, in words; empty when nothing does.
    :param broken: parts of it are missing, so that no agent can be there until :meth:`Transport.ensure` mends it.
    :param outdated: its toolkit is not ours, so that calls may fail until :meth:`Transport.ensure` has replaced it.
    :param restart: :meth:`Transport.ensure` restarts it, as what differs cannot be changed while it runs.
    """

    present: bool = False
    agent: bool = False
    problems: tuple[str, ...] = ()
    broken: bool = False
    outdated: bool = False
    restart: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Transport(Protocol):
    """One host of one lab."""

    host: ResolvedHost
    shares_files: bool
    """The host sees this machine's files at the same paths, so that images need not be copied."""
    disposable: bool
    """Removing the host removes all that is on it."""

    def facts(self) -> HostFacts:
        """:raise HostError: the host does not answer."""

    def ensure(self, progress: Progress, cancel: threading.Event | None = None) -> str | None:
        """Make the host and its agent; does nothing where all is as wished.

        :param cancel: when it is set, what takes long is given up.
        :return: what the user has to know of how it was made, if anything.
        :raise HostError: the host does not answer, or the agent does not start.
        :raise TakenError: a name that we need belongs to somebody else.
        """

    def start_agent(self) -> None:
        """Start the agent of a host that is there.

        :raise HostError: it does not start.
        """

    def halt(self, progress: Progress) -> None:
        """Power the host off, where it is a machine of ours."""

    def remove(self, progress: Progress) -> None:
        """Stop the agent and remove all that :meth:`ensure` made; does nothing where there is nothing."""

    def stream(self) -> Stream:
        """A new byte stream to the agent.

        :raise HostError: there is no agent, or the host does not answer.
        """

    def agent(self) -> Client:
        """The connection to the agent that all calls of a command may share; a new one where that has ended.

        Only one thread at a time may ask for it.

        :raise HostError: there is no agent, or the host does not answer.
        """

    def close(self) -> None: ...


def client(transport: Transport) -> Client:
    """A new connection to the host's agent."""
    return Client(transport.stream(), transport.host.name)


class SharedAgent(Transport, Protocol):
    """The connection of :meth:`Transport.agent`, for transports to inherit."""

    _agent: Client | None = None

    def agent(self) -> Client:
        if self._agent is None or self._agent.ended:
            self._agent = client(self)
        return self._agent

    def forget_agent(self) -> None:
        """Close the connection: the agent is another one from now on, or gone."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def close(self) -> None:
        self.forget_agent()
