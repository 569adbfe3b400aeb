"""Values between the process that tests and the process that is tested: plain data by value, the rest by handle.

Frames are a length and JSON, so that reading one can build nothing but plain data. What comes from the tested
process is therefore never an object with methods of its own: a list that arrives is a list, and an object whose
`__eq__` always says yes arrives as a handle, equal to nothing else.
"""

import collections
import decimal
import fractions
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

MAX_FRAME = 64 << 20
MUTABLE = (list, dict, set, bytearray, collections.deque)


class WireError(Exception):
    """A frame that is not one, a value that cannot travel, or a channel that was closed."""


def send(channel: socket.socket, message: dict) -> None:
    """Sends one message."""
    data = json.dumps(message).encode()
    if len(data) > MAX_FRAME:
        raise WireError(f"a value of {len(data)} bytes, more than {MAX_FRAME}")
    try:
        channel.sendall(struct.pack("!I", len(data)) + data)
    except OSError as error:
        raise WireError("the channel is closed") from error


def receive(channel: socket.socket) -> dict:
    """The next message; `WireError` where there is none."""
    (length,) = struct.unpack("!I", _exactly(channel, 4))
    if length > MAX_FRAME:
        raise WireError(f"a frame of {length} bytes, more than {MAX_FRAME}")
    try:
        message = json.loads(_exactly(channel, length))
    except (ValueError, RecursionError) as error:
        raise WireError("a frame that is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a frame that is not an object")
    return message


def encode(value: Any, handle: Callable[[Any], list]) -> Any:
    """The JSON form of a value; `handle(object)` gives that of one that is not plain data.

    Instances of subclasses of plain types travel as the plain type, so an `IntEnum` is an int and a named tuple a
    tuple.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        value = int.__index__(value)
        return value if abs(value) < 1 << 53 else ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return [_base(value, (bytes, bytearray)), bytes(value).hex()]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        kind = _base(value, (list, tuple, set, frozenset, collections.deque))
        return [kind, *(encode(item, handle) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([encode(k, handle), encode(v, handle)] for k, v in value.items())]
    if isinstance(value, range):
        return ["range", *(encode(n, handle) for n in (value.start, value.stop, value.step))]
    if isinstance(value, fractions.Fraction):
        return ["Fraction", encode(value.numerator, handle), encode(value.denominator, handle)]
    if isinstance(value, decimal.Decimal):
        return ["Decimal", str(value)]
    return handle(value)


def decode(form: Any, resolve: Callable[[int, str], Any]) -> Any:
    """The value of a JSON form; `resolve(number, type name)` gives that of a handle."""
    if not isinstance(form, list):
        if isinstance(form, (dict, float)):
            raise WireError("a value in no known form")
        return form
    try:
        kind, *items = form
        if kind in _COLLECTIONS:
            return _COLLECTIONS[kind](decode(item, resolve) for item in items)
        if kind == "dict":
            return {decode(k, resolve): decode(v, resolve) for k, v in items}
        if kind in _SCALARS:
            return _SCALARS[kind](*(decode(item, resolve) for item in items))
        if kind == "object":
            number, name = items
            return resolve(int(number), str(name))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise WireError(f"a value in no known form: {error}") from error
    raise WireError(f"a value of unknown kind {kind!r}")


_COLLECTIONS: dict[str, Callable] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
_SCALARS: dict[str, Callable] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": range,
    "Fraction": fractions.Fraction,
    "Decimal": decimal.Decimal,
}


def _base(value: Any, kinds: tuple[type, ...]) -> str:
    return next(kind.__name__ for kind in kinds if isinstance(value, kind))


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        try:
            part = channel.recv(min(count, 1 << 20))
        except OSError as error:
            raise WireError("the channel is closed") from error
        if not part:
            raise WireError("the channel is closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
