"""The products in plain JAX: unpack, multiply. They are the kernels' specification and what CPUs and GPUs run."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.layout import Packed, dequantize
from pallas_kernels.target import Target

Array = jax.Array

# A larger matrix is unpacked and multiplied a piece at a time. On a CPU what is unpacked then stays in cache (16 MB in
# float32); on an accelerator it bounds memory (a table of 262,144 tokens never becomes 671 MB) at few launches.
PIECE = {"cpu": 1 << 22, "gpu": 1 << 26, "tpu": 1 << 26}


def matmul(x: Array, w: Packed, *, transposed: bool, dtype: jnp.dtype, target: Target) -> Array:
    """`x @ w`, or `x @ w.T`, for one matrix; operands are multiplied in `dtype`, sums are float32, the result is `x`'s.

    Over several devices the whole matrix is unpacked in one go, which XLA partitions as it is.
    """
    free = -3 - w.axis
    size, blocked = w.shape[free], w.shape[w.axis]
    alone = target.devices == 1
    limit = PIECE.get(target.platform, PIECE["cpu"])
    if size * blocked <= limit or not alone:
        return _dot(x, dequantize(w), dtype, transposed, flatten=alone and target.platform == "cpu")
    piece = min(max(limit // blocked // 128 * 128, 128), size)
    flat = x.reshape(-1, x.shape[-1])
    summed_over_pieces = (w.axis == -1) != transposed

    def add_piece(i: Array, y: Array) -> Array:
        # The last piece ends at the end, and so may begin in the one before.
        start = jnp.minimum(i * piece, size - piece)
        part = dequantize(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, piece, a.ndim + free), w))
        if not summed_over_pieces:
            return jax.lax.dynamic_update_slice_in_dim(y, _dot(flat, part, dtype, transposed), start, 1)
        columns = jax.lax.dynamic_slice_in_dim(flat, start, piece, 1).astype(y.dtype)
        new = (start + jnp.arange(piece) >= i * piece)[None, :]
        return y + _dot(jnp.where(new, columns, 0), part, dtype, transposed)

    y = jnp.zeros(
        (flat.shape[0], blocked if summed_over_pieces else size), _sum_dtype(x) if summed_over_pieces else x.dtype
    )
    y = jax.lax.fori_loop(0, -(-size // piece), add_piece, y)
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def matmul_int8(codes: Array, token_scale: Array, w: Packed) -> Array:
    """`(token_scale * codes) @ w` for int8 `codes` `[rows, in]`, a scale a row, and 8-bit `w` blocked along its input.

    Products within a block are exact 32-bit integers; blocks are scaled and summed in float32. Returns float32.
    """

    def of_block(x: Array, q: Array, scale: Array) -> Array:
        exact = jax.lax.dot_general(x, q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return exact.astype(jnp.float32) * scale[None, :]

    rows, blocks, size = codes.shape[0], w.blocks, w.group
    scale = w.scale.astype(jnp.float32)
    if blocks == 1:
        return of_block(codes, w.codes, scale[0]) * token_scale
    x = jnp.moveaxis(codes.reshape(rows, blocks, size), 1, 0)
    q = w.codes.reshape(blocks, size, -1)
    zero = jnp.zeros((rows, w.shape[-1]), jnp.float32)
    y, _ = jax.lax.scan(lambda y, each: (y + of_block(*each), None), zero, (x, q, scale))
    return y * token_scale


def quantize_tokens(x: Array) -> tuple[Array, Array]:
    """`(int8 codes, float32 scale [rows, 1])` of `x` `[rows, features]`: `scale = max|x| / 127`, 1 for a row of zeros.

    Codes are rounded half to even. The row's largest value becomes 127 or -127; -128 does not occur.
    """
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(top == 0, 1.0, top / 127)
    return jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale


def _dot(x: Array, w: Array, dtype: jnp.dtype, transposed: bool, flatten: bool = False) -> Array:
    # XLA's CPU backend runs a product with two contracted batch axes (the weight gradient) several times slower than
    # the flattened one. Over several devices flattening a divided length would cost an all-gather instead.
    rows = x.reshape(-1, x.shape[-1]) if flatten and x.ndim > 2 else x
    contract = (((rows.ndim - 1,), (1 if transposed else 0,)), ((), ()))
    y = jax.lax.dot_general(rows.astype(dtype), w.astype(dtype), contract, preferred_element_type=_sum_dtype(x))
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _sum_dtype(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
