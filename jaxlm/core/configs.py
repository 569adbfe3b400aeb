"""Frozen dataclasses to and from JSON: what a run's `config.json` holds, and how two configs differ."""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxlm.core.errors import ConfigError, nearest


def to_dict(config: Any) -> Any:
    """A dataclass (nested ones, tuples, lists and dicts too) as plain JSON types."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    return str(config)


def from_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict` for dataclass `cls`.

    Absent fields take their defaults; unknown ones raise `ConfigError` with the nearest valid name.
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
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [a for a in args if a is not type(None)]
        dataclass_options = [a for a in options if dataclasses.is_dataclass(a)]
        if isinstance(value, Mapping) and dataclass_options:
            for option in dataclass_options:
                if set(value) <= {f.name for f in dataclasses.fields(option)}:
                    return from_dict(option, value, where)
            return from_dict(dataclass_options[0], value, where)
        return _convert(options[0], value, where) if len(options) == 1 else value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        if origin is tuple and args and args[-1] is not Ellipsis:
            return tuple(_convert(a, v, where) for a, v in zip(args, value, strict=True))
        return origin(_convert(args[0], v, where) if args else v for v in value)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {k: _convert(args[1], v, f"{where}.{k}") if args else v for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
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
