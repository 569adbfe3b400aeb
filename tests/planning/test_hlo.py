"""HLO text: a module written by hand with known answers, and programs compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core.sharding import MeshConfig, make_mesh
from jaxlm.planning import analyze

MODULE = """HloModule step, is_scheduled=true

%body (p: (s32[], f32[8,128], f32[4,8,128])) -> (s32[], f32[8,128], f32[4,8,128]) {
  %p = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=1
  %stack = f32[4,8,128]{2,1,0} get-tuple-element(%p), index=2
  %row = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,8,128}
  %gathered = f32[32,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %again = f32[32,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %out = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) tuple(%i, %x, %stack)
}

%condition (p: (s32[], f32[8,128], f32[4,8,128])) -> pred[] {
  %p = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) parameter(0)
  %limit = s32[] constant(4)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy(%x), backend_config={"estimated_cycles":"10"}
  %sum = f32[8,128]{1,0} all-reduce(%x), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %start = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) tuple(%i, %sum, %stack)
  %loop = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""
ARRAY = 4 * 8 * 128


def test_loops_count_as_often_as_they_run_and_a_channel_once():
    found = {c.kind: c for c in analyze(MODULE).collectives}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.count, gather.group, gather.payload) == (4, 4, 4 * 4 * ARRAY)
    assert (reduce.count, reduce.group, reduce.payload) == (1, 4, ARRAY)
    assert gather.sent == 0.75 * gather.payload
    assert reduce.sent == 1.5 * reduce.payload


def test_slices_move_what_they_cut_and_on_chip_memory_is_free():
    costs = analyze(MODULE)
    copy, reduction = ARRAY, 2 * ARRAY
    loop = 4 * (2 * ARRAY + 2 * (ARRAY + 4 * ARRAY))
    assert costs.bytes_moved == copy + reduction + loop
    assert costs.cycles == 10
    assert costs.guessed_loops == 0


def test_a_loop_of_unknown_length_counts_as_a_causal_one():
    text = MODULE.replace("s32[] constant(4)", "s32[] get-tuple-element(%p), index=0")
    costs = analyze(text)
    assert costs.guessed_loops == 1
    assert next(c for c in costs.collectives if c.kind == "all-gather").count == 1


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        analyze("module @jit_step {}")


def test_a_compiled_scan_with_sharded_weights():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    whole = NamedSharding(mesh, PartitionSpec(None, None))

    def step(x, stack):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jax.lax.scan(layer, x, stack)[0]

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    stack = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=weights)
    costs = analyze(jax.jit(step, out_shardings=rows).lower(x, stack).compile().as_text())
    (gather,) = costs.collectives
    assert (gather.kind, gather.group) == ("all-gather", 8)
    assert gather.payload == 5 * 32 * 32 * 4


def test_an_instruction_that_the_compiler_cannot_judge_is_left_out():
    assert analyze(MODULE.replace('"10"', f'"{2**63 - 1}"')).cycles is None
