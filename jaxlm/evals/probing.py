"""What a model's features are good for: a linear classifier on frozen ones, or fine-tuning all of the model.

    result = linear_probe(features, labels, test_features, test_labels, num_classes)
    result = fine_tune(features_of, params, train, test, num_classes)

The protocols and defaults of Liu et al. (2023, arXiv 2210.14199): AdamW, features of all tokens of a sentence
concatenated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.keys import fold
from jaxlm.data.resident import ResidentRows
from jaxlm.objectives import Classification
from jaxlm.training import init_state, make_step


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How a probe is trained; the defaults are the linear probe's."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 512
    epochs: int = 50
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.epochs < 1:
            raise ConfigError(f"batch_size is {self.batch_size}, epochs {self.epochs}, expected at least 1")


FINE_TUNE = ProbeConfig(learning_rate=1e-4, batch_size=128)
"""The paper's settings of fine-tuning."""


class ProbeResult(NamedTuple):
    """Shares of right answers, on the examples that were trained on and on others."""

    train_accuracy: float
    accuracy: float


def linear_probe(
    features: Float[Array, "train features"],
    labels: Int[Array, "train"],
    test_features: Float[Array, "test features"],
    test_labels: Int[Array, "test"],
    num_classes: int,
    config: ProbeConfig = ProbeConfig(),
) -> ProbeResult:
    """Trains a linear layer with bias, from zero, on frozen features. Raises as `fine_tune`."""
    train = ResidentRows({"inputs": features, "targets": labels})
    test = ResidentRows({"inputs": test_features, "targets": test_labels})
    return fine_tune(_inputs, {}, train, test, num_classes, config)


def fine_tune(
    features: Callable[[Any, dict[str, Array]], Float[Array, "batch features"]],
    params: Any,
    train: ResidentRows,
    test: ResidentRows,
    num_classes: int,
    config: ProbeConfig = FINE_TUNE,
) -> ProbeResult:
    """Trains a linear layer, from zero, and all of `params` under it.

    Args:
      features: of a batch of rows, by `params`; to be concatenated where a sentence has several.
      train, test: rows with `targets` and what `features` reads.

    Raises:
      DataError: labels that are not from 0 to below `num_classes`, or fewer rows than a batch has.
    """
    for name, rows in (("train", train), ("test", test)):
        low, high = int(jnp.min(rows.arrays["targets"])), int(jnp.max(rows.arrays["targets"]))
        if low < 0 or high >= num_classes:
            raise DataError(f"{name} labels from {low} to {high}, expected 0 to {num_classes - 1}")
    if train.count < config.batch_size:
        raise DataError(f"{train.count} rows to train on, fewer than a batch of {config.batch_size}")
    return ProbeResult(*map(float, _fit(features, num_classes, config, params, train, test)))


def _inputs(params: Any, batch: dict[str, Array]) -> Float[Array, "batch features"]:
    """A function of its own, so that all linear probes of one size share a compiled program."""
    return batch["inputs"]


@jax.jit(static_argnums=(0, 1, 2))
def _fit(
    features: Callable, num_classes: int, config: ProbeConfig, params: Any, train: ResidentRows, test: ResidentRows
) -> tuple[Array, Array]:
    def logits(weights: Any, batch: dict[str, Array]) -> Float[Array, "batch classes"]:
        layer = weights["layer"]
        return features(weights["model"], batch) @ layer["kernel"] + layer["bias"][None, :]

    size = jax.eval_shape(features, params, train.take(jnp.arange(1))).shape[-1]
    layer = {"kernel": jnp.zeros((size, num_classes)), "bias": jnp.zeros((num_classes,))}
    step = make_step(Classification(logits), tx := optax.adamw(config.learning_rate, weight_decay=config.weight_decay))
    key = jax.random.key(config.seed)
    state = init_state({"model": params, "layer": layer}, tx, key)
    order = fold(key, "order")

    def body(state: Any, _: None) -> tuple[Any, None]:
        return step(state, None, train.sample(order, state.step, config.batch_size))[0], None

    state, _ = jax.lax.scan(body, state, length=config.epochs * (train.count // config.batch_size))

    def accuracy(rows: ResidentRows) -> Float[Array, ""]:
        def right(row: dict[str, Array]) -> Array:
            one = {name: x[None] for name, x in row.items()}
            return jnp.argmax(logits(state.trainable, one)[0]) == row["targets"]

        return jnp.mean(jax.lax.map(right, rows.arrays, batch_size=min(512, rows.count)))

    return accuracy(train), accuracy(test)
