"""Which implementation is taken, what a forced one says that cannot, and what bad input says."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import AttentionError, UnsupportedError, flash_attention, flash_attention_sharded
from pallas_kernels.attention.dispatch import Request, choose
from pallas_kernels.attention.problem import Structure
from pallas_kernels.attention.tiles import Tiles
from pallas_kernels.target import Target, current

OPTIONS = ("reference", "blocked", "tpu", "gpu", "cudnn")


def request(platform="tpu", kind="TPU v5 lite", parts=1, length=512, head_dim=128, dtype=jnp.bfloat16, **more):
    shape = (2, 2, 2, length, length, head_dim)
    return Request(Target(platform, kind, parts), Structure(), shape, jnp.dtype(dtype), **more)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (request(), "tpu"),
        (request(dtype=jnp.float32), "tpu"),
        (request(parts=4), "blocked"),
        (request(head_dim=512), "blocked"),
        (request("gpu", "NVIDIA H200"), "gpu"),
        (request("gpu", "NVIDIA H100 80GB HBM3"), "gpu"),
        (request("gpu", "NVIDIA H200", dtype=jnp.float32), "blocked"),
        (request("gpu", "NVIDIA A100-SXM4-40GB"), "blocked"),
        (request("cpu", "cpu"), "blocked"),
        (request("cpu", "cpu", length=8), "reference"),
        (request("cpu", "cpu", dtype=jnp.float64), "reference"),
        (request("gpu", "NVIDIA H200", decode=True), "reference"),
    ],
)
def test_auto_takes_what_fits(asked, taken):
    options = tuple(o for o in OPTIONS if o != "blocked") if asked.decode else OPTIONS
    assert choose("auto", asked, options) == taken


@pytest.mark.parametrize(
    ("name", "asked", "why"),
    [
        ("tpu", request("cpu", "cpu"), "its kernels are for tpu, and the arrays are on cpu"),
        ("tpu", request(parts=4), "cannot be partitioned over a mesh of 4 devices: call it inside jax.shard_map"),
        ("tpu", request(head_dim=16), "head_dim is 16, expected 32 to 256"),
        ("tpu", request(dtype=jnp.float16), "dtype is float16, expected float32 or bfloat16"),
        ("tpu", request(length=2**19, segments=True), "its tables of blocks take"),
        ("gpu", request("gpu", "NVIDIA L4"), "for Hopper"),
        ("gpu", request("gpu", "NVIDIA H200", dtype=jnp.float32), "dtype is float32, expected bfloat16 or float16"),
        ("cudnn", request("gpu", "NVIDIA H200", bias=True), "without bias"),
    ],
)
def test_a_forced_implementation_says_why_it_cannot(name, asked, why):
    with pytest.raises(UnsupportedError, match=f"'{name}' cannot compute this: .*{re.escape(why)}"):
        choose(name, asked, OPTIONS)


def test_an_unknown_implementation_names_the_nearest():
    with pytest.raises(AttentionError, match="did you mean 'blocked'"):
        choose("block", request(), OPTIONS)


def test_the_debug_flag_says_why_no_kernel_was_used(monkeypatch, caplog):
    monkeypatch.setenv("PALLAS_KERNELS_DEBUG", "1")
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        choose("auto", request(head_dim=512), OPTIONS)
    assert "attention: blocked (tpu: head_dim is 512, expected 32 to 256)" in caplog.text


def test_the_platform_is_that_of_the_mesh():
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(-1), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.zeros((8, 4))
    seen = []

    def look(x):
        seen.append(current(x))
        return x

    jax.jit(look)(x)
    with jax.set_mesh(mesh):
        jax.jit(look)(x)
        jax.jit(jax.shard_map(look, in_specs=P("data"), out_specs=P("data")))(x)
    assert [(d.platform, d.devices) for d in seen] == [("cpu", 1), ("cpu", 8), ("cpu", 1)]


@pytest.mark.parametrize("implementation", ["blocked", "tpu"])
def test_sharded_equals_whole(implementation):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, 40, 4, 32)).astype(np.float32)
    k, v = (rng.normal(size=(4, 40, 2, 32)).astype(np.float32) for _ in "kv")
    ids = np.sort(rng.integers(0, 3, size=(4, 40)), axis=1)
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    kernel = {"interpret": True, "tiles": Tiles(16, 16, 16, 16)} if implementation == "tpu" else {}

    def cut(q, k, v):
        return flash_attention_sharded(
            q, k, v, batch_axes="data", head_axes="tensor", segment_ids=ids, implementation=implementation, **kernel
        )

    def whole(q, k, v):
        return flash_attention(q, k, v, segment_ids=ids, implementation="reference")

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(q, k, v)

    with jax.set_mesh(mesh):
        got = jax.tree.map(np.asarray, gradients(cut))
        with pytest.raises(AttentionError, match="not divisible by 4, the size of mesh axes data"):
            cut(q[:3], k[:3], v[:3])
    for x, y in zip(got, gradients(whole)):
        np.testing.assert_allclose(x, y, atol=1e-5)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 8, 64)}, r"q has shape \(2, 8, 64\), expected \[batch, queries, heads, head_dim\]"),
        ({"k": zeros(3, 8, 2, 32)}, "disagree on the batch"),
        ({"k": zeros(2, 8, 2, 64)}, "disagree on head_dim"),
        ({"v": zeros(2, 8, 2, 64)}, "values of another head_dim are not supported"),
        ({"v": zeros(2, 8, 2, 32, dtype=np.float16)}, "v is float16 and q is float32"),
        ({"k": zeros(2, 8, 3, 32), "v": zeros(2, 8, 3, 32)}, "4 heads of q are not a multiple of the 3 heads of k"),
        ({"k": zeros(2, 0, 2, 32), "v": zeros(2, 0, 2, 32)}, "an axis of length 0"),
        ({"segment_ids": zeros(2, 7, dtype=np.int32)}, r"have shape \(2, 7\), expected \(2, 8\)"),
        ({"segment_ids": zeros(2, 8)}, "are float32, expected integers"),
        ({"bias": zeros(2, 4, 8, 8)}, r"bias has shape \(2, 4, 8, 8\), expected \[batch, keys\]"),
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"softcap": -1.0}, "softcap is -1.0, expected a positive number"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"q": zeros(2, 8, 4, 32), "k": zeros(2, 8, 2, 32), "v": zeros(2, 8, 2, 32), **change}
    with pytest.raises(AttentionError, match=message):
        flash_attention(**arguments)
