"""A decoder-only transformer that behaves as Llama, Qwen 2/3, GPT-NeoX, GPT-2 or Gemma 1/2/3, by configuration.

A `Decoder` holds no weights. Its functions take parameters (a plain nested dict) and arrays; `embed`, `trunk` and
`head` are the parts, `apply` composes them:

    model = Decoder(config)
    variables = model.init(jax.random.key(0))
    logits = model.apply(variables, tokens)          # float32 [batch, length, vocab]

Layers are stacked along a leading axis and scanned (`jaxlm.models.blocks` knows the layout).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.core.sharding import constrain, gather, platform
from jaxlm.layers import kv_cache, rotary
from jaxlm.layers.attend import Filled, KeyValues, Mask, Visible
from jaxlm.layers.attention import Attention, AttentionInputs
from jaxlm.layers.context import Context, Edit, Probe
from jaxlm.layers.embedding import Embedding, Head
from jaxlm.layers.kv_cache import KVCache
from jaxlm.layers.mlp import MLP
from jaxlm.layers.norms import LayerNorm, RMSNorm
from jaxlm.models.config import DecoderConfig, LayerKind
from jaxlm.models.scan import scan_layers
from jaxlm.weights import Weight

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrunkOutput:
    """`hidden`: before the final norm. `cache`: the extended cache. `taps`: `site -> stacked results`. `aux`: losses of
    layers that have their own (experts)."""

    hidden: Float[Array, "batch length embed"]
    cache: KVCache | None
    taps: Mapping[str, Any]
    aux: Mapping[str, Array]


class HeadProjection(NamedTuple):
    """Logits are `softcap(inputs @ kernel)`, or `inputs @ kernel.T` if `transposed` (a tied embedding): operands in
    `dtype`, float32 sums, `softcap * tanh(logits / softcap)`."""

    inputs: Float[Array, "batch length embed"]
    kernel: Float[Array, "embed vocab"] | Float[Array, "vocab embed"]
    transposed: bool
    dtype: jnp.dtype
    softcap: float | None


class Block(nn.Module):
    """One layer: attention and feed-forward branches around a residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"], inputs: AttentionInputs, probe: Probe):
        c = self.config
        init, out_init = jax.nn.initializers.normal(c.init_std), jax.nn.initializers.normal(c.out_std)

        def norm(name: str, y: Array) -> Array:
            return make_norm(c, name)(y)

        def scaled(branch: Array) -> Array:
            return branch if c.residual_scale is None else branch * jnp.asarray(c.residual_scale, branch.dtype)

        attention = Attention(
            c.num_heads,
            c.kv_heads,
            c.head_size,
            c.qkv_bias,
            c.out_bias,
            c.qk_norm,
            c.norm_eps,
            c.norm_unit_offset,
            c.attention_softcap,
            c.attention,
            init,
            out_init,
            c.precision,
            name="attention",
        )
        mlp = MLP(c.mlp_dim, c.activation, c.mlp_gated, c.mlp_bias, init, out_init, c.precision, name="mlp")
        sandwich = c.norm_placement == "sandwich"

        x = probe("resid", constrain(x, "batch", "length", "act_embed"))
        branch, new_keys = attention(probe("attn_in", norm("attention_norm", x)), inputs, probe)
        if sandwich:
            branch = norm("attention_post_norm", branch)
        branch = probe("attn_out", scaled(branch))
        middle = x + branch
        source = x if c.parallel_residual else middle
        branch = mlp(probe("mlp_in", norm("mlp_norm", source)), probe)
        if sandwich:
            branch = norm("mlp_post_norm", branch)
        branch = probe("mlp_out", scaled(branch))
        return constrain(middle + branch, "batch", "length", "act_embed"), new_keys


def make_norm(config: DecoderConfig, name: str | None = None) -> nn.Module:
    """The norm layer that a configuration asks for."""
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, config.norm_unit_offset, config.precision, name=name)
    return LayerNorm(config.norm_eps, True, config.precision, name=name)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The functions of a decoder. Hashable and free of arrays, so it may be a static argument of `jax.jit`."""

    config: DecoderConfig

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables `{"params": ...}`. Run it under `jax.jit` with `out_shardings` to create them sharded."""
        return {"params": jax.tree.map(lambda box: box.value, self._boxed(key), is_leaf=_is_box)}

    def axes(self) -> dict[str, Any]:
        """The tree of logical axis names of the parameters `init` creates."""
        boxed = jax.eval_shape(self._boxed, jax.random.key(0))
        return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)

    def abstract_params(self) -> dict[str, Any]:
        """The parameters' shapes and dtypes, nothing allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))["params"]

    def apply(
        self,
        variables: Mapping[str, Params],
        inputs: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Float32 logits of the next token at every place."""
        params = variables["params"]
        hidden = self.embed(params, inputs, positions)
        output = self.trunk(params, hidden, positions=positions, segment_ids=segment_ids)
        return self.head(params, output.hidden)

    def embed(
        self, params: Params, inputs: Int[Array, "batch length"], positions: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length embed"]:
        """The residual stream's start: token embeddings, and learned positions where the model has them."""
        hidden = self._embedding().apply({"params": params["embedding"]}, inputs)
        if self.config.position == "learned":
            if positions is None:
                if inputs.shape[1] > self.config.max_length:
                    raise ConfigError(
                        f"{inputs.shape[1]} tokens in a model with {self.config.max_length} learned positions"
                    )
                positions = _arange(inputs)
            hidden = hidden + self._position_embedding().apply({"params": params["positions"]}, positions)
        return hidden

    def head_params(self, params: Params) -> dict[str, Any]:
        """The part of the parameters that `head` reads; `head` takes it in place of the whole."""
        return {name: params[name] for name in ("final_norm", "embedding" if self.config.tie_embeddings else "head")}

    def gather_head(self, head_params: Params) -> dict[str, Any]:
        """`head_params` with sharded weights whole over their features: done once, not again by every chunk of tokens.

        Their gradient is sharded again as soon as all chunks' are added up.
        """
        name, leaf, stored, used = (
            ("embedding", "table", ("tied_vocab", "embed"), ("vocab", None))
            if self.config.tie_embeddings
            else ("head", "kernel", ("embed", "vocab"), (None, "vocab"))
        )
        weight = head_params[name][leaf]
        whole = weight if isinstance(weight, Weight) else gather(weight, stored, used)
        return {**head_params, name: {**head_params[name], leaf: whole}}

    def head_projection(
        self, params: Params, hidden: Float[Array, "batch length embed"]
    ) -> HeadProjection | None:
        """What `head` multiplies, for losses that never form logits; `None` unless its weight is an array."""
        name, leaf = ("embedding", "table") if self.config.tie_embeddings else ("head", "kernel")
        weight = params[name][leaf]
        if isinstance(weight, Weight):
            return None
        dtype, softcap = self.config.precision.matmul_dtype, self.config.final_softcap
        return HeadProjection(self._head_inputs(params, hidden), weight, self.config.tie_embeddings, dtype, softcap)

    def head(self, params: Params, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Float32 logits: final norm, scale, projection, soft cap."""
        normed = self._head_inputs(params, hidden)
        if self.config.tie_embeddings:
            logits = self._embedding().apply({"params": params["embedding"]}, normed, method="project")
        else:
            logits = self._head().apply({"params": params["head"]}, normed)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _head_inputs(self, params: Params, hidden: Array) -> Float[Array, "batch length embed"]:
        normed = make_norm(self.config).apply({"params": params["final_norm"]}, hidden)
        scale = self.config.logit_scale
        return normed if scale is None else normed * jnp.asarray(scale, normed.dtype)

    def trunk(
        self,
        params: Params,
        h: Float[Array, "batch length embed"],
        *,
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        context: Context | None = None,
        layers: tuple[int, int | None] = (0, None),
    ) -> TrunkOutput:
        """Runs blocks `layers[0]` to `layers[1]` (exclusive; `None` is the end) on the residual stream.

        `positions` are those of rotation (by default they continue the cache, or count from 0); what a token sees is
        decided by order, `segment_ids` (equal ids see each other) and `mask`. With a `cache` the tokens follow those
        in it: their keys and values are written at its index, which moves on when the last block has run.
        """
        c, context = self.config, context or Context()
        first, last = layers[0], c.num_layers if layers[1] is None else layers[1]
        if not 0 <= first <= last <= c.num_layers:
            raise ConfigError(f"layers {layers} of a model with {c.num_layers} layers")
        if cache is not None and segment_ids is not None:
            raise ConfigError("segment_ids and cache exclude each other: a cached row is one segment")
        batch, length, _ = h.shape
        if cache is not None and length > cache.capacity:
            raise ConfigError(f"{length} tokens in a cache with a capacity of {cache.capacity}")
        if positions is None:
            positions = kv_cache.positions(cache, length) if cache is not None else _arange(h)

        run_layer = self._layer_function(h.shape, positions, segment_ids, mask or Mask(c.causal), cache, context)
        per_layer = self._per_layer(cache, context, batch)
        h, new_keys, taps = scan_layers(
            run_layer, params["blocks"], per_layer, c.layer_kinds(), h, context.taps, first, last
        )
        if cache is not None and new_keys is not None:
            cache = kv_cache.write(cache, *new_keys, layers=(first, last), advance=last == c.num_layers)
        return TrunkOutput(h, cache, taps, {})

    def init_cache(self, batch: int, capacity: int, *, shared: bool = False) -> KVCache:
        """An empty key/value cache for this model, in its activations' format."""
        c = self.config
        if not c.causal:
            raise ConfigError("model.causal is False: tokens see those after them, so nothing can be cached")
        dtype = c.precision.activation_dtype
        return kv_cache.init_cache(c.num_layers, batch, capacity, c.kv_heads, c.head_size, dtype, shared)

    def _layer_function(self, shape, positions, segment_ids, mask: Mask, cache: KVCache | None, context: Context):
        """`run(kind, h, layer_params, layer_inputs) -> (h, (k, v), taps)`, rematerialized as configured."""
        c = self.config
        block = Block(c)
        taps = {site: tap.reduce for site, tap in context.taps.items()}
        attends_cache = cache is not None and not cache.empty
        ropes: dict[bool, Any] = {}
        if c.position == "rotary":
            for local in sorted({kind.local_rope for kind in c.layer_kinds()}):
                theta, scaling = (c.rope_theta_local, None) if local else (c.rope_theta, c.rope_scaling)
                ropes[local] = rotary.tables(positions, c.rotary_dim, theta, scaling)
        cached = {
            kind.window: Filled(kv_cache.visible(cache, shape[1], kind.window), cache.index, cache.start, kind.window)
            for kind in set(c.layer_kinds())
            if attends_cache
        }
        if segment_ids is None and cache is not None and not cache.per_row:
            # Left padding: tokens before a row's start are a segment of their own.
            order = cache.index + jnp.arange(shape[1], dtype=jnp.int32)[None, :]
            segment_ids = (order >= cache.start[:, None]).astype(jnp.int32)

        def run(kind: LayerKind, h: Array, layer_params: Any, layer_inputs: dict[str, Any]):
            others = []
            if attends_cache:
                others.append(KeyValues(*layer_inputs["cache"], allowed=cached[kind.window], heads_first=True))
            for extra, (k, v) in zip(context.extra, layer_inputs["extra"], strict=True):
                allowed = None if extra.allowed is None else extra.allowed[:, None, :]
                others.append(KeyValues(k, v, allowed, extra.bias))
            scale = c.head_size**-0.5 if c.attention_scale is None else c.attention_scale
            if c.attention_scale_by_layer:
                scale = scale / (layer_inputs["index"] + 1).astype(jnp.float32)
            visible = Visible(mask, segment_ids, kind.window)
            inputs = AttentionInputs(ropes.get(kind.local_rope), visible, scale, context.key_bias, tuple(others))
            probe = Probe(taps, layer_inputs["edits"])
            h, new_keys = block.apply({"params": layer_params}, h, inputs, probe)
            probe.check()
            return h, new_keys, probe.values

        policy = _remat_policy(c.remat)
        if policy is None:
            return run

        def rematerialized(kind: LayerKind, *args: Any):
            return jax.checkpoint(functools.partial(run, kind), prevent_cse=False, policy=policy)(*args)

        return rematerialized

    def _per_layer(self, cache: KVCache | None, context: Context, batch: int) -> dict[str, Any]:
        """What each layer gets beside its parameters, stacked along the layers."""
        count = self.config.num_layers

        def stacked(name: str, x: Array) -> Array:
            if x.ndim != 4 and name.startswith("edit"):
                raise ConfigError(f"{name} has shape {x.shape}, expected [layers, batch, length, features]")
            if x.shape[0] not in (1, count):
                raise ConfigError(f"{name} has {x.shape[0]} layers, the model {count}")
            return jnp.broadcast_to(x, (count, *x.shape[1:]))

        edits = {
            site: Edit(*(None if x is None else stacked(f"edit of '{site}'", x) for x in (edit.scale, edit.shift)))
            for site, edit in context.edits.items()
        }
        extra = [(stacked("extra keys", e.k), stacked("extra values", e.v)) for e in context.extra]
        old = (cache.k, cache.v) if cache is not None and not cache.empty else None
        return {"index": jnp.arange(count, dtype=jnp.int32), "cache": old, "edits": edits, "extra": extra}

    def _boxed(self, key: jax.Array) -> dict[str, Any]:
        c = self.config
        ids, h = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, c.embed_dim), c.precision.activation_dtype)
        rope = rotary.tables(ids, c.rotary_dim, c.rope_theta) if c.position == "rotary" else None
        inputs = AttentionInputs(rope, Visible(), c.head_size**-0.5)

        def block(layer_key: jax.Array) -> dict[str, Any]:
            return Block(c).init(layer_key, h, inputs, Probe())["params"]

        stack = jax.vmap(block)(jax.random.split(fold(key, "blocks"), c.num_layers))
        stack = jax.tree.map(lambda box: box.replace(names=("layers", *box.names)), stack, is_leaf=_is_box)
        params = {
            "embedding": self._embedding().init(fold(key, "embedding"), ids)["params"],
            "blocks": [stack],
            "final_norm": make_norm(c).init(fold(key, "final_norm"), h)["params"],
        }
        if c.position == "learned":
            params["positions"] = self._position_embedding().init(fold(key, "positions"), ids)["params"]
        if not c.tie_embeddings:
            params["head"] = self._head().init(fold(key, "head"), h)["params"]
        return params

    def _embedding(self) -> Embedding:
        c = self.config
        axes = ("tied_vocab" if c.tie_embeddings else "vocab", "embed")
        init = jax.nn.initializers.normal(c.embedding_std)
        return Embedding(c.vocab_size, c.embed_dim, axes, init, c.embedding_scale, c.precision)

    def _position_embedding(self) -> Embedding:
        c = self.config
        init = jax.nn.initializers.normal(c.init_std)
        return Embedding(c.max_length, c.embed_dim, ("positions", "embed"), init, None, c.precision)

    def _head(self) -> Head:
        c = self.config
        return Head(c.vocab_size, jax.nn.initializers.normal(c.embedding_std), c.precision)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _arange(x: Array) -> Int[Array, "1 length"]:
    """The same positions for every row, said once: rotary tables have one row then."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]


def _remat_policy(name: str):
    policies = jax.checkpoint_policies
    match name:
        case "none":
            return None
        case "dots":
            attention = ("attention_inputs", "attention_result", "attention_norm")
            if platform() != "cpu":
                # Without attention's output projection: as large as what else attention keeps, and one plain product.
                return policies.save_only_these_names(*attention, "attention_projection", "mlp_projection")
            return policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*attention)
            )
        case "projections":
            return policies.save_only_these_names("attention_projection")
        case _:
            return policies.nothing_saveable
