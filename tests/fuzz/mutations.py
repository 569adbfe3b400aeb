"""Damage: strategies of `hypothesis` that make broken versions of valid bytes, texts and JSON values."""

import copy
import json
import math
import struct
from typing import Any

from hypothesis import strategies as st

_SIZES = (1, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
CHUNKS = (
    *(struct.pack("<Q", n) for n in _SIZES),
    *(struct.pack("<I", n & 0xFFFFFFFF) for n in _SIZES),
    *(struct.pack("<f", x) for x in (math.nan, math.inf, -1.0, 1e-40)),
    *(b"\0", b"\xff", b"\x80", b"\n", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e999", b"9" * 5000),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"null", b"../", b"\\ud800", b"[" * 5000, b'{"a":' * 3000, b"A" * 300),
)
"""What parsers stumble over: sizes beyond the file, numbers that are none, halves of characters, depth."""

JUNK = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**63, 2**64, 10**40, 0.5, -0.5, 1e-300, 1e300),
    *(math.nan, math.inf, "", "x", "\0", "\ud800", "../../etc/passwd", "/etc/passwd", "NaN", "9" * 400, "a" * 3000),
    *([], {}, [[]], [{}], {"": None}, [0] * 50, ["a", "b"], {"a": {"b": {"c": []}}}, "auto", "float32", "{{", "\u2581"),
)
"""Values that a reader of JSON may find where it expects others."""


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Valid bytes after one to four edits: bits flipped, chunks put in or over, stretches cut or doubled."""
    edit = st.tuples(
        st.sampled_from(("flip", "over", "insert", "delete", "double", "cut")),
        st.integers(0, len(valid)) | st.integers(0, min(64, len(valid))),
        st.sampled_from(CHUNKS) | st.binary(max_size=6),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edited(valid, edits))


def _edited(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, chunk in edits:
        at = min(at, len(data))
        before, after = data[:at], data[at:]
        if kind == "flip":
            data = before + bytes(b ^ (1 << (len(chunk) % 8)) for b in after[:1]) + after[1:]
        elif kind == "over":
            data = before + chunk + after[len(chunk) :]
        elif kind == "insert":
            data = before + chunk + after
        elif kind == "delete":
            data = before + after[1 + len(chunk) % 40 :]
        elif kind == "double":
            data = before + after[: 1 + len(chunk) * 3] + after
        else:
            data = before
    return data


def damaged_value(valid: Any, *more: Any) -> st.SearchStrategy[Any]:
    """A JSON value (or one of several) after one to three edits of its nodes."""
    edit = st.tuples(
        st.sampled_from(("replace", "replace", "delete", "rename", "double", "wrap")),
        st.integers(0, 10_000),
        st.sampled_from(JUNK),
    )
    return st.tuples(st.sampled_from((valid, *more)), st.lists(edit, min_size=1, max_size=3)).map(
        lambda case: _edited_value(copy.deepcopy(case[0]), case[1])
    )


def _edited_value(value: Any, edits: list[tuple[str, int, Any]]) -> Any:
    root = [value]
    for kind, index, junk in edits:
        nodes = list(_nodes(root))
        holder, key = nodes[index % len(nodes)]
        junk = copy.deepcopy(junk)
        if kind == "replace" or holder is root:
            holder[key] = junk
        elif kind == "delete":
            del holder[key]
        elif kind == "wrap":
            holder[key] = [holder[key]]
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[str(junk)[:20]] = holder.pop(key) if kind == "rename" else copy.deepcopy(holder[key])
    return root[0]


def _nodes(holder: Any):
    for key in list(range(len(holder)) if isinstance(holder, list) else holder):
        yield holder, key
        if isinstance(holder[key], (list, dict)):
            yield from _nodes(holder[key])


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and halves of characters included."""
    return json.dumps(value).encode()


def damaged_json(valid: Any, *more: Any) -> st.SearchStrategy[bytes]:
    """JSON of a damaged value, or damaged JSON of a valid one."""
    return damaged_value(valid, *more).map(as_json) | damaged(as_json(valid))
