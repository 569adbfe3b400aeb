"""Every kind of weight passes the same tests, a dummy third one among them, without the layers knowing."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxlm import weights
from jaxlm.core import sharding, trees
from jaxlm.core.policies import PrecisionPolicy
from jaxlm.models import Decoder, gather_layers, layer
from jaxlm.objectives import CausalLM
from jaxlm.optim import roles
from jaxlm.testing import tiny_config, tiny_decoder
from jaxlm.training import Checkpoints
from jaxlm.weights import (
    LowPrecision,
    LowRank,
    Quantized,
    Weight,
    add_group_scale,
    add_low_rank,
    factored_kernel,
    learn_steps,
    pack,
    sparse_low_rank_kernel,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowScaled(Weight):
    """A kernel stored as int8 with one scale a row: a third kind, which only says how to become dense."""

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self):
        return tuple(self.values.shape)

    @property
    def dtype(self):
        return self.scales.dtype

    def dense(self):
        return self.values.astype(self.scales.dtype) * self.scales

    def child_axes(self, axes):
        return RowScaled(axes, (*axes[:-1], None))

    @classmethod
    def quantize(cls, w):
        scales = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / 127
        return cls(jnp.round(w / scales).astype(jnp.int8), scales)


def as_dense(w):
    return w


def as_low_rank(w):
    low = add_low_rank(jax.random.key(0), w, 3, alpha=6.0)
    return dataclasses.replace(low, b=0.1 * jax.random.normal(jax.random.key(1), low.b.shape))


def as_int8(w):
    """One scale a column."""
    scale = np.max(np.abs(w), axis=-2, keepdims=True) / 127
    codes, _ = pack(np.round(w / scale), 8, w.shape[-2])
    return jax.tree.map(jnp.asarray, Quantized(codes, scale.astype(np.float32)))


def as_two_level_5_bit(w, axis=-1):
    """Blocks of eight along the last axis, whole numbers times a float16 for their scales and minimums."""
    block = 8
    shape = list(w.shape)
    shape[axis:] = [shape[axis] // block, block]
    blocks = np.asarray(w).reshape(shape)
    low = blocks.min(-1)
    scale = (blocks.max(-1) - low) / 31
    super_scale = (scale.max(-1, keepdims=True) / 63).astype(np.float16)
    super_minimum = (np.abs(low).max(-1, keepdims=True) / 127).astype(np.float16)
    scale = np.ceil(scale / super_scale).astype(np.uint8)
    low = np.floor(low / super_minimum).astype(np.int8)
    spread = [(a * b.astype(np.float32))[..., None] for a, b in ((scale, super_scale), (low, super_minimum))]
    codes = np.clip(np.round((blocks - spread[1]) / spread[0]), 0, 31).reshape(w.shape)
    packed = Quantized(*_parts(codes, 5, block, axis, scale), low, super_scale, super_minimum, bits=5, axis=axis)
    return jax.tree.map(jnp.asarray, packed)


def _parts(codes, bits, block, axis, scale):
    low, high = pack(codes, bits, block, axis)
    return low, scale, high


def as_low_rank_over_quantized(w):
    return dataclasses.replace(as_low_rank(w), base=as_two_level_5_bit(w))


def as_factored(w):
    return factored_kernel(jax.random.key(0), w.shape, 3, alpha=3.0)


def as_low_rank_over_sparse(w):
    w = sparse_low_rank_kernel(jax.random.key(0), w.shape, 3, density=0.2)
    return dataclasses.replace(w, b=0.1 * jax.random.normal(jax.random.key(1), w.b.shape))


def as_low_precision(w):
    """Under a policy that rounds nothing: what others round is in the products' own tests."""
    return LowPrecision(w, None, None, None, PrecisionPolicy())


def as_learned_step(w):
    return learn_steps({"w": w}, ["w"], 6)["w"]


def as_group_scaled(w):
    w = add_group_scale(w, 2)
    return dataclasses.replace(w, scale=w.scale + 0.1 * jax.random.normal(jax.random.key(1), w.scale.shape))


KINDS = [
    as_dense,
    as_low_precision,
    as_learned_step,
    as_factored,
    as_low_rank_over_sparse,
    as_low_rank,
    RowScaled.quantize,
    as_int8,
    as_two_level_5_bit,
    as_low_rank_over_quantized,
    as_group_scaled,
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def kernel(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_products_equal_those_of_the_dense_matrix(kind):
    w = kind(kernel(6, 8))
    full = weights.dense(w)
    assert w.shape == full.shape == (6, 8)
    x, y = kernel(2, 5, 6), kernel(3, 8)
    chex.assert_trees_all_close(weights.matmul(x, w), x @ full, atol=1e-5)
    chex.assert_trees_all_close(weights.matmul_transposed(y, w), y @ full.T, atol=1e-5)
    ids = jnp.array([[0, 5], [2, 2]])
    chex.assert_trees_all_close(weights.take(w, ids), full[ids], atol=1e-6)
    assert weights.nbytes(w) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))


def test_grouped_products_equal_one_a_group(kind):
    w = kind(kernel(3, 6, 8))
    full = weights.dense(w)
    x, sizes = kernel(7, 6), jnp.array([2, 0, 5], jnp.int32)
    expected = jnp.concatenate([x[:2] @ full[0], x[2:] @ full[2]])
    chex.assert_trees_all_close(weights.grouped_matmul(x, w, sizes), expected, atol=1e-5)


def test_batch_under_vmap(kind):
    w = kind(kernel(3, 6, 8))
    x = kernel(3, 4, 6)
    chex.assert_trees_all_close(jax.vmap(weights.matmul)(x, w), x @ weights.dense(w), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_model_runs_on_any_kind_scanned_rematerialized_and_tied(kind, tied, remat):
    model, params = tiny_decoder("llama", tie_embeddings=tied, remat=remat)
    replaced = replace_kernels(model, params, kind)
    dense = jax.tree.map(weights.dense, replaced, is_leaf=lambda x: isinstance(x, Weight))
    ids = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    apply = jax.jit(model.apply)
    chex.assert_trees_all_close(apply({"params": replaced}, ids), apply({"params": dense}, ids), atol=1e-4)


def replace_kernels(model, params, kind):
    wanted = roles.roles(model.axes())
    return jax.tree.map(lambda r, w: kind(w) if r in ("matrix", "embed", "tied", "head") else w, wanted, params)


def test_child_axes_name_every_array_and_shard_it(kind):
    model, params = tiny_decoder("llama", vocab_size=64)
    params = replace_kernels(model, params, kind)
    axes = jax.tree.map(
        weights.child_axes, params, model.axes(), is_leaf=lambda x: isinstance(x, Weight) or sharding.is_axes(x)
    )
    config = sharding.MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(config)
    shapes = jax.eval_shape(lambda x: x, params)
    rules = {**model.config.sharding_rules(mesh)}
    placed = jax.device_put(params, sharding.shardings(mesh, axes, shapes, rules))
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(placed))
    ids = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    expected = jax.jit(model.apply)({"params": params}, ids)
    with sharding.use_mesh(mesh, rules):
        sharded = jax.jit(lambda p, x: model.apply({"params": p}, x))(placed, ids)
    chex.assert_trees_all_close(np.asarray(sharded), np.asarray(expected), atol=1e-4)


def test_checkpoints_keep_any_kind(kind, tmp_path):
    w = {"kernel": kind(kernel(4, 6, 8))}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(1, w, {})
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), w)
    chex.assert_trees_all_equal(checkpoints.restore(abstract).state, w)
    checkpoints.close()


def test_low_rank_trains_a_and_b_only_and_computes_no_other_gradient():
    model, params = tiny_decoder("llama")
    adapted = replace_kernels(model, params, as_low_rank)
    trainable = jax.tree.map(
        lambda w: dataclasses.replace(w, base=None) if isinstance(w, LowRank) else None,
        adapted,
        is_leaf=lambda x: isinstance(x, LowRank),
    )
    paths = [path for path, _ in trees.named_leaves(trainable)]
    assert paths
    assert all(path.endswith(("/a", "/b")) for path in paths)
    ids = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    batch = {"inputs": ids, "targets": ids, "loss_weights": jnp.ones((2, 9))}
    objective = CausalLM(model)

    def join(part, whole):
        return dataclasses.replace(part, base=whole.base) if isinstance(part, LowRank) else whole

    def loss(trainable):
        is_weight = lambda x: x is None or isinstance(x, LowRank)  # noqa: E731
        return objective.sums(jax.tree.map(join, trainable, adapted, is_leaf=is_weight), batch)["loss"]

    grads = jax.grad(loss)(trainable)
    whole = jax.grad(lambda p: objective.sums(p, batch)["loss"])(adapted)
    for (path, got), expected in zip(
        trees.named_leaves(grads),
        [g for p, g in trees.named_leaves(whole) if p.endswith(("/a", "/b"))],
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-3, err_msg=path)

    def products(f, x):
        return jax.jit(jax.grad(f)).lower(x).compile().as_text().count(" dot(")

    whole_loss = lambda p: objective.sums(p, batch)["loss"]  # noqa: E731
    assert products(loss, trainable) < products(whole_loss, adapted)


def test_low_rank_passes_through_linen_scan_and_remat():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(weights.matmul(x, self.get_variable("params", "kernel"))), None

    scanned = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    stack = as_low_rank(kernel(3, 6, 6))
    x = kernel(2, 6)

    def run(w):
        return jnp.sum(scanned.apply({"params": {"kernel": w}}, x, None)[0])

    def loop(w):
        y = x
        for i in range(3):
            y = jnp.tanh(y @ weights.dense(jax.tree.map(lambda leaf: leaf[i], w)))  # noqa: B023
        return jnp.sum(y)

    chex.assert_trees_all_close(jax.grad(run)(stack), jax.grad(loop)(stack), atol=1e-5)


def test_layers_of_different_weight_types_make_two_runs():
    model = Decoder(tiny_config("llama", num_layers=6))
    params = model.init(jax.random.key(0))["params"]
    stack = params["blocks"][0]
    first = jax.tree.map(lambda x: x[:2], stack)
    rest = jax.tree.map(lambda x: x[2:], stack)
    rest["mlp"]["up"]["kernel"] = RowScaled.quantize(rest["mlp"]["up"]["kernel"])
    mixed = {**params, "blocks": [first, rest]}
    dense = jax.tree.map(weights.dense, rest, is_leaf=lambda x: isinstance(x, Weight))
    joined = {**params, "blocks": [jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, dense)]}
    ids = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    chex.assert_trees_all_close(model.apply({"params": mixed}, ids), model.apply({"params": joined}, ids), atol=1e-5)
    picked = gather_layers(mixed, [5, 0, 1, 4])
    assert [len(jax.tree.leaves(run)) for run in picked["blocks"]] == [10, 9, 10]
    chex.assert_trees_all_equal(layer(picked, 0), layer(mixed, 5))
    chex.assert_trees_all_equal(layer(picked, 2), layer(mixed, 1))


def test_bfloat16_operands_accumulate_in_float32():
    x, w = kernel(4, 4096), kernel(4096, 3)
    got = weights.matmul(x, w, dtype=jnp.bfloat16)
    rounded = [np.asarray(v.astype(jnp.bfloat16), np.float64) for v in (x, w)]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rounded[0] @ rounded[1], rtol=1e-4, atol=1e-3)
