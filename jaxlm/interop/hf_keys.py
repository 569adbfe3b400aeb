"""Keys of a Hugging Face `config.json`, taken one by one, and what families share: activation, rotation, windows.

Where a key was renamed over the years, both names are read, and they may not contradict each other.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.core.errors import ConfigError, nearest, shown
from jaxlm.layers.rotary import RopeScaling
from jaxlm.models import DecoderConfig
from jaxlm.models.config import MOST_LAYERS

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}
_ABSENT = object()
_MOST = 1 << 53


class Keys:
    """A `config.json` that is taken apart key by key; what is left at the end is looked at."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str = ""):
        self._left = {**defaults, **values}
        self._where = where

    def get(self, name: str, default: Any = _ABSENT, kind: Any = (int, float), zero: bool = False) -> Any:
        """The value of a key, removed; `null` is the default (an error where there is none).

        Numbers must be positive, or zero where `zero` says so.
        """
        value = self._left.pop(name, None)
        if value is None:
            if default is _ABSENT:
                raise ConfigError(f"config.json lacks '{self._where}{name}'")
            return default
        if isinstance(value, bool) and kind is not bool or not isinstance(value, kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(f"config.json: '{self._where}{name}' is {value!r}, expected {names}")
        if isinstance(value, int) and value >= _MOST:
            raise ConfigError(f"config.json: '{self._where}{name}' is {shown(value)}, expected less than {_MOST}")
        if isinstance(value, (int, float)) and kind is not bool and not (math.inf > value > 0 or (zero and value == 0)):
            raise ConfigError(f"config.json: '{self._where}{name}' is {value!r}, expected a positive number")
        return value

    def integer(self, name: str, default: Any = _ABSENT, zero: bool = False) -> Any:
        return self.get(name, default, int, zero)

    def flag(self, name: str, default: bool = False) -> bool:
        return self.get(name, default, bool)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a key whose value asks for what we do not compute."""
        value = self._left.pop(name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"config.json: '{self._where}{name}' is {value!r}, which is not supported")

    def peek(self, name: str) -> int:
        """An integer that is read again later."""
        value = self.integer(name)
        self._left[name] = value
        return value

    def unread(self) -> dict[str, Any]:
        """Keys nobody asked for that hold something."""
        return {name: value for name, value in self._left.items() if value not in (None, False, [], {})}


def num_layers(keys: Keys) -> int:
    """The number of layers, which is read again later: of a size that lists by layer may have."""
    layers = keys.peek("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise ConfigError(f"config.json: 'num_hidden_layers' is {layers}, expected at most {MOST_LAYERS}")
    return layers


def activation(keys: Keys, *names: str, known: Mapping[str, str] = ACTIVATIONS) -> str:
    """Of the keys that may name it, those that do must agree."""
    given = {name: value for name in names if (value := keys.get(name, None, str)) is not None}
    for name, value in given.items():
        if value not in known:
            raise ConfigError(f"config.json: '{name}' is '{value}': {nearest(value, known)}")
    found = {known[value] for value in given.values()}
    if len(found) != 1:
        raise ConfigError(f"config.json: the activation is given as {given}, expected one")
    return found.pop()


def activation_name(config: DecoderConfig, tanh: str = "gelu_pytorch_tanh") -> str:
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": tanh, "relu": "relu", "relu_squared": "relu2"}
    return names[config.activation]


def rope_dict(keys: Keys) -> dict[str, Any]:
    """`rope_parameters`, or `rope_scaling` as it was called."""
    new, old = (keys.get(name, {}, dict) for name in ("rope_parameters", "rope_scaling"))
    if new and old and new != old:
        raise ConfigError(f"config.json: rope_parameters is {new} and rope_scaling {old}, expected one of them")
    return dict(new or old)


def rotation(rope: Mapping[str, Any], theta: float, max_length: int, partial: bool = False) -> dict[str, Any]:
    """Our fields from a dict of theirs; `theta` holds where it does not say. `partial`: a part may be rotated."""
    keys = Keys(rope, {}, "rope_parameters.")
    out: dict[str, Any] = {"rope_theta": float(keys.get("rope_theta", theta))}
    if partial:
        out["rope_fraction"] = float(keys.get("partial_rotary_factor"))
    keys.only("partial_rotary_factor", None, 1)
    kinds = {keys.get(name, None, str) for name in ("rope_type", "type")} - {None}
    if len(kinds) > 1:
        raise ConfigError(f"config.json: rope_parameters has rope_type and type, and they differ: {sorted(kinds)}")
    kind = kinds.pop() if kinds else "default"
    if kind != "default":
        out["rope_scaling"] = _scaling(kind, keys, max_length)
    for name, value in keys.unread().items():
        raise ConfigError(f"config.json: 'rope_parameters.{name}' is {value!r}, which rope type '{kind}' has not")
    return out


def _scaling(kind: str, keys: Keys, max_length: int) -> RopeScaling:
    if kind in ("linear", "dynamic"):
        keys.only("original_max_position_embeddings", None, max_length)
        return RopeScaling(kind, float(keys.get("factor")), max_length)
    if kind not in ("llama3", "yarn"):
        options = ("default", "linear", "dynamic", "llama3", "yarn")
        raise ConfigError(f"config.json: rope type '{kind}' is not supported: {nearest(kind, options)}")
    original = keys.integer("original_max_position_embeddings", max_length)
    if kind == "llama3":
        low, high = float(keys.get("low_freq_factor")), float(keys.get("high_freq_factor"))
        return RopeScaling(kind, float(keys.get("factor")), original, low, high)
    factor = float(keys.get("factor", max_length / original))
    keys.only("truncate", None, True)
    one, all_dims = keys.get("mscale", 0, zero=True), keys.get("mscale_all_dim", 0, zero=True)
    gain = keys.get("attention_factor", None)
    if gain is None and one and all_dims and factor > 1:
        gain = (0.1 * one * math.log(factor) + 1) / (0.1 * all_dims * math.log(factor) + 1)
    fast, slow = float(keys.get("beta_fast", 32)), float(keys.get("beta_slow", 1))
    return RopeScaling(kind, factor, original, beta_fast=fast, beta_slow=slow, attention_factor=gain)


def flat_rotation(keys: Keys, max_length: int) -> dict[str, Any]:
    rope = rope_dict(keys)
    old = keys.get("rope_theta", None)
    if old is not None and rope.get("rope_theta") not in (None, old):
        raise ConfigError(f"config.json: rope_theta is {old} and {rope['rope_theta']} in rope_parameters")
    return rotation(rope, 10_000.0 if old is None else old, max_length)


def scaling_keys(s: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling`, the old key, which old and new versions read."""
    if s is None:
        return None
    out = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = s.original_length
    if s.kind == "llama3":
        out |= {"low_freq_factor": s.low_frequency_factor, "high_freq_factor": s.high_frequency_factor}
    if s.kind == "yarn":
        out |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        out |= {} if s.attention_factor is None else {"attention_factor": s.attention_factor}
    return out


def position_key(c: DecoderConfig) -> int:
    """Dynamic scaling counts from the context length; the one it makes out of that has no key."""
    dynamic = c.rope_scaling is not None and c.rope_scaling.kind == "dynamic"
    return c.rope_scaling.original_length if dynamic else c.max_length


def window_pattern(keys: Keys, num_layers: int) -> tuple[bool, ...] | None:
    """Which layers have the window, from `layer_types`, as one period of it."""
    types = keys.get("layer_types", None, list)
    if types is None:
        return None
    known = {"full_attention": False, "sliding_attention": True}
    for name in types:
        if not isinstance(name, str) or name not in known:
            raise ConfigError(f"config.json: 'layer_types' has '{name}': {nearest(str(name), known)}")
    if len(types) != num_layers:
        raise ConfigError(f"config.json: 'layer_types' has {len(types)} entries, expected {num_layers}")
    marks = tuple(known[name] for name in types)
    return next(marks[:n] for n in range(1, len(marks) + 1) if all(m == marks[i % n] for i, m in enumerate(marks)))


def layer_types(c: DecoderConfig) -> list[str]:
    return ["full_attention" if kind.window is None else "sliding_attention" for kind in c.layer_kinds()]
