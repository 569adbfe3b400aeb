"""Tasks of neuroscience for recurrent networks: noisy stimuli, a delay, a decision; drawn inside compiled programs.

    trials = CognitiveTask("match")
    batch = trials.sample(key, 32)          # inputs [32, 8, 3], targets [32, 8], loss_weights [32, 8]

In every task the first input is a fixation signal, 1 until the decision, and two more encode a direction by `0.5 +
strength * cos(angle)` at two opposite angles. The answer is 0 (wait) until the decision and 1 or 2 in it.

- `choice`: two-alternative forced choice. A weak stimulus in noise; which direction is it?
- `match`: delayed match to sample. A sample, a delay, a test; are they the same (1) or opposite (2)?
- `context`: two noisy stimuli at once, and two inputs that say which of them to judge, shown throughout.

Stimuli, coherences and noise are those of NeuroGym's PerceptualDecisionMaking, DelayMatchSample and
ContextDecisionMaking (Molano-Mazon et al., 2022), periods of 100 ms those of Liu et al. (2024, arXiv 2310.08513).
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.keys import fold


class Periods(NamedTuple):
    """Lengths in steps: of the stimulus (or sample), the delay, the test (tasks that have one) and the decision."""

    stimulus: int
    delay: int
    test: int
    decision: int


PERIODS: Mapping[str, Periods] = {
    "choice": Periods(7, 0, 0, 1),
    "match": Periods(1, 5, 1, 1),
    "context": Periods(2, 5, 0, 1),
}

NUM_ANSWERS = 3
"""Wait, first, second."""

# In percent: the two directions of a stimulus differ by as much (NeuroGym).
_COHERENCES = {"choice": (0.0, 6.4, 12.8, 25.6, 51.2), "context": (5.0, 15.0, 50.0)}


@dataclasses.dataclass(frozen=True)
class CognitiveTask:
    """One task. `periods` are by default those of the paper, eight steps in all; `noise`: deviation on stimuli."""

    name: str
    periods: Periods | None = None
    noise: float = 0.1

    def __post_init__(self):
        if self.name not in PERIODS:
            raise ConfigError(f"no task '{self.name}': {nearest(self.name, PERIODS)}")
        periods = self.durations
        if min(periods) < 0 or not periods.stimulus or not periods.decision or bool(periods.test) != self._has_test:
            raise ConfigError(f"periods of task '{self.name}' are {periods}, expected such as {PERIODS[self.name]}")
        if self.noise < 0:
            raise ConfigError(f"noise is {self.noise}, expected >= 0")

    @property
    def durations(self) -> Periods:
        return self.periods or PERIODS[self.name]

    @property
    def length(self) -> int:
        """Steps of a trial."""
        return sum(self.durations)

    @property
    def num_inputs(self) -> int:
        return 7 if self.name == "context" else 3

    @property
    def decision_steps(self) -> slice:
        """Where in a trial the decision is made."""
        return slice(self.length - self.durations.decision, self.length)

    @property
    def _has_test(self) -> bool:
        return self.name == "match"

    def sample(self, key: jax.Array, batch_size: int) -> dict[str, Array]:
        """A batch of trials: `inputs` float32 `[batch, length, num_inputs]`, `targets` int32 and `loss_weights` float32
        (one everywhere) `[batch, length]`. Traceable in `key`."""
        directions = jax.random.randint(fold(key, "directions"), (batch_size, 2), 0, 2)
        if self.name == "match":
            answer = (directions[:, 0] != directions[:, 1]).astype(jnp.int32)
            shown = self._spread(_ring(directions[:, 0], 50.0), "stimulus")
            shown = shown + self._spread(_ring(directions[:, 1], 50.0), "test")
            others = self._noisy(fold(key, "noise"), shown, ("stimulus", "test"))
        else:
            levels = jnp.array(_COHERENCES[self.name])
            strengths = jax.random.choice(fold(key, "coherence"), levels, (batch_size, 2))
            stimuli = [_ring(directions[:, i], strengths[:, i] / 2) for i in range(2)]
            if self.name == "choice":
                answer = directions[:, 0]
                others = self._noisy(fold(key, "noise"), self._spread(stimuli[0], "stimulus"), ("stimulus",))
            else:
                context = jax.random.randint(fold(key, "context"), (batch_size,), 0, 2)
                answer = jnp.take_along_axis(directions, context[:, None], axis=1)[:, 0]
                shown = self._spread(jnp.concatenate(stimuli, axis=-1), "stimulus")
                cue = jnp.broadcast_to(jax.nn.one_hot(context, 2)[:, None], (batch_size, self.length, 2))
                others = jnp.concatenate([self._noisy(fold(key, "noise"), shown, ("stimulus",)), cue], axis=-1)
        decides = jnp.arange(self.length) >= self.decision_steps.start
        fixation = jnp.broadcast_to((~decides)[None, :, None], (batch_size, self.length, 1))
        return {
            "inputs": jnp.concatenate([fixation.astype(jnp.float32), others], axis=-1),
            "targets": jnp.where(decides[None, :], 1 + answer[:, None], 0).astype(jnp.int32),
            "loss_weights": jnp.ones((batch_size, self.length), jnp.float32),
        }

    def _during(self, period: str) -> Float[Array, "1 length 1"]:
        start = sum(self.durations[: Periods._fields.index(period)])
        steps = jnp.arange(self.length)
        during = (steps >= start) & (steps < start + getattr(self.durations, period))
        return during.astype(jnp.float32)[None, :, None]

    def _spread(self, x: Float[Array, "batch features"], period: str) -> Float[Array, "batch length features"]:
        return x[:, None, :] * self._during(period)

    def _noisy(self, key: jax.Array, x: Array, periods: tuple[str, ...]) -> Float[Array, "batch length features"]:
        shown = sum(self._during(period) for period in periods)
        return x + self.noise * shown * jax.random.normal(key, x.shape)


def _ring(direction: Int[Array, "batch"], percent: Float[Array, "batch"] | float) -> Float[Array, "batch 2"]:
    """Inputs at two opposite angles for a direction (0 or 1): 0.5, plus and minus a hundredth of `percent`."""
    sign = jnp.stack([1 - 2 * direction, 2 * direction - 1], axis=-1).astype(jnp.float32)
    return 0.5 + sign * jnp.broadcast_to(jnp.asarray(percent, jnp.float32) / 100, direction.shape)[:, None]
