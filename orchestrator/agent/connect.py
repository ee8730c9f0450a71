"""A stream as standard input and output: how an SSH connection carries an agent's stream, and ``ssh`` a guest's.

``python -m orchestrator.agent.connect UID HOST`` runs on the host, for each command once or more: it imports little.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import select
import socket
import sys
from typing import TYPE_CHECKING

from orchestrator import names

if TYPE_CHECKING:
    from orchestrator.hosts.rpc import Stream


def carry(stream: Stream, source: int = 0, target: int = 1) -> None:
    """Copy ``source`` to the stream and the stream to ``target`` until the stream ends. The end of ``source`` is
    passed on; what still comes the other way is carried to its end."""
    poller = select.poll()
    poller.register(source, select.POLLIN | select.POLLHUP)
    poller.register(stream.fileno(), select.POLLIN | select.POLLHUP)
    while True:
        for fd, _ in poller.poll():
            if fd == source:
                data = os.read(source, 1 << 16)
                if data:
                    stream.sendall(data)
                else:
                    poller.unregister(source)
                    if isinstance(stream, socket.socket):
                        stream.shutdown(socket.SHUT_WR)
            else:
                data = stream.recv(1 << 16)
                if not data:
                    return
                while data:
                    data = data[os.write(target, data) :]


def main(uid: str, host: str) -> None:
    """The stream of the agent of a lab's host."""
    path = names.runtime_dir(uid, host) / names.AGENT_SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        try:
            stream.connect(str(path))
        except OSError as error:
            sys.exit(f"no agent answers at {path}: {error.strerror}")
        carry(stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
