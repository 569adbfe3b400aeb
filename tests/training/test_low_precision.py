"""Training steps under precision policies: near float32's, on meshes, in populations, over micro-batches, resumed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import number_format
from jaxlm.core.policies import POLICIES, PrecisionConfig, PrecisionPolicy, precision_policy
from jaxlm.core.sharding import MeshConfig, make_mesh
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM, StepContext
from jaxlm.optim import OptimizerConfig, adamw
from jaxlm.testing import randomize, tiny_config
from jaxlm.training import (
    Checkpoints,
    Member,
    Population,
    Program,
    accumulate,
    init_state,
    low_precision,
    make_step,
)

MODEL = Decoder(tiny_config("llama", num_layers=2))
# Relative errors of gradients as measured on this model: a format with a bit less, or a policy that does nothing, has
# another one.
ERRORS = {
    "float32": 0.0,
    "float16": 0.00017,
    "bfloat16": 0.0014,
    "fixed16_weights": 0.0022,
    "fixed16_weights_stochastic": 0.0022,
    "bf16_weights": 0.003,
    "bf16_weights_stochastic": 0.003,
    "int8_switchback": 0.0045,
    "int8_vector": 0.0052,
    "int8_block": 0.0075,
    "fp8_block": 0.021,
    "mxfp8": 0.023,
    "fp8_current": 0.027,
    "fp8_delayed": 0.027,
    "mxfp6": 0.03,
    "qat_w4a8": 0.045,
    "nvfp4": 0.086,
    "mxfp4": 0.092,
    "mxfp4_stochastic": 0.114,
    "bitnet": 0.23,
}


def batch(seed=0, rows=8):
    ids = np.random.default_rng(seed).integers(0, 64, (rows, 17)).astype(np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": np.ones((rows, 16), np.float32)}


def recipe(name, rate=1e-2):
    policy = precision_policy(name) if isinstance(name, str) else name
    return low_precision(CausalLM(MODEL), adamw(rate, axes=MODEL.axes()), policy, MODEL.axes())


def start(found, seed=0):
    params = found.prepare(MODEL.init(jax.random.key(seed))["params"])
    return init_state(params, found.tx, jax.random.key(1), extra=found.extra(params))


def compiled(found, **options):
    gradients = functools.partial(accumulate, **options)
    return jax.jit(make_step(found.objective, found.tx, gradients=gradients, apply_updates=found.apply_updates))


def gradient(found, state):
    found = accumulate(found.objective, lambda trainable, frozen, step: trainable, state, None, batch())
    return jnp.concatenate([g.astype(jnp.float32).ravel() for g in jax.tree.leaves(found.grads)]), found


@pytest.fixture(scope="module")
def plain():
    found = recipe("float32")
    return jax.jit(functools.partial(gradient, found))(start(found))


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_are_as_near_float32s_as_the_format_allows_and_steps_lower_the_loss(name, plain):
    found = recipe(name)
    state, step = start(found), compiled(found)
    # In one program, most of which both have in common.
    both = jax.jit(lambda state: (gradient(found, state)[0], *step(state, None, batch())))
    flat, state_after, metrics = both(state)
    if found.policy.history:  # Before the first step it has seen nothing.
        flat, _, _ = both(dataclasses.replace(state, extra=state_after.extra))
    error = float(jnp.linalg.norm(flat - plain[0]) / jnp.linalg.norm(plain[0]))
    assert ERRORS[name] / 1.5 <= error <= ERRORS[name] * 1.5 + 1e-5  # float32 but for rounding
    assert float(metrics["skipped"][0]) == 0
    first = float(metrics["loss"][0] / metrics["loss"][1])
    state = state_after
    for _ in range(8):
        _, state, metrics = both(state)
    assert float(metrics["loss"][0] / metrics["loss"][1]) < first - 0.2


def test_float32_is_the_step_without_a_policy():
    found, tx = recipe("float32"), adamw(1e-2, axes=MODEL.axes())
    bare = jax.jit(make_step(CausalLM(MODEL), tx))
    state = init_state(MODEL.init(jax.random.key(0))["params"], tx, jax.random.key(1))
    one, two = compiled(found)(start(found), None, batch())[0], bare(state, None, batch())[0]
    for a, b in zip(jax.tree.leaves(one.trainable), jax.tree.leaves(two.trainable), strict=True):
        np.testing.assert_array_equal(a, b)


def delayed(history=3):
    def shorter(q):
        return dataclasses.replace(q, history=history)

    policy = precision_policy("fp8_delayed")
    products = {
        name: dataclasses.replace(p, lhs=shorter(p.lhs), rhs=shorter(p.rhs))
        for name, p in zip(("forward", "dgrad", "wgrad"), policy.products, strict=True)
    }
    return dataclasses.replace(policy, **products)


def test_delayed_scaling_is_recorded_once_a_step_whatever_is_rematerialized():
    histories = []
    for remat in ("none", "full"):
        model = Decoder(tiny_config("llama", num_layers=2, remat=remat))
        found = low_precision(CausalLM(model), optax.sgd(0.0), delayed(), model.axes())
        state = start(found)
        step = compiled(found)
        for _ in range(2):
            state, _ = step(state, None, batch())
        histories.append(state.extra["scaling"])
    for a, b in zip(jax.tree.leaves(histories[0]), jax.tree.leaves(histories[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
    history = histories[0][0]["history"]
    assert history.shape == (2, 3, 3)  # layers, tensors, steps
    assert int(jnp.sum(history[0, 0] > 0)) == 2


def test_micro_batches_record_the_largest_of_all():
    found = recipe(delayed())
    state = start(found)
    whole, _ = compiled(found)(state, None, batch())
    cut, _ = compiled(found, micro_batches=4)(state, None, batch())
    for one, other in zip(whole.extra["scaling"], cut.extra["scaling"], strict=True):
        seen = one["history"][..., :2, 0], other["history"][..., :2, 0]
        np.testing.assert_allclose(*seen, rtol=0.02)  # inputs and kernels; kernels to the bit
        np.testing.assert_array_equal(one["history"][:, 1], other["history"][:, 1])


def test_a_step_that_is_not_finite_leaves_scaling_as_it_was_and_halves_the_loss_scale():
    found = recipe(dataclasses.replace(delayed(), loss_scaling=True))
    state, metrics = compiled(found)(start(found), None, batch())
    bad = {**batch(), "loss_weights": np.full((8, 16), np.inf, np.float32)}
    after, metrics = compiled(found)(state, None, bad)
    assert float(metrics["skipped"][0]) == 1
    for a, b in zip(jax.tree.leaves(state.extra["scaling"]), jax.tree.leaves(after.extra["scaling"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(after.extra["loss_scale"]["scale"]) == float(state.extra["loss_scale"]["scale"]) / 2
    np.testing.assert_array_equal(after.trainable["final_norm"]["scale"], state.trainable["final_norm"]["scale"])


def test_the_loss_scale_keeps_small_float16_gradients_and_changes_nothing_else():
    losses = {}
    for scaled in (True, False):
        found = recipe(dataclasses.replace(precision_policy("float16"), loss_scaling=scaled))
        state = start(found)

        def faint(params, found=found, state=state):
            context = StepContext(None, state.extra, 0, jax.random.key(0), {}, found.objective.meters(state.extra))
            totals = {"tokens": jnp.float32(1e7)}  # a piece of a very large batch: gradients below float16's range
            return found.objective.loss(params, batch(), context, totals)[0]

        losses[scaled] = jax.jit(jax.value_and_grad(faint))(state.trainable)
    assert float(losses[True][0]) == float(losses[False][0])
    kernels = [x["blocks"][0]["mlp"]["up"]["kernel"] for _, x in (losses[True], losses[False])]
    assert float(jnp.mean(kernels[0] == 0)) < 0.01
    assert float(jnp.linalg.norm(kernels[1] - kernels[0]) / jnp.linalg.norm(kernels[0])) > 0.05


def test_the_loss_scale_doubles_after_2000_finite_steps_on_end():
    observe = recipe("float16").objective.observe
    state = {"scaling": None, "inner": None, "loss_scale": {"scale": jnp.float32(8), "finite": jnp.int32(1998)}}
    seen = []
    for finite in (True, True, True, False, True):
        state = observe(state, {"amax": None, "inner": None}, jnp.array(finite))
        seen.append((float(state["loss_scale"]["scale"]), int(state["loss_scale"]["finite"])))
    assert seen == [(8, 1999), (16, 0), (16, 1), (8, 0), (8, 1)]


def test_resume_is_exact_under_delayed_scaling(tmp_path):
    found = recipe(delayed())
    step = compiled(found)
    states = [start(found)]
    for i in range(4):
        states.append(step(states[-1], None, batch(i))[0])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, states[2], {})
    checkpoints.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), states[2])
    state = checkpoints.restore(abstract).state
    for i in (2, 3):
        state, _ = step(state, None, batch(i))
    for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(states[4].extra), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(states[4].trainable), strict=True):
        np.testing.assert_array_equal(a, b)
    checkpoints.close()


@pytest.mark.parametrize("name", ["fp8_delayed", "mxfp8"])
def test_a_mesh_gives_what_one_device_does(name):
    losses, extras = [], []
    for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        tx = OptimizerConfig(learning_rate=0.01).make(3, MODEL.axes())
        program = Program(MODEL, CausalLM(MODEL), tx, mesh, policy=precision_policy(name))
        state, seen = program.init(0), []
        for i in range(3):
            state, metrics = program.step(state, None, program.put(batch(i)))
            seen.append(float(metrics["loss"][0] / metrics["loss"][1]))
        losses.append(seen)
        extras.append(jax.device_get(state.extra))
    np.testing.assert_allclose(*losses, rtol=2e-3)
    for a, b in zip(jax.tree.leaves(extras[0]), jax.tree.leaves(extras[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=1e-4)  # the largest anywhere, not on one device


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_populations_train_under_a_policy(how):
    found = recipe(delayed())

    def init(key, hparams):
        params = MODEL.init(key)["params"]
        return init_state(params, found.tx, key, extra=found.extra(params), hparams=hparams)

    step = make_step(found.objective, found.tx, apply_updates=found.apply_updates)
    sample = lambda key, step: jax.tree.map(jnp.asarray, batch())  # noqa: E731
    outcomes = Population(init, step, sample, 3, how=how).train([Member("a", 0), Member("b", 1)])
    for outcome in outcomes:
        assert np.isfinite(outcome.history["loss"]).all()
    assert outcomes[0].history["loss"][0] != outcomes[1].history["loss"][0]


@pytest.mark.parametrize("name", ["bf16_weights_stochastic", "fixed16_weights"])
def test_weights_stay_in_their_format(name):
    found = recipe(name)
    state, _ = compiled(found)(start(found), None, batch())
    form = number_format(found.policy.master)
    for leaf in jax.tree.leaves(state.trainable):
        assert leaf.dtype == (jnp.bfloat16 if name.startswith("bf16") else jnp.float32)
        np.testing.assert_array_equal(form.round(leaf), leaf.astype(jnp.float32))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
    assert all(x.dtype == jnp.float32 for x in moments)


def test_the_model_is_evaluated_as_it_is_trained():
    found = recipe("qat_w4a8")
    params = randomize(MODEL.init(jax.random.key(0))["params"], 0)
    own = float(found.objective.sums(params, batch())["nll"])
    assert own != pytest.approx(float(CausalLM(MODEL).sums(params, batch())["nll"]), rel=1e-4)
    logits = MODEL.apply({"params": found.objective.evaluated(params)}, jnp.asarray(batch()["inputs"]))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch()["targets"])
    assert own == pytest.approx(float(jnp.sum(nll)), rel=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'fp8_current'"):
        PrecisionConfig("fp8_curent")
    with pytest.raises(ConfigError, match="optimizer_state of a policy is 'e4m3'.*adamw_8bit"):
        PrecisionConfig("bfloat16", optimizer_state="e4m3")
    with pytest.raises(ConfigError, match="multiplies int8, of which cpu has no products: implementation 'emulated'"):
        recipe(PrecisionConfig("int8_vector", "native").policy())
    with pytest.raises(ConfigError, match="no kernel of role 'matrix'"):
        low_precision(None, optax.sgd(1.0), precision_policy("bitnet"), {"scale": ("embed",)})
    assert PrecisionPolicy().is_plain
