"""JSON as run folders hold it: strict (a NaN is the text "NaN"), written whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any

from jaxlm.core.errors import DataError
from jaxlm.core.temporary import beside

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text that every reader accepts. Arrays of no dimension become numbers, NaN and infinities text."""
    text = json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)
    # Half a surrogate pair, which a sample may hold, becomes its JSON escape.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def number(value: Any) -> Any:
    """The number that `dumps` wrote as text (`"NaN"` -> nan), or that a scalar array holds; else `value`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def read_json(path: Path | str) -> Any:
    """The value in a JSON file.

    Raises:
      DataError: the file is missing, cannot be read or is not JSON; names the file, line and column.
    """
    return parse_json(_read(path), str(path))


def read_object(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file; `DataError` as `read_json`, and if it holds another kind of value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of JSON text; `where` names it in errors.

    Raises `DataError` for what is not JSON, and for what Python's parser does not take: brackets nested a thousand
    deep, integers of more than 4300 digits.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} line {error.lineno} column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON that can be read: nested too deep") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON that can be read: {error}") from error


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file; `DataError` where there is none, or it is not UTF-8."""
    try:
        return _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error


def write_json(path: Path | str, value: Any) -> None:
    """Replaces a JSON file in one move: a reader, or a killed writer, never leaves half of it."""
    write_text(path, dumps(value, indent=1) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Replaces a text file in one move."""
    path = Path(path)
    with beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{path}: cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    value = number(value) if not isinstance(value, str) else value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
