"""Messages between processes: eight bytes of length, then JSON. Never pickle: what a worker says is not trusted."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_HEADER = struct.Struct("!Q")


def plain(value: Any) -> Any:
    """Return `value` as JSON's types for json.dumps: arrays as lists, sets sorted by text, anything else as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)


def frame(message: Any) -> bytes:
    """Return a message as bytes; TypeError, ValueError or RecursionError for what JSON cannot hold."""
    body = json.dumps(message, default=plain).encode()
    return _HEADER.pack(len(body)) + body


def announced(data: bytes | bytearray) -> int | None:
    """Return the length of the body that `data` begins with; None before its header has arrived."""
    return _HEADER.unpack_from(data)[0] if len(data) >= _HEADER.size else None


def split(data: bytearray) -> Any:
    """Take the first message off `data` and return it; None while it is incomplete."""
    size = announced(data)
    if size is None or len(data) < _HEADER.size + size:
        return None
    body = bytes(data[_HEADER.size : _HEADER.size + size])
    del data[: _HEADER.size + size]
    return json.loads(body)


def receive(connection: socket.socket) -> Any:
    """Return the next message, waiting for it; None when the other end has closed."""
    data = bytearray()
    while (message := split(data)) is None:
        size = announced(data)
        missing = _HEADER.size - len(data) if size is None else _HEADER.size + size - len(data)
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            return None
        data += part
    return message
