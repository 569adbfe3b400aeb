"""Frozen dataclasses to and from JSON: what a run's `config.json` holds, and how two configs differ."""

import collections.abc
import dataclasses
import enum
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import ConfigError, nearest, shown
from jaxlm.core.json_files import number


def to_dict(config: Any) -> Any:
    """A dataclass (nested ones, tuples, lists and dicts too) as plain JSON types."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if isinstance(config, enum.Enum):
        return to_dict(config.value)
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    return str(config)


def from_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict` for dataclass `cls`.

    Absent fields take their defaults; unknown ones, and values of another type than the field's, raise `ConfigError`
    that names the field.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object with fields of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}: no field '{name}' in {cls.__name__}: {nearest(name, fields)}")
    given = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**given)
    except ConfigError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value`, as JSON holds it, as the type that a field has. Types that JSON does not know are left to the class."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(args[0], value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            raise ConfigError(f"{where} is {shown(value)}: {nearest(shown(value), args)}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    base = origin or hint
    if base in (tuple, list, collections.abc.Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {shown(value)}, expected a list")
        if base is tuple and args and args[-1] is not Ellipsis:
            if len(args) != len(value):
                raise ConfigError(f"{where} has {len(value)} entries, expected {len(args)}")
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
        items = (_convert(args[0], v, f"{where}[{i}]") if args else v for i, v in enumerate(value))
        return list(items) if base is list else tuple(items)
    if isinstance(base, type) and issubclass(base, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {shown(value)}, expected an object")
        return {k: _convert(args[1], v, f"{where}.{k}") if args else v for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if type(value) in options:  # an int stays one where a float would do as well
        return value
    dataclass_options = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(value, Mapping) and dataclass_options:
        fitting = [o for o in dataclass_options if set(value) <= {f.name for f in dataclasses.fields(o)}]
        return from_dict((fitting or dataclass_options)[0], value, where)
    problems = []
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            problems.append(error)
    raise problems[0]


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float:
        value = number(value)  # not finite ones are text in JSON
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1023:
            return float(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in [member.value for member in hint]:
            raise ConfigError(f"{where} is {shown(value)}: {nearest(str(value), [m.value for m in hint])}")
        return hint(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is Path and not isinstance(value, Path):
        raise ConfigError(f"{where} is {shown(value)}, expected a path")
    if hint in (bool, int, float, str, type(None)) and type(value) is not hint:
        expected = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(hint, "nothing")
        raise ConfigError(f"{where} is {shown(value)}, expected {expected}")
    return value


def fingerprint(value: Any, length: int = 16) -> str:
    """A hex digest of a config (or any JSON-able value); equal values give equal digests everywhere."""
    text = json.dumps(to_dict(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """One line per field that differs, as `"optimizer.learning_rate: 0.001 -> 0.002"`."""
    old, new = to_dict(old), to_dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(set(old) | set(new)):
            path = f"{prefix}.{key}" if prefix else key
            if key not in old:
                lines.append(f"{path}: (absent) -> {new[key]!r}")
            elif key not in new:
                lines.append(f"{path}: {old[key]!r} -> (absent)")
            else:
                lines.extend(differences(old[key], new[key], path))
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
