"""Messages between worker, zygote and supervisor: a length (4 bytes), then JSON. Never pickle."""

from __future__ import annotations

import json
import socket
import struct

_LENGTH = struct.Struct("!I")


def send(connection: socket.socket, message: dict) -> None:
    """Send one message of at most 4 GiB. Raises: OSError if the other end is gone."""
    data = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> dict:
    """Wait for one message. Raises: EOFError if the other end is gone, TimeoutError if it is silent."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
