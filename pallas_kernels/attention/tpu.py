"""Attention on TPUs: a forward kernel and two backward kernels in Pallas (Mosaic).

Each kernel's grid is (batch, heads, steps), the steps from the tables of `tiles`. Arrays of one number a token
(log-sum-exps, delta, segment ids, bias) lie in memory as rows `[..., 1, length]`; where a kernel needs them down its
sublanes it turns them once, at the first step of a block. Head dimensions are padded to 128 lanes, lengths to whole
blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tiles as tables
from pallas_kernels.attention.problem import HIDDEN, MASKED, Operands, Structure
from pallas_kernels.attention.tiles import COMPUTE, FIRST, LANES, LAST, MASK, Tiles, round_up
from pallas_kernels.attention.vjp import Passes


@functools.cache
def passes(tiles: Tiles | None = None, interpret: bool = False) -> Passes:
    """The implementation, by default with the tiles of the table."""
    return Passes(
        functools.partial(_forward, tiles=tiles, interpret=interpret),
        functools.partial(_backward, tiles=tiles, interpret=interpret),
    )


def _forward(structure: Structure, operands: Operands, *, tiles: Tiles | None, interpret: bool):
    tiles = tiles or _default_tiles(operands)
    call = _Call(structure, operands, tiles.q, tiles.k)
    out, lse = call.run(
        _forward_kernel,
        by_query=True,
        inputs={"q": call.q, "k": call.k, "v": call.v},
        outputs={"q": call.q.dtype, "q_row": jnp.float32},
        scratch=[(tiles.q, LANES), (tiles.q, LANES), (tiles.q, call.dim)],
        interpret=interpret,
    )
    return call.per_query(out), call.per_query_row(lse)


def _backward(structure: Structure, operands: Operands, grad, lse, delta, *, tiles: Tiles | None, interpret: bool):
    tiles = tiles or _default_tiles(operands)
    call = _Call(structure, operands, tiles.q_backward, tiles.k_backward)
    rows = {
        "do": call.pad_queries(grad),
        # Padded queries see nothing: exp(logit - inf) is 0.
        "lse": call.pad_row(lse, jnp.inf),
        "delta": call.pad_row(delta, 0.0),
    }
    inputs = {"q": call.q, "k": call.k, "v": call.v, **rows}
    (dq,) = call.run(
        _dq_kernel,
        by_query=True,
        inputs=inputs,
        outputs={"q": call.q.dtype},
        scratch=[(call.bq, LANES), (call.bq, LANES), (call.bq, call.dim)],
        interpret=interpret,
    )
    outputs = {"k": call.k.dtype, "v": call.v.dtype}
    if call.bias is not None:
        outputs["k_row"] = jnp.float32
    dk, dv, *dbias = call.run(
        _dkv_kernel,
        by_query=False,
        inputs=inputs,
        outputs=outputs,
        scratch=[(call.bk, call.dim), (call.bk, call.dim), (call.bk, LANES)],
        interpret=interpret,
    )
    dbias = jnp.sum(dbias[0][:, :, 0, : call.keys], axis=1) if dbias else None
    return call.per_query(dq), call.per_key(dk), call.per_key(dv), dbias


def _default_tiles(operands: Operands) -> Tiles:
    q, k = operands.q, operands.k
    return tables.tpu_tiles(q.shape[3], k.shape[2], q.shape[4], q.dtype.itemsize)


class _Call:
    """One kernel call: arrays padded to whole blocks, tables, block specs."""

    def __init__(self, structure: Structure, operands: Operands, bq: int, bk: int):
        self.structure, self.bq, self.bk = structure, bq, bk
        self.batch, self.kv_heads, self.group, self.queries, self.head_dim = operands.q.shape
        self.keys, self.dim = operands.k.shape[2], tables.padded_head_dim(operands.q.shape[4])
        self.q = self.pad_queries(operands.q)
        self.k, self.v = self._pad_keys(operands.k), self._pad_keys(operands.v)
        self.bias = None if operands.bias is None else _pad(operands.bias, 1, bk)[:, None]
        self.q_segments = self.kv_segments = None
        if operands.q_segments is not None:
            # Padding repeats the last id: the spans of blocks stay narrow (the mask knows the keys' true end).
            self.q_segments = _pad_edge(operands.q_segments, bq)
            self.kv_segments = _pad_edge(operands.kv_segments, bk)

    def pad_queries(self, x):
        """`[b, k, g, t, d]` to `[b, heads, padded t, padded d]`."""
        x = x.reshape(self.batch, self.kv_heads * self.group, self.queries, self.head_dim)
        return _pad(_pad(x, 2, self.bq), 3, LANES)

    def pad_row(self, x, value):
        """`[b, k, g, t]` to rows `[b, heads, 1, padded t]`."""
        x = x.reshape(self.batch, self.kv_heads * self.group, 1, self.queries)
        return _pad(x, 3, self.bq, value)

    def _pad_keys(self, x):
        return _pad(_pad(x, 2, self.bk), 3, LANES)

    def per_query(self, x):
        x = x[:, :, : self.queries, : self.head_dim]
        return x.reshape(self.batch, self.kv_heads, self.group, self.queries, self.head_dim)

    def per_query_row(self, x):
        return x[:, :, 0, : self.queries].reshape(self.batch, self.kv_heads, self.group, self.queries)

    def per_key(self, x):
        return x[:, :, : self.keys, : self.head_dim]

    def run(self, kernel, *, by_query: bool, inputs, outputs, scratch, interpret: bool):
        """Runs `kernel` over the steps of query blocks, or of key blocks, and returns its outputs."""
        structure, (bq, bk) = self.structure, (self.bq, self.bk)
        if by_query:
            steps = tables.pairs_by_query(structure, self.queries, self.keys, bq, bk)
        else:
            steps = tables.pairs_by_key(structure, self.queries, self.keys, bq, bk, self.group)
        count, q_blocks = len(steps.flags), self.q.shape[2] // bq
        segmented = self.q_segments is not None
        if segmented:
            flags, fetch = tables.by_segments(steps, self.q_segments, self.kv_segments, bq, bk, by_query)
        else:
            flags, fetch = jnp.asarray(steps.flags), jnp.asarray(steps.minor)

        def place(role: str):
            """Where a step's block of this role lies: (batch, head, block along the length)."""

            def at(b, h, t, major, minor, flags, fetch):
                row = b * count + t if segmented else t
                if by_query:
                    return (b, h, major[t]) if role == "q" else (b, _div(h, self.group), fetch[row])
                if role == "k":
                    return b, h, major[t]
                return b, h * self.group + _div(fetch[row], q_blocks), _rem(fetch[row], q_blocks)

            return at

        q_at, k_at = place("q"), place("k")
        specs = {
            "q": pl.BlockSpec((1, 1, bq, self.dim), lambda *a: (*q_at(*a), 0)),
            "k": pl.BlockSpec((1, 1, bk, self.dim), lambda *a: (*k_at(*a), 0)),
            "q_row": pl.BlockSpec((1, 1, 1, bq), lambda *a: (*q_at(*a)[:2], 0, q_at(*a)[2])),
            "k_row": pl.BlockSpec((1, 1, 1, bk), lambda *a: (*k_at(*a)[:2], 0, k_at(*a)[2])),
            "bias": pl.BlockSpec((1, 1, bk), lambda *a: (k_at(*a)[0], 0, k_at(*a)[2])),
            "q_segments": pl.BlockSpec((1, 1, bq), lambda *a: (q_at(*a)[0], 0, q_at(*a)[2])),
        }
        specs |= {"v": specs["k"], "do": specs["q"], "lse": specs["q_row"], "delta": specs["q_row"]}
        specs["kv_segments"] = specs["bias"]
        shapes = {"q": self.q.shape, "k": self.k.shape, "v": self.v.shape}
        shapes["q_row"] = (*self.q.shape[:2], 1, self.q.shape[2])
        shapes["k_row"] = (*self.k.shape[:2], 1, self.k.shape[2])

        arrays = dict(inputs)
        if self.bias is not None:
            arrays["bias"] = self.bias
        if segmented:
            arrays["q_segments"], arrays["kv_segments"] = self.q_segments[:, None], self.kv_segments[:, None]
        scratch = [pltpu.VMEM(shape, jnp.float32) for shape in scratch]
        if segmented:  # the ids of the block that is summed for, down the sublanes
            scratch.append(pltpu.VMEM((bq if by_query else bk, LANES), jnp.int32))
        if self.bias is not None and not by_query:
            scratch.append(pltpu.VMEM((bk, LANES), jnp.float32))
        facts = _Facts(structure, bq, bk, self.keys, self.k.shape[2] != self.keys, q_blocks, count, segmented)
        body = functools.partial(_entry, kernel, facts, tuple(arrays), tuple(outputs), self.bias is not None, by_query)
        heads = self.q.shape[1] if by_query else self.kv_heads
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=4,
                grid=(self.batch, heads, count),
                in_specs=[specs[name] for name in arrays],
                out_specs=[specs[name] for name in outputs],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs.items()],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(jnp.asarray(steps.major), jnp.asarray(steps.minor), flags, fetch, *arrays.values())


class _Facts:
    """The static numbers that the kernels share."""

    def __init__(self, structure, bq, bk, keys, padded_keys, q_blocks, count, segmented):
        self.structure, self.bq, self.bk, self.keys, self.padded_keys = structure, bq, bk, keys, padded_keys
        self.q_blocks, self.count, self.segmented = q_blocks, count, segmented


class _Refs:
    """A kernel's references by name, and what each step needs to know."""


def _entry(kernel, facts: _Facts, inputs, outputs, biased: bool, by_query: bool, *refs):
    major, minor, flags = refs[:3]
    refs = list(refs[4:])
    found = _Refs()
    for name in inputs:
        setattr(found, name, refs.pop(0))
    found.outs = [refs.pop(0) for _ in outputs]
    found.scratch = [refs.pop(0) for _ in range(3)]
    found.ids = refs.pop(0) if facts.segmented else None
    found.bias_column = refs.pop(0) if biased and not by_query else None
    found.bias = getattr(found, "bias", None)
    step = pl.program_id(2)
    flag = flags[pl.program_id(0) * facts.count + step] if facts.segmented else flags[step]
    found.q_start, found.k_start = (major[step], minor[step]) if by_query else (minor[step], major[step])
    found.q_start = _rem(found.q_start, facts.q_blocks) * facts.bq
    found.k_start = found.k_start * facts.bk

    @pl.when(flag & FIRST != 0)
    def _():
        if facts.segmented:
            found.ids[...] = _column((found.q_segments if by_query else found.kv_segments)[0])
        if found.bias_column is not None:
            found.bias_column[...] = _column(found.bias[0])

    kernel(facts, found, flag)


def _forward_kernel(facts: _Facts, refs: _Refs, flag):
    top_ref, total_ref, sum_ref = refs.scratch

    @pl.when(flag & FIRST != 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def step(masked: bool):
        logits, _ = _logits(facts, refs, masked, by_query=True)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - top[:, :1])
        decay = jnp.exp(before - top)
        # Before a row's first visible key its weights are exp(0) = 1; decay = 0 forgets them.
        total_ref[...] = decay * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        sum_ref[...] = decay[:, :1] * sum_ref[...] + _dot(weights.astype(refs.v.dtype), refs.v[0, 0], (1, 0))
        top_ref[...] = top

    _each_kind(flag, step)

    @pl.when(flag & LAST != 0)
    def _():
        out_ref, lse_ref = refs.outs
        top, total = top_ref[...], total_ref[...]
        empty = top < HIDDEN
        total = jnp.where(empty, 1.0, total)
        out = jnp.where(empty[:, :1], 0.0, sum_ref[...] / total[:, :1])
        out_ref[0, 0] = out.astype(out_ref.dtype)
        lse_ref[0, 0] = _row(jnp.where(empty, -jnp.inf, top + jnp.log(total)))


def _dq_kernel(facts: _Facts, refs: _Refs, flag):
    lse_ref, delta_ref, sum_ref = refs.scratch

    @pl.when(flag & FIRST != 0)
    def _():
        lse_ref[...] = _column(refs.lse[0, 0])
        delta_ref[...] = _column(refs.delta[0, 0])
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def step(masked: bool):
        logits, slope = _logits(facts, refs, masked, by_query=True)
        weights = jnp.exp(logits - lse_ref[...][:, :1])
        dweights = _dot(refs.do[0, 0], refs.v[0, 0], (1, 1))
        dlogits = _through_cap(facts, weights * (dweights - delta_ref[...][:, :1]), slope)
        sum_ref[...] += _dot(dlogits.astype(refs.k.dtype), refs.k[0, 0], (1, 0))

    _each_kind(flag, step)

    @pl.when(flag & LAST != 0)
    def _():
        (dq_ref,) = refs.outs
        dq_ref[0, 0] = sum_ref[...].astype(dq_ref.dtype)


def _dkv_kernel(facts: _Facts, refs: _Refs, flag):
    """Everything transposed: keys down the sublanes, queries along the lanes."""
    dk_sum, dv_sum, dbias_sum = refs.scratch

    @pl.when(flag & FIRST != 0)
    def _():
        for ref in refs.scratch:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def step(masked: bool):
        logits, slope = _logits(facts, refs, masked, by_query=False)
        weights = jnp.exp(logits - refs.lse[0, 0])
        do = refs.do[0, 0]
        dv_sum[...] += _dot(weights.astype(do.dtype), do, (1, 0))
        dlogits = weights * (_dot(refs.v[0, 0], do, (1, 1)) - refs.delta[0, 0])
        if refs.bias is not None:
            dbias_sum[...] += jnp.sum(dlogits, axis=1, keepdims=True)
        dlogits = _through_cap(facts, dlogits, slope)
        dk_sum[...] += _dot(dlogits.astype(refs.q.dtype), refs.q[0, 0], (1, 0))

    _each_kind(flag, step)

    @pl.when(flag & LAST != 0)
    def _():
        dk_ref, dv_ref, *dbias_ref = refs.outs
        dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)
        if dbias_ref:
            dbias_ref[0][0, 0] = _row(dbias_sum[...])


def _each_kind(flag, step):
    """`step(masked)` for a step that computes, with a mask only where its block is partly hidden."""
    pl.when(flag & (COMPUTE | MASK) == COMPUTE)(lambda: step(False))
    pl.when(flag & (COMPUTE | MASK) == COMPUTE | MASK)(lambda: step(True))


def _logits(facts: _Facts, refs: _Refs, masked: bool, by_query: bool):
    """Logits `[bq, bk]`, or transposed `[bk, bq]`, and the soft cap's derivative."""
    structure, q, k = facts.structure, refs.q[0, 0], refs.k[0, 0]
    logits = _dot(q, k, (1, 1)) if by_query else _dot(k, q, (1, 1))
    if structure.scale != 1.0:
        logits = logits * structure.scale
    slope = None
    if structure.softcap is not None:
        capped = jnp.tanh(logits / structure.softcap)
        logits, slope = structure.softcap * capped, 1.0 - capped * capped
    if refs.bias is not None:
        logits = logits + (refs.bias[0] if by_query else refs.bias_column[...][:, :1])
    if masked:
        queries = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0 if by_query else 1) + refs.q_start
        keys = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1 if by_query else 0) + refs.k_start
        parts = [structure.allowed(queries, keys), keys < facts.keys if facts.padded_keys else None]
        if facts.segmented:
            parts.append(refs.ids[...][:, :1] == (refs.kv_segments if by_query else refs.q_segments)[0])
        for allowed in parts:
            if allowed is not None:
                logits = jnp.where(allowed, logits, MASKED)
    return logits, slope


def _through_cap(facts: _Facts, dlogits, slope):
    """The gradient of the products from that of the logits."""
    if slope is not None:
        dlogits = dlogits * slope
    return dlogits if facts.structure.scale == 1.0 else dlogits * facts.structure.scale


def _dot(a, b, contract: tuple[int, int]):
    # float32 operands mean float32 products: by default the unit would round them to bfloat16.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _div(a, b: int):
    """Of numbers that are not negative: `//` would ask for their signs."""
    return jax.lax.div(a, jnp.int32(b))


def _rem(a, b: int):
    return jax.lax.rem(a, jnp.int32(b))


def _column(row):
    """A row `[1, n]` as `[n, lanes]`, each number along a whole row of lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column):
    """The inverse: `[n, lanes]` as `[1, n]`."""
    return column.T[:1]


def _pad(x, axis: int, multiple: int, value: float = 0.0):
    more = round_up(x.shape[axis], multiple) - x.shape[axis]
    if not more:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=value)


def _pad_edge(ids, multiple: int):
    more = round_up(ids.shape[1], multiple) - ids.shape[1]
    return jnp.pad(ids, ((0, 0), (0, more)), mode="edge") if more else ids
