"""A stream as standard input and output: how an SSH connection carries an agent's stream, and ``ssh`` a guest's."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

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
