"""Floating-point operations of a decoder, counted as they must be done: causal, windowed, grouped heads, no remat.

One multiply-add counts as two operations. Matrix products and the two products of attention are counted, nothing
elementwise. A training step does three times the forward pass (one forward, two backward).
"""

from jaxlm.models.config import DecoderConfig


def forward_flops_per_token(config: DecoderConfig, length: int) -> float:
    """Mean operations a token of the forward pass over rows of `length` tokens, vocabulary projection included."""
    c = config
    heads, kv = c.num_heads * c.head_size, c.kv_heads * c.head_size
    attention = c.embed_dim * (heads + 2 * kv) + heads * c.embed_dim
    mlp = (3 if c.mlp_gated else 2) * c.embed_dim * c.mlp_dim
    products = c.num_layers * (attention + mlp) + c.embed_dim * c.vocab_size
    # Logits and weighted sum: two products of head_size for each query head and visible key.
    causal = (_mean_visible_keys(length, kind.window) for kind in c.layer_kinds())
    keys = sum(causal) if c.causal else c.num_layers * length
    return 2.0 * products + 2.0 * 2.0 * heads * keys


def train_flops_per_token(config: DecoderConfig, length: int) -> float:
    """Three times `forward_flops_per_token`."""
    return 3.0 * forward_flops_per_token(config, length)


def decode_flops_per_token(config: DecoderConfig, length: int) -> float:
    """Operations of the forward pass of one token that sees `length` others (fewer in layers with a window)."""
    c = config
    products = forward_flops_per_token(c, 1) - 4.0 * c.num_layers * c.num_heads * c.head_size
    keys = sum(length if kind.window is None else min(length, kind.window) for kind in c.layer_kinds())
    return products + 4.0 * c.num_heads * c.head_size * keys


def executed_flops_per_token(config: DecoderConfig, length: int, remat: str | None = None) -> float:
    """`train_flops_per_token` and what an accelerator's backward pass computes again under `remat` (the config's)."""
    c = config
    heads, kv = c.num_heads * c.head_size, c.kv_heads * c.head_size
    layers = forward_flops_per_token(c, length) - 2.0 * c.embed_dim * c.vocab_size
    again = {
        "none": 0.0,
        "dots": 2.0 * c.num_layers * heads * c.embed_dim,
        "projections": layers - 2.0 * c.num_layers * c.embed_dim * (heads + 2 * kv),
        "full": layers,
    }
    return train_flops_per_token(c, length) + again[remat or c.remat]


def _mean_visible_keys(length: int, window: int | None) -> float:
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
