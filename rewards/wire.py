"""Plain data as bytes, between processes of which one may be an enemy's; sent into the sandbox before `inside.py`.

It imports as little as it can, since it starts for every completion.
"""

import os
import select
import struct
import time

HEADER = struct.Struct("!Q")
MAX_FRAME = 1 << 22
MAX_DEPTH = 200
MAX_DIGITS = 20_000
ITERABLE = ("builtins", "collections", "itertools")
SEQUENCES: dict = {"l": list, "t": tuple, "S": set, "Z": frozenset, "I": iter}


class Gone(Exception):
    """The process at the other end has ended, or sends what is no message."""


def encode(value, keep=None, depth=0):
    """Return plain data as bytes: a letter for the kind, then digits, or a length or count and what it counts.

    Instances of subclasses become their built-in kind; what is no plain data becomes a handle by `keep`, or ValueError.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if value is None or value is True or value is False:
        return b"n" if value is None else b"T" if value else b"F"
    if isinstance(value, int):
        return b"i%s;" % int.__repr__(value).encode()
    if isinstance(value, float):
        return b"f%s;" % float.__repr__(value).encode()
    if isinstance(value, str):
        return _text(b"s", str.encode(value, "utf-8", "surrogatepass"))
    for letter, kind in (("l", list), ("t", tuple), ("S", set), ("Z", frozenset)):
        if isinstance(value, kind):
            return _many(letter, [encode(item, keep, depth + 1) for item in getattr(kind, "__iter__")(value)])  # noqa: B009
    if isinstance(value, dict):
        pairs = [(encode(k, keep, depth + 1), encode(v, keep, depth + 1)) for k, v in dict.items(value)]
        return _many("d", [k + v for k, v in pairs])
    if isinstance(value, (bytes, bytearray)):
        return _text(b"b", bytes(value))
    if isinstance(value, complex):
        return f"c{value.real!r},{value.imag!r};".encode()
    if hasattr(value, "__next__") or _is_collection(value):
        return _many("I", [encode(item, keep, depth + 1) for item in value])
    if keep is None:
        raise ValueError(f"{type(value).__name__} is no plain data")
    return b"h%d;" % keep(value)


def _is_collection(value):
    return type(value).__module__ in ITERABLE and hasattr(value, "__iter__") and not isinstance(value, type)


def _text(letter, data):
    return b"%s%d:%s" % (letter, len(data), data)


def _many(letter, items):
    return b"%s%d:%s" % (letter.encode(), len(items), b"".join(items))


def decode(data, make):
    """Return the data that `encode` wrote; `make(letter, items)` builds containers, complex numbers and handles.

    ValueError for anything else; it is written for data that an enemy made.
    """
    value, end = _decode(data, 0, make, 0)
    if end != len(data):
        raise ValueError("there is more")
    return value


def _decode(data, start, make, depth):
    letter = chr(data[start]) if start < len(data) and depth <= MAX_DEPTH + 1 else ""
    start += 1
    if letter in "nTF" and letter:
        return {"n": None, "T": True, "F": False}[letter], start
    end = data.index(b";" if letter in "ifch" else b":", start, start + MAX_DIGITS + 2)
    word = data[start:end].decode("ascii")
    if letter == "i":
        return int(word), end + 1
    if letter == "f":
        return float(word), end + 1
    if letter in ("c", "h"):
        real, _, imaginary = word.partition(",")
        return make(letter, [float(real), float(imaginary)] if letter == "c" else int(word)), end + 1
    count, start = int(word), end + 1
    if not 0 <= count <= len(data) - start:
        raise ValueError("it ends too soon")
    if letter in ("s", "b"):
        part = data[start : start + count]
        return (part.decode("utf-8", "surrogatepass") if letter == "s" else bytes(part)), start + count
    if letter != "d" and letter not in SEQUENCES:
        raise ValueError("no kind")
    items = []
    for _ in range(count):
        item, start = _decode(data, start, make, depth + 1)
        if letter == "d":
            value, start = _decode(data, start, make, depth + 1)
            item = (item, value)
        items.append(item)
    return make(letter, items), start


def builder(handle):
    """Return `decode`'s `make` for Python's own containers; `handle` makes what stands for a handle."""

    def make(letter, items):
        if letter == "h":
            return handle(items)
        if letter == "c":
            return complex(*items)
        return dict(items) if letter == "d" else SEQUENCES[letter](items)

    return make


def send(descriptor, message, keep=None):
    """Write one message."""
    data = encode(message, keep)
    data = HEADER.pack(len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor, make, deadline=None):
    """Return the next message; Gone at the end, for nonsense, and (with a deadline) when it does not come in time."""
    size = HEADER.unpack(_read(descriptor, HEADER.size, deadline))[0]
    if size > MAX_FRAME:
        raise Gone("its answer is too long")
    data = _read(descriptor, size, deadline)
    try:
        return decode(data, make)
    except (ValueError, TypeError, RecursionError) as error:
        raise Gone("its answer cannot be read") from error


def _read(descriptor, size, deadline):
    parts, missing = [], size
    while missing:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise Gone("time limit")
        try:
            part = os.read(descriptor, min(missing, 1 << 16))
        except OSError:
            part = b""
        if not part:
            raise Gone("it has ended")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
