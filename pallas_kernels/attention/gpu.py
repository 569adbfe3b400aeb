"""Attention on Hopper GPUs: a forward kernel and backward kernels in Pallas (Mosaic GPU): wgmma, TMA, warp groups.

A thread block owns a tile of queries (or of keys, for their gradients): one or two warp groups compute 64 rows each,
and one more fetches the other side's blocks into a ring of buffers. Which blocks those are comes from a table in memory
(`gpu_tables`): nothing outside the causal, window and segment structure is fetched, and blocks that lie wholly inside
are not masked. Logits are kept in powers of two, as the exponential is computed. Lengths are padded to whole tiles,
head dimensions to multiples of 64. One kernel gives both keys' and values' gradients up to head_dim 128; beyond, their
sums do not fit into registers together and it runs once for each.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_tables as tables
from pallas_kernels.attention.gpu_tables import GpuTiles
from pallas_kernels.attention.problem import HIDDEN, MASKED, Operands, Structure
from pallas_kernels.attention.tiles import round_up
from pallas_kernels.attention.vjp import Passes
from pallas_kernels.gpu_registers import Interpreted, Registers

LOG2E = math.log2(math.e)


@functools.cache
def passes(tiles: GpuTiles | None = None, interpret: bool = False) -> Passes:
    """The implementation, by default with the tiles of the table."""
    return Passes(
        functools.partial(_forward, tiles=tiles, interpret=interpret),
        functools.partial(_backward, tiles=tiles, interpret=interpret),
    )


def _forward(structure: Structure, operands: Operands, *, tiles: GpuTiles | None, interpret: bool):
    tiles = tiles or tables.gpu_tiles(operands.q.shape[4])
    call = _Call(structure, operands, tiles.rows * tiles.groups, tiles.other, tiles.rows, interpret, by_query=True)
    out, lse = call.run(
        _forward_kernel,
        own={"q": call.q},
        ring={"k": call.k, "v": call.v},
        outputs={"out": (call.q.shape, call.q.dtype), "lse": (call.q.shape[:3], jnp.float32)},
        stages=tiles.stages,
    )
    return call.per_query(out), call.per_query(lse)


def _backward(
    structure: Structure, operands: Operands, grad, lse, delta, *, tiles: GpuTiles | None, interpret: bool
):
    tiles = tiles or tables.gpu_tiles(operands.q.shape[4])
    groups = tiles.groups_backward
    sizes = tiles.rows * groups, tiles.other_backward, tiles.rows
    q_call = _Call(structure, operands, *sizes, interpret, by_query=True)
    k_call = _Call(structure, operands, *sizes, interpret, by_query=False)

    def rows(call):
        # Padded queries see nothing: 2 ** (logit - inf) is 0.
        return {
            "do": call.pad_queries(grad),
            "lse": call.pad_queries(lse * LOG2E, jnp.inf),
            "delta": call.pad_queries(delta),
        }

    (dq,) = q_call.run(
        _dq_kernel,
        own={"q": q_call.q, **rows(q_call)},
        ring={"k": q_call.k, "v": q_call.v},
        outputs={"dq": (q_call.q.shape, q_call.q.dtype)},
        stages=tiles.stages,
    )
    outputs = {"dk": (k_call.k.shape, k_call.k.dtype), "dv": (k_call.v.shape, k_call.v.dtype)}
    if operands.bias is not None:
        outputs["dbias"] = (k_call.k.shape[:3], jnp.float32)
    found = {}
    for names in tables.together(tuple(outputs), k_call.dim):
        parts = k_call.run(
            _dkv_kernel,
            own={"k": k_call.k, "v": k_call.v},
            ring={"q": k_call.q, **rows(k_call)},
            outputs={name: outputs[name] for name in names},
            stages=tiles.stages,
        )
        found |= dict(zip(names, parts))
    dbias = jnp.sum(k_call.per_key(found["dbias"]), axis=1) if "dbias" in found else None
    return q_call.per_query(dq), k_call.per_key(found["dk"]), k_call.per_key(found["dv"]), dbias


class _Call:
    """One kernel call: arrays padded to whole tiles, `[b, heads, length, ...]`, and the table of blocks."""

    def __init__(
        self, structure, operands: Operands, tile: int, block: int, rows: int, interpret: bool, by_query: bool
    ):
        self.structure, self.tile, self.block, self.rows, self.by_query = structure, tile, block, rows, by_query
        self.interpret, self.groups = interpret, tile // rows
        self.batch, self.kv_heads, self.group, self.queries, self.head_dim = operands.q.shape
        self.keys, self.dim = operands.k.shape[2], round_up(self.head_dim, 64)
        self.q_size, self.k_size = (tile, block) if by_query else (block, tile)
        self.q = self.pad_queries(operands.q)
        self.k, self.v = self._pad(operands.k, self.k_size), self._pad(operands.v, self.k_size)
        self.bias = self.q_segments = self.kv_segments = None
        if operands.bias is not None:
            self.bias = self._pad(jnp.maximum(operands.bias * LOG2E, MASKED)[:, None], self.k_size)
        if operands.q_segments is not None:
            self.q_segments = self._pad(operands.q_segments[:, None], self.q_size, edge=True)
            self.kv_segments = self._pad(operands.kv_segments[:, None], self.k_size, edge=True)

    def _pad(self, x, size: int, value: float = 0.0, edge: bool = False):
        """`[b, heads, length(, d)]` to whole tiles along the length and `d`."""
        pads = [(0, 0), (0, 0), (0, round_up(x.shape[2], size) - x.shape[2])]
        pads += [(0, self.dim - self.head_dim)] * (x.ndim - 3)
        if not any(more for _, more in pads):
            return x
        return jnp.pad(x, pads, mode="edge") if edge else jnp.pad(x, pads, constant_values=value)

    def pad_queries(self, x, value: float = 0.0):
        return self._pad(x.reshape(self.batch, -1, *x.shape[3:]), self.q_size, value)

    def per_query(self, x):
        x = x[:, :, : self.queries]
        x = x if x.ndim == 3 else x[..., : self.head_dim]
        return x.reshape(self.batch, self.kv_heads, self.group, *x.shape[2:])

    def per_key(self, x):
        return x[:, :, : self.keys] if x.ndim == 3 else x[:, :, : self.keys, : self.head_dim]

    def run(self, kernel, *, own, ring, outputs, stages: int):
        """Runs `kernel`: `own` arrays belong to the tile, blocks of the `ring` arrays pass by."""
        own, ring = dict(own), dict(ring)
        sides = {"q_segments": self.by_query, "kv_segments": not self.by_query, "bias": not self.by_query}
        for name, is_own in sides.items():
            if getattr(self, name) is not None:
                (own if is_own else ring)[name] = getattr(self, name)
        bounds = tables.bounds(
            self.structure, self.queries, self.keys, self.q_size, self.k_size, self.q_segments, self.kv_segments,
            self.by_query,
        )  # fmt: skip
        own_heads = self.q.shape[1] if self.by_query else self.kv_heads
        tiles = bounds.shape[1]
        arrays = {**own, **ring}
        facts = _Facts(self, tiles, stages, tuple(outputs))
        order = (*arrays, *outputs)

        def buffer(name: str, lead: int, rows: int):
            x = arrays[name]
            if x.ndim == 3:
                return plgpu.SMEM((lead, rows), x.dtype)
            transforms = (plgpu.TilingTransform((8, 128 // x.dtype.itemsize)), plgpu.SwizzleTransform(128))
            return plgpu.SMEM((lead, rows, self.dim), x.dtype, transforms=transforms)

        def entry(bounds_ref, *refs):
            refs, scratch = refs[: len(order)], refs[len(order) :]
            own_smem, ring_smem, result, own_ready, ring_ready, consumed = scratch
            _tile(
                facts, kernel, bounds_ref, dict(zip(order, refs)), dict(zip(own, own_smem)),
                dict(zip(ring, ring_smem)), result, own_ready, ring_ready, consumed,
            )  # fmt: skip

        # Rows of one number a token leave through buffers of their own, the others through those of the tile's inputs.
        results = [plgpu.SMEM((self.groups, self.rows), t) for shape, t in outputs.values() if len(shape) == 3]
        options = {"interpret": Interpreted.params()} if self.interpret else {}
        return plgpu.kernel(
            entry,
            out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
            grid=(own_heads, tiles, self.batch),
            grid_names=("heads", "tiles", "batch"),
            num_threads=self.groups + 1,
            thread_name="wg",
            scratch_types=(
                tuple(buffer(name, self.groups, self.rows) for name in own),
                tuple(buffer(name, stages, self.block) for name in ring),
                tuple(results),
                plgpu.Barrier(num_arrivals=len(own), num_barriers=self.groups),
                plgpu.Barrier(num_arrivals=len(ring), num_barriers=stages),
                plgpu.Barrier(num_arrivals=self.groups, num_barriers=stages),
            ),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **options,
        )(bounds.reshape(-1), *arrays.values())


class _Facts:
    """The static numbers that the kernels share."""

    def __init__(self, call: _Call, tiles: int, stages: int, outputs: tuple[str, ...]):
        self.structure, self.by_query, self.outputs = call.structure, call.by_query, outputs
        self.rows, self.block, self.tile = call.rows, call.block, call.tile
        self.groups, self.dim = call.groups, call.dim
        self.keys, self.ragged_keys = call.keys, call.k.shape[2] != call.keys
        self.group, self.tiles, self.stages = call.group, tiles, stages
        self.segmented = call.q_segments is not None
        self.registers = Interpreted() if call.interpret else Registers()


class _Place:
    """Where a warp group works: its thread block's batch row, head and tile, and the blocks that pass by."""

    def __init__(self, facts: _Facts, bounds_ref):
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("heads")
        # The last queries see the most keys: their tiles start first.
        index = lax.axis_index("tiles")
        self.tile = facts.tiles - 1 - index if facts.by_query else index
        row = (self.batch * facts.tiles if facts.segmented else 0) + self.tile
        self.low, self.whole_low, self.whole_high, self.high = (bounds_ref[4 * row + i] for i in range(4))
        self.passes = 1 if facts.by_query else facts.group


def _tile(facts, kernel, bounds_ref, gmem, own, ring, results, own_ready, ring_ready, consumed):
    place = _Place(facts, bounds_ref)
    wg = lax.axis_index("wg")
    blocks = place.high - place.low

    def gmem_at(name: str, start, size: int, passing):
        """A slice along the length of one head; `passing` numbers the query heads of a group."""
        ref = gmem[name]
        if ref.shape[1] == 1:
            head = 0
        elif facts.by_query:
            head = place.head if name not in ("k", "v") else lax.div(place.head, jnp.int32(facts.group))
        else:
            head = place.head if name in ("k", "v", *facts.outputs) else place.head * facts.group + passing
        return ref.at[place.batch, head, pl.ds(start, size)]

    @pl.when(wg < facts.groups)
    def _():
        if not isinstance(facts.registers, Interpreted):
            # What the fetching group leaves of the 512 that three or fewer groups share, in steps of 8.
            plgpu.set_max_registers(min(256, (512 - 40) // facts.groups // 8 * 8), action="increase")
        start = place.tile * facts.tile + wg * facts.rows
        for name, smem in own.items():
            plgpu.copy_gmem_to_smem(gmem_at(name, start, facts.rows, 0), smem.at[wg], own_ready.at[wg])
        plgpu.barrier_wait(own_ready.at[wg])
        mine = {name: smem.at[wg] for name, smem in own.items()}

        def loop(body, carry):
            """`body(buffers, start, masked, carry)` for each block that passes by."""

            def step(passing, masked, index, carry):
                slot = lax.rem(passing * blocks + index - place.low, jnp.int32(facts.stages))
                plgpu.barrier_wait(ring_ready.at[slot])
                carry = body({n: smem.at[slot] for n, smem in ring.items()}, index * facts.block, masked, carry)
                plgpu.barrier_arrive(consumed.at[slot])
                return carry

            def one_pass(passing, carry):
                whole, part = (functools.partial(step, passing, masked) for masked in (False, True))
                carry = lax.fori_loop(place.low, place.whole_low, part, carry)
                carry = lax.fori_loop(place.whole_low, place.whole_high, whole, carry)
                return lax.fori_loop(place.whole_high, place.high, part, carry)

            return one_pass(0, carry) if place.passes == 1 else lax.fori_loop(0, place.passes, one_pass, carry)

        found = kernel(facts, mine, start, loop)
        # Each result leaves through a buffer that is no longer read.
        spare, rows = list(mine.values()), [x.at[wg] for x in results]
        stores = []
        for name, value in zip(facts.outputs, found):
            smem = rows.pop(0) if len(value.shape) == 1 else spare.pop(0)
            smem[...] = value.astype(smem.dtype)
            stores.append((smem, gmem_at(name, start, facts.rows, 0)))
        plgpu.commit_smem()
        for smem, target in stores:
            plgpu.copy_smem_to_gmem(smem, target)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == facts.groups)
    def _():
        if not isinstance(facts.registers, Interpreted):
            plgpu.set_max_registers(40, action="decrease")

        count = blocks * place.passes

        def fetch(n, _):
            slot = lax.rem(n, jnp.int32(facts.stages))

            @pl.when(n >= facts.stages)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            @pl.when(n < count)
            def _():
                passing = lax.div(n, blocks) if place.passes > 1 else 0
                start = (place.low + (n - passing * blocks)) * facts.block
                for name, smem in ring.items():
                    source = gmem_at(name, start, facts.block, passing)
                    plgpu.copy_gmem_to_smem(source, smem.at[slot], ring_ready.at[slot])

        # After the last block its buffers' ends of use are still waited for: a barrier is left as it was found.
        @pl.when(count > 0)
        def _():
            lax.fori_loop(0, count + facts.stages, fetch, None)


def _forward_kernel(facts: _Facts, own, start, loop):
    regs, shape = facts.registers, (facts.rows, facts.block)

    def body(ring, other, masked, carry):
        sums, top, total = carry
        logits, _ = _logits(facts, own, ring, start, other, masked)
        higher = jnp.maximum(top, logits.max(axis=1))
        decay = jnp.exp2(top - higher)
        # Before a row's first visible key its weights are 1; decay = 0 forgets them.
        weights = jnp.exp2(logits - lax.broadcast_in_dim(higher, shape, [0]))
        total = total * decay + weights.sum(axis=1)
        sums = sums * lax.broadcast_in_dim(decay, sums.shape, [0])
        return regs.add_product(sums, weights.astype(ring["v"].dtype), ring["v"]), higher, total

    carry = regs.zeros((facts.rows, facts.dim)), regs.rows(facts.rows, MASKED), regs.rows(facts.rows, 0.0)
    sums, top, total = loop(body, carry)
    empty = top < HIDDEN
    safe = jnp.where(empty, 1.0, total)
    scale = jnp.where(empty, 0.0, 1.0 / safe)
    lse = jnp.where(empty, -jnp.inf, top * math.log(2) + jnp.log(safe))
    return sums * lax.broadcast_in_dim(scale, sums.shape, [0]), lse


def _dq_kernel(facts: _Facts, own, start, loop):
    regs, shape = facts.registers, (facts.rows, facts.block)
    lse, delta = regs.load(own["lse"], 1), regs.load(own["delta"], 1)

    def body(ring, other, masked, sums):
        logits, slope = _logits(facts, own, ring, start, other, masked)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(lse, shape, [0]))
        dlogits = weights * (
            regs.product(own["do"], ring["v"], shape) - lax.broadcast_in_dim(delta, shape, [0])
        )
        dlogits = _through_cap(facts, dlogits, slope).astype(ring["k"].dtype)
        return regs.add_product(sums, dlogits, ring["k"])

    return (loop(body, regs.zeros((facts.rows, facts.dim))),)


def _dkv_kernel(facts: _Facts, own, start, loop):
    """Everything transposed: keys along the rows, queries along the columns."""
    regs, shape = facts.registers, (facts.rows, facts.block)

    def body(ring, other, masked, sums):
        sums = dict(zip(facts.outputs, sums))
        logits, slope = _logits(facts, own, ring, start, other, masked)
        lse = lax.broadcast_in_dim(regs.load(ring["lse"], 0), shape, [1])
        weights = jnp.exp2(logits - lse)
        if "dv" in sums:
            sums["dv"] = regs.add_product(sums["dv"], weights.astype(ring["do"].dtype), ring["do"])
        if "dk" in sums:
            delta = lax.broadcast_in_dim(regs.load(ring["delta"], 0), shape, [1])
            dlogits = weights * (regs.product(own["v"], ring["do"], shape) - delta)
            if "dbias" in sums:
                sums["dbias"] = sums["dbias"] + dlogits.sum(axis=1)
            dlogits = _through_cap(facts, dlogits, slope).astype(ring["q"].dtype)
            sums["dk"] = regs.add_product(sums["dk"], dlogits, ring["q"])
        return tuple(sums[name] for name in facts.outputs)

    return loop(
        body,
        tuple(
            regs.rows(facts.rows, 0.0) if name == "dbias" else regs.zeros((facts.rows, facts.dim))
            for name in facts.outputs
        ),
    )


def _logits(facts: _Facts, own, ring, start, other, masked: bool):
    """Logits times log2(e), `[rows, block]`, and the soft cap's derivative."""
    structure, regs, by_query = facts.structure, facts.registers, facts.by_query
    shape = (facts.rows, facts.block)
    logits = regs.product(own["q"], ring["k"], shape) if by_query else regs.product(own["k"], ring["q"], shape)
    slope = None
    if structure.softcap is None:
        logits = logits * (structure.scale * LOG2E)
    else:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)): the unit's own tanh has only 11 bits.
        capped = 1.0 - 2.0 / (1.0 + jnp.exp2(logits * (2.0 * LOG2E * structure.scale / structure.softcap)))
        logits, slope = capped * (structure.softcap * LOG2E), 1.0 - capped * capped
    if "bias" in own or "bias" in ring:
        bias = regs.load(ring["bias"], 0) if by_query else regs.load(own["bias"], 1)
        logits = logits + lax.broadcast_in_dim(bias, shape, [1 if by_query else 0])
    if masked:
        own_numbers, ring_numbers = regs.iota(shape, 0) + start, regs.iota(shape, 1) + other
        queries, keys = (own_numbers, ring_numbers) if by_query else (ring_numbers, own_numbers)
        parts = [structure.allowed(queries, keys), keys < facts.keys if facts.ragged_keys else None]
        if facts.segmented:
            names = ("q_segments", "kv_segments") if by_query else ("kv_segments", "q_segments")
            mine = lax.broadcast_in_dim(regs.load(own[names[0]], 1), shape, [0])
            parts.append(mine == lax.broadcast_in_dim(regs.load(ring[names[1]], 0), shape, [1]))
        for allowed in parts:
            if allowed is not None:
                logits = jnp.where(allowed, logits, MASKED)
    return logits, slope


def _through_cap(facts: _Facts, dlogits, slope):
    """The gradient of the products from that of the logits."""
    return (dlogits if slope is None else dlogits * slope) * facts.structure.scale
