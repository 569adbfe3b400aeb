"""Every implementation against the definition in float64; its memory; and that kernels compile and fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.cross_entropy import KernelError, Shards, cross_entropy
from pallas_kernels.cross_entropy.tpu import VMEM_BUDGET, VMEM_LIMIT, choose_tiles, vmem_bytes
from pallas_kernels.target import CHIPS
from tests.pallas_kernels import absent_tpu

IMPLEMENTATIONS = ("reference", "chunked", "tpu_interpret")
Z_LOSS = 0.05


def case(tokens, embed, vocab, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x, head = (jnp.asarray(rng.normal(size=s), dtype) for s in ((tokens, embed), (embed, vocab)))
    targets = jnp.asarray(rng.integers(0, vocab, tokens))
    weights, a, b = (jnp.asarray(rng.normal(size=tokens), jnp.float32) for _ in range(3))
    return x, head, targets, weights, a, b


def expected(x, head, targets, weights, a, b, softcap):
    """Loss, log-partition, and the gradients of `sum(a * loss + b * lse)` to x, head and weights, in float64."""
    x, head, weights, a, b = (np.asarray(v, np.float64) for v in (x, head, weights, a, b))
    z = x @ head
    capped = z if softcap is None else softcap * np.tanh(z / softcap)
    top = capped.max(1, keepdims=True)
    lse = np.log(np.exp(capped - top).sum(1)) + top[:, 0]
    rows = np.arange(len(x))
    each = lse - capped[rows, targets] + Z_LOSS * lse**2
    d = np.exp(capped - lse[:, None]) * (a * weights * (1 + 2 * Z_LOSS * lse) + b)[:, None]
    d[rows, targets] -= a * weights
    d *= 1 if softcap is None else 1 - (capped / softcap) ** 2
    return weights * each, lse, d @ head.T, x.T @ d, a * each


def computed(x, head, targets, weights, a, b, softcap, transposed, implementation, chunk=128, shards=None):
    def total(x, head, weights):
        loss, lse = cross_entropy(
            x,
            head.T if transposed else head,
            targets,
            weights=weights,
            z_loss=Z_LOSS,
            softcap=softcap,
            transposed=transposed,
            chunk=chunk,
            shards=shards,
            implementation=implementation,
        )
        return jnp.sum(a * loss + b * lse), (loss, lse)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(x, head, weights)
    return *outputs, *gradients


def compare(got, wanted, tolerance):
    for name, a, b in zip(("loss", "lse", "dx", "dhead", "dweights"), got, wanted, strict=True):
        error = np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, softcap, transposed):
    # Neither tokens nor columns fill whole tiles or chunks.
    problem = case(37, 48, 300)
    compare(computed(*problem, softcap, transposed, implementation), expected(*problem, softcap), 1e-5)


some_problem = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40) | st.just(530),
        "embed": st.integers(1, 70),
        "vocab": st.integers(1, 300) | st.sampled_from([1024, 1100]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "softcap": st.none() | st.just(4.0),
        "transposed": st.booleans(),
        "implementation": st.sampled_from(IMPLEMENTATIONS[1:]),
    }
)


def check_problem(tokens, embed, vocab, dtype, softcap, transposed, implementation):
    problem = case(tokens, embed, vocab, dtype, seed=tokens)
    tolerance = {"float32": 2e-5, "bfloat16": 3e-2}[dtype]
    got = computed(*problem, softcap, transposed, implementation, chunk=256)
    compare(got, expected(*problem, softcap), tolerance)


@settings(max_examples=5, derandomize=True, deadline=None, database=None)
@given(some_problem)
def test_any_shape(problem):
    check_problem(**problem)


@pytest.mark.release
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(some_problem)
def test_many_shapes(problem):
    check_problem(**problem)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gradients_in_float64_by_finite_differences(implementation):
    with jax.enable_x64(True):
        x, head, targets, *numbers = case(5, 8, 30, jnp.float64)
        weights, a, b = (jnp.asarray(n, jnp.float64) for n in numbers)
        direction = case(5, 8, 30, jnp.float64, seed=1)

        def total(t):
            moved = x + t * direction[0], head + t * direction[1], targets, weights + t * direction[3]
            loss, lse = computed(*moved, a, b, 4.0, False, implementation, chunk=7)[:2]
            return jnp.sum(a * loss + b * lse)

        _, _, *gradients = computed(x, head, targets, weights, a, b, 4.0, False, implementation, chunk=7)
        slope = sum(jnp.sum(g * direction[i]) for g, i in zip(gradients, (0, 1, 3), strict=True))
        np.testing.assert_allclose((total(1e-5) - total(-1e-5)) / 2e-5, slope, rtol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_gradient_by_finite_differences(implementation):
    x, head, targets, weights, a, b = case(5, 8, 30)
    direction = case(5, 8, 30, seed=1)

    def total(t):
        y = computed(x + t * direction[0], head + t * direction[1], targets, weights, a, b, 4.0, False, implementation)
        return float(jnp.sum(a * y[0] + b * y[1]))

    got = computed(x, head, targets, weights, a, b, 4.0, False, implementation)
    slope = float(jnp.sum(got[2] * direction[0]) + jnp.sum(got[3] * direction[1]))
    np.testing.assert_allclose((total(1e-2) - total(-1e-2)) / 2e-2, slope, rtol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_two_axes_and_which_are_predicted(implementation):
    x, head, targets, weights, *_ = case(24, 16, 140)
    targets = targets.at[::2].set(jnp.argmax(x @ head, axis=1)[::2])
    more = {"weights": weights, "implementation": implementation, "chunk": 64}
    loss, lse, correct = cross_entropy(x, head, targets, return_correct=True, **more)
    assert np.array_equal(correct, np.argmax(x @ head, axis=1) == targets)
    shaped = (x.reshape(3, 8, 16), head, targets.reshape(3, 8))
    again = cross_entropy(*shaped, **{**more, "weights": weights.reshape(3, 8)})
    for a, b in zip(again, (loss, lse), strict=True):
        np.testing.assert_allclose(a, b.reshape(3, 8), rtol=1e-6)


SHARDS = {
    "rows": Shards(("data", "tensor")),
    "columns": Shards((), ("data", "tensor")),
    "both": Shards(("data", None), "tensor"),
    "rows that do not divide": Shards(("tensor", "data")),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shards", SHARDS)
def test_on_a_mesh_each_device_computes_its_part(shards, transposed):
    problem = case(4 * 6, 16, 304)
    types = (jax.sharding.AxisType.Auto,) * 2

    def shaped(x, head, targets, weights, a, b):
        return x.reshape(4, 6, 16), head, *(v.reshape(4, 6) for v in (targets, weights, a, b))

    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"), axis_types=types)):
        got = computed(*shaped(*problem), 5.0, transposed, "tpu_interpret", shards=SHARDS[shards])
    loss, lse, dx, dhead, dweights = got
    flat = loss.reshape(-1), lse.reshape(-1), dx.reshape(24, 16), dhead, dweights.reshape(-1)
    compare(flat, expected(*problem, 5.0), 1e-5)


def test_a_mesh_that_cannot_be_divided_so_is_named():
    x, head, targets, *_ = case(8, 16, 301)
    types = (jax.sharding.AxisType.Auto,) * 2
    call = functools.partial(cross_entropy, x, head, targets, implementation="tpu_interpret")
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"), axis_types=types)):
        for message, shards in {
            "a mesh of 8 devices without shards": None,
            "a vocabulary of 301 in 2 parts": Shards(("data",), "tensor"),
            "axes that repeat or are not of the mesh": Shards(("data",), "data"),
        }.items():
            with pytest.raises(KernelError, match=message):
                call(shards=shards)
        loss, _ = cross_entropy(x, head, targets)  # XLA divides what is no kernel
    np.testing.assert_allclose(loss, cross_entropy(x, head, targets)[0], rtol=1e-6)


def test_large_logits_and_weights_of_zero_are_finite():
    x, head, targets, _, a, b = case(6, 8, 40)
    for implementation in IMPLEMENTATIONS:
        got = computed(1e4 * x, head, targets, jnp.zeros(6), a, 0 * b, None, False, implementation)
        assert all(np.all(np.isfinite(v)) for v in got)
        assert not np.any(got[2])


def test_peak_memory_is_independent_of_the_vocabulary():
    def temporary(vocab, implementation):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 64), (64, vocab))]
        targets = jax.ShapeDtypeStruct((256,), jnp.int32)

        def forward(x, head, targets):
            return jnp.sum(cross_entropy(x, head, targets, chunk=1024, implementation=implementation)[0])

        # The gradient of the head is an output, as large as the head; what else there is must not grow.
        both = jax.jit(jax.value_and_grad(forward, (0, 1))).lower(*shapes, targets).compile().memory_analysis()
        alone = jax.jit(forward).lower(*shapes, targets).compile().memory_analysis()
        return alone.temp_size_in_bytes, both.temp_size_in_bytes - 64 * vocab * 4

    small, large = (temporary(vocab, "chunked") for vocab in (8192, 65536))
    assert large[0] <= 1.02 * small[0]
    assert large[1] <= max(1.02 * small[1], 4 * 256 * 1024 * 4)
    assert temporary(65536, "reference")[0] >= 256 * 65536 * 4


def test_columns_beyond_the_vocabulary_do_no_harm():
    # All logits are -400, so a column of zeros in the last tile would be e^400 times as likely.
    x, head, targets, weights, a, b = case(6, 8, 300)
    problem = (10 * jnp.ones_like(x), -5 * jnp.ones_like(head), targets, weights, a, b)
    for implementation in IMPLEMENTATIONS:
        compare(computed(*problem, None, False, implementation), expected(*problem, None), 1e-4)


@pytest.mark.parametrize(("chip", "transposed"), [("v5e", False), ("v5e", True), ("v5p", False), ("v6e", True)])
def test_kernels_compile_without_logits_in_memory(chip, transposed):
    # (Of widths that are no multiple of 128, XLA may lay the head out transposed and copy it.)
    tokens, embed, vocab = 1000, 640, 49152
    shape = (vocab, embed) if transposed else (embed, vocab)
    x, head = (jax.ShapeDtypeStruct(s, t) for s, t in (((tokens, embed), jnp.bfloat16), (shape, jnp.float32)))
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def loss(x, head, targets):
        return jnp.sum(cross_entropy(x, head, targets, softcap=30.0, transposed=transposed)[0])

    both = jax.value_and_grad(loss, (0, 1))
    compiled = absent_tpu.compile_for(absent_tpu.mesh(chip), both, x, head, targets)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 8


@pytest.mark.parametrize("embed", [64, 640, 2048, 4096, 8192])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles_fit(embed, dtype):
    tiles = choose_tiles(8192, embed, 128256, dtype, dtype)
    assert vmem_bytes(tiles, embed, dtype, dtype) <= VMEM_BUDGET < VMEM_LIMIT
    assert all(CHIPS[chip].vmem >= VMEM_LIMIT for chip in absent_tpu.KERNEL_CHIPS)


@pytest.mark.parametrize(("embed", "dtype"), [(4096, jnp.bfloat16), (8192, jnp.float32)])
def test_wide_models_compile(embed, dtype):
    x, head = (jax.ShapeDtypeStruct(s, dtype) for s in ((512, embed), (embed, 4096)))
    targets = jax.ShapeDtypeStruct((512,), jnp.int32)
    loss = lambda *args: jnp.sum(cross_entropy(*args, implementation="tpu")[0])  # noqa: E731
    absent_tpu.compile_for(absent_tpu.mesh("v5p"), jax.value_and_grad(loss, (0, 1)), x, head, targets)


def test_bad_input_is_named():
    x, head, targets, *_ = case(6, 8, 40)
    call = functools.partial(cross_entropy, x, head, targets)
    for message, do in {
        r"x \[tokens, embed\] has shape \(6, 8\), but head \[vocab, embed\]": lambda: call(transposed=True),
        r"targets have shape \(5,\), expected \(6,\)": lambda: cross_entropy(x, head, targets[:5]),
        r"has shape \(0, 8\), but head": lambda: cross_entropy(x[:0], head, targets[:0]),
        "targets are float32": lambda: cross_entropy(x, head, x[:, 0]),
        "weights have shape": lambda: call(weights=jnp.ones(3)),
        "z_loss is -1": lambda: call(z_loss=-1),
        "softcap is 0": lambda: call(softcap=0),
        "valid: auto, reference": lambda: call(implementation="triton"),
        r"expected two axes \(x: or more\)": lambda: cross_entropy(x, head[None], targets),
        r"targets have shape \(6,\), expected \(1, 6\)": lambda: cross_entropy(x[None], head, targets),
        "cannot do .*: platform cpu": lambda: call(implementation="tpu"),
        "operands in float16": lambda: call(implementation="tpu_interpret", operand_dtype=jnp.float16),
    }.items():
        with pytest.raises(KernelError, match=message):
            do()
