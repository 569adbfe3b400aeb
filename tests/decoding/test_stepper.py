"""The contract of every stepper: histories, not calls, decide what comes next."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from tests.decoding.steppers import STEPPERS, make, rows

CAPACITY = 24
RAGGED = [name for name in STEPPERS if make(name)[0].per_row]
SHARED = [name for name in STEPPERS if name not in RAGGED]
TOKENS = np.random.default_rng(0).integers(0, 16, (3, 12)).astype(np.int32)
LENGTHS = np.array([12, 5, 9], np.int32)


@functools.partial(jax.jit, static_argnames=("stepper", "last_only"))
def step(stepper, params, carry, tokens, counts, last_only=False):
    return stepper.step(params, carry, tokens, counts, last_only=last_only)


def begin(stepper, params, tokens=TOKENS, counts=LENGTHS, last_only=False):
    return step(stepper, params, stepper.init(params, len(tokens), CAPACITY), tokens, counts, last_only)


def continued(stepper, params, carry):
    """What the carry makes of three more tokens a row: a fingerprint of all that it remembers."""
    more = np.tile(np.array([[3, 1, 2]], np.int32), (rows(stepper, carry), 1))
    return np.asarray(step(stepper, params, carry, more, np.full((len(more),), 3, np.int32))[0])


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.parametrize("name", STEPPERS)
def test_last_only_is_the_last_real_place_of_all_logits(name):
    stepper, params = make(name)
    full, _ = begin(stepper, params)
    last, _ = begin(stepper, params, last_only=True)
    assert full.dtype == last.dtype == jnp.float32
    assert full.shape == (3, 12, stepper.vocab_size)
    close(last, full[np.arange(3), LENGTHS - 1])


@pytest.mark.parametrize("name", STEPPERS)
def test_rows_equal_the_row_alone(name):
    stepper, params = make(name)
    logits, carry = begin(stepper, params)
    after = continued(stepper, params, carry)
    alone, alone_carry = begin(stepper, params, TOKENS[1:2, :5], LENGTHS[1:2])
    close(logits[1, :5], alone[0])
    close(after[1], continued(stepper, params, alone_carry)[0])


@pytest.mark.parametrize("name", STEPPERS)
def test_a_token_at_a_time_equals_all_at_once(name):
    stepper, params = make(name)
    full, _ = begin(stepper, params, counts=np.full((3,), 12, np.int32))
    logits, carry = begin(stepper, params, TOKENS[:, :4], np.full((3,), 4, np.int32))
    close(logits, full[:, :4])
    for i in range(4, 8):
        logits, carry = step(stepper, params, carry, TOKENS[:, i : i + 1], None, last_only=True)
        close(logits, full[:, i])
    logits, _ = step(stepper, params, carry, TOKENS[:, 8:], None)
    close(logits, full[:, 8:])


@pytest.mark.parametrize("name", RAGGED)
def test_chunked_prefill_of_ragged_rows_equals_one(name):
    stepper, params = make(name)
    _, once = begin(stepper, params)
    carry = stepper.init(params, 3, CAPACITY)
    for low in range(0, 12, 4):
        counts = np.clip(LENGTHS - low, 0, 4).astype(np.int32)
        _, carry = step(stepper, params, carry, TOKENS[:, low : low + 4], counts)
    close(continued(stepper, params, carry), continued(stepper, params, once))


@pytest.mark.parametrize("name", RAGGED)
def test_rollback_then_again_equals_never_having_gone_ahead(name):
    stepper, params = make(name)
    _, carry = begin(stepper, params)
    expected = continued(stepper, params, carry)
    _, ahead = step(stepper, params, carry, TOKENS[:, :8], np.array([8, 3, 0], np.int32))
    close(continued(stepper, params, stepper.rollback(ahead, LENGTHS)), expected)
    shorter = np.array([4, 5, 1], np.int32)
    _, direct = begin(stepper, params, counts=shorter)
    close(continued(stepper, params, stepper.rollback(ahead, shorter)), continued(stepper, params, direct))


@pytest.mark.parametrize("name", STEPPERS)
def test_repeat_and_gather_copy_rows(name):
    stepper, params = make(name)
    _, carry = begin(stepper, params)
    expected = continued(stepper, params, carry)
    close(continued(stepper, params, stepper.repeat(carry, 2)), np.repeat(expected, 2, axis=0))
    chosen = np.array([2, 0, 2, 1, 1])
    close(continued(stepper, params, stepper.gather(carry, jnp.asarray(chosen))), expected[chosen])


@pytest.mark.parametrize("name", RAGGED)
def test_insert_replaces_rows_and_drops_those_out_of_range(name):
    stepper, params = make(name)
    _, carry = begin(stepper, params)
    _, other = begin(stepper, params, TOKENS[::-1, :6] ^ 1, np.array([6, 2, 3], np.int32))
    expected = continued(stepper, params, carry).copy()
    expected[[2, 0]] = continued(stepper, params, other)[[0, 2]]
    close(continued(stepper, params, stepper.insert(carry, jnp.array([2, 3, 0]), other)), expected)


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_index_refuses_what_it_cannot_do(name):
    stepper, params = make(name)
    carry = stepper.init(params, 3, CAPACITY)
    with pytest.raises(ConfigError, match="rolled back"):
        stepper.rollback(carry, LENGTHS)
    with pytest.raises(ConfigError, match="replaced"):
        stepper.insert(carry, jnp.array([0]), carry)


@pytest.mark.parametrize("name", STEPPERS)
def test_a_stepper_is_static(name):
    stepper, again = make(name)[0], STEPPERS[name]()[0]
    assert stepper == again
    assert hash(stepper) == hash(again)
