"""What a caller may look at and change inside a running model: taps, edits, extra keys and values.

Blocks have named sites. A *tap* reduces the activation at a site inside the layer scan, so that nothing larger than
its result is ever stored. An *edit* scales and shifts it. Neither exists in the compiled program unless asked for.

Sites of a decoder block: `resid` (its input), `attn_in`, `attn_weights` (taps only), `attn_out`, `mlp_in`, `mlp_out`,
and the input of each kernel, as `attention/query.input`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from jaxlm.core.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Tap:
    """`reduce(activation)` at a site, for all layers or only those named.

    The results come back stacked, `[layers, ...]` or `[len(layers), ...]` in the order of `layers`. With `layers`,
    only their results are kept in memory.
    """

    reduce: Callable[[jax.Array], Any]
    layers: tuple[int, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """`activation * scale + shift`, each broadcastable to `[layers, batch, length, features]` (four axes)."""

    scale: Float[Array, "layers batch length features"] | None = None
    shift: Float[Array, "layers batch length features"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExtraKeys:
    """Keys and values attended to beside a layer's own, under the same softmax.

    `k`, `v`: `[layers, batch, keys, kv_heads, head_dim]`, or `[layers, batch, length, keys, kv_heads, head_dim]` when
    each query has its own. Keys are taken as they are (rotate them first if they have positions). `allowed`: which
    of them count, `[batch, keys]`. `bias`: added to their attention logits, `[batch, keys]`.
    """

    k: Array
    v: Array
    allowed: Bool[Array, "batch keys"] | None = None
    bias: Float[Array, "batch keys"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """All of the above for one call of a model's trunk."""

    taps: Mapping[str, Tap] = dataclasses.field(default_factory=dict, metadata={"static": True})
    edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    key_bias: Float[Array, "batch length"] | None = None
    """Added to the attention logits of the call's own keys, in every layer."""
    extra: tuple[ExtraKeys, ...] = ()


class Probe:
    """The taps and edits of one layer while it is traced; layers call `x = probe(site, x)`."""

    def __init__(self, taps: Mapping[str, Callable] | None = None, edits: Mapping[str, Edit] | None = None):
        self._taps = taps or {}
        self._edits = edits or {}
        self.values: dict[str, Any] = {}
        self.seen: set[str] = set()

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        self.seen.add(site)
        edit = self._edits.get(site)
        if edit is not None:
            if edit.scale is not None:
                x = (x * edit.scale).astype(x.dtype)
            if edit.shift is not None:
                x = (x + edit.shift).astype(x.dtype)
        if site in self._taps:
            self.values[site] = self._taps[site](x)
        return x

    def wants(self, site: str) -> bool:
        """Whether anybody looks at a site (so that it must be computed where it otherwise would not be)."""
        self.seen.add(site)
        if site in self._edits:
            raise ConfigError(f"site '{site}' can be tapped but not edited")
        return site in self._taps

    def check(self) -> None:
        """Raises `ConfigError` for taps and edits of sites that the layer does not have."""
        for site in (*self._taps, *self._edits):
            if site not in self.seen:
                raise ConfigError(f"no site '{site}' in this block: {nearest(site, self.seen)}")
