import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=2, tensor=4), (1, 2, 1, 1, 4)),
    ],
)
def test_sizes_fill_what_is_left(config, sizes):
    assert config.sizes(8) == sizes
    assert tuple(make_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "must equal 8"),
        (MeshConfig(tensor=3), "must divide 8"),
        (MeshConfig(fsdp=-1), "more than one -1"),
        (MeshConfig(tensor=0), "mesh.tensor is 0"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        config.sizes(8)


def test_constraints_take_effect_inside_a_mesh_and_are_nothing_outside():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", "act_embed") is x
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with use_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "act_mlp") * 2)(x)
        odd = jax.jit(lambda x: sharding.constrain(x, "batch", "act_mlp") * 2)(jnp.ones((1, 4)))
    expected = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
    assert y.sharding.is_equivalent_to(expected, 2)
    assert odd.shape == (1, 4)


def test_unknown_axis_names_and_sizes_that_do_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    shape = {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
    with pytest.raises(ConfigError, match="no sharding rule for the logical axis 'embd'"):
        sharding.shardings(mesh, {"w": ("embd", "mlp")}, shape)
    with pytest.raises(ConfigError, match="w: its axis 'mlp' of size 6 is not divisible by 4"):
        sharding.shardings(mesh, {"w": ("mlp", "embed")}, shape)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(ConfigError, match="batch of 12 rows is not divisible by 8"):
        sharding.shard_batch(mesh, {"inputs": np.zeros((12, 4), np.int32)})
    placed = sharding.shard_batch(mesh, {"inputs": np.zeros((16, 4), np.int32)})
    assert len(placed["inputs"].addressable_shards) == 8


def test_the_platform_is_that_of_the_mesh():
    assert sharding.platform() == "cpu"
    with use_mesh(make_mesh()):
        assert sharding.platform() == "cpu"
        assert sharding.axis_size("data") == 8
    assert sharding.axis_size("data") == 1


def test_state_lies_like_its_parameter_along_the_axes_that_they_share():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    params = {"w": jnp.zeros((3, 8, 16)), "v": jnp.zeros(8)}
    lies = sharding.shardings(mesh, {"w": ("layers", "embed", "mlp"), "v": ("norm",)}, params)
    state = {
        "mu": {"w": jnp.zeros((3, 8, 16)), "v": jnp.zeros(8)},  # as the parameter
        "image": {"w": jnp.zeros((3, 2, 16))},  # the rank of a projection instead of one axis
        "basis": {"w": jnp.zeros((3, 8, 2))},
        "norms": {"w": jnp.zeros(3)},  # fewer axes
        "count": jnp.zeros(()),
    }
    found = jax.tree.map(lambda s: s.spec, sharding.like_params(state, params, lies, mesh))
    whole, no = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec()
    assert found["mu"] == {"w": whole, "v": PartitionSpec(None)}
    assert found["image"]["w"] == PartitionSpec(None, None, "tensor")
    assert found["basis"]["w"] == PartitionSpec(None, "fsdp", None)
    assert found["norms"]["w"] == found["count"] == no


def test_gathered_weights_have_gradients_that_lie_as_they_are_stored():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)

    def grad(w, x):
        def loss(w):
            return jnp.sum(jnp.square(x @ sharding.gather(w, ("embed", None), (None, None)).T))

        return jax.grad(loss)(w)

    with sharding.use_mesh(mesh):
        stored = NamedSharding(mesh, PartitionSpec("fsdp", None))
        got = jax.jit(grad)(jax.device_put(w, stored), jax.device_put(x, stored))
    assert got.sharding.is_equivalent_to(stored, 2)
    np.testing.assert_allclose(got, 2 * (x @ w.T).T @ x, rtol=1e-5)


def test_one_process_holds_all_rows_and_reads_whole_arrays():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    assert sharding.data_share(mesh) == (0, 1)
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    placed = sharding.shard_batch(mesh, {"x": x})["x"]
    np.testing.assert_array_equal(sharding.to_host(placed), x)
    assert sharding.to_host(x) is x
