"""One run, looked at on its way: parameters after given numbers of steps, for studies of training's course.

    snapshots = train_snapshots(state, step, sample, (1000, 2000, 5000), folder=out / "run")

Between two snapshots a single compiled program runs. The whole state is kept with each, so a run that was stopped goes
on from the last one, bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.state import TrainState
from jaxlm.training.step import Step


class Snapshot(NamedTuple):
    """`params`: what was trained, after `step` steps. `losses`: of each step since the snapshot before."""

    step: int
    params: Any
    losses: Float[np.ndarray, "steps"]


def train_snapshots(
    state: TrainState,
    step: Step,
    sample: Callable[[jax.Array, Array], Mapping[str, Array]],
    at: Sequence[int],
    *,
    folder: Path,
    frozen: Any = None,
    report: Callable[[Snapshot], None] | None = None,
) -> list[Snapshot]:
    """Trains from `state` (at step 0) on `sample(key, step)`, with the state's own key, and returns a snapshot at each
    of `at`, ascending. What is in `folder` is read, not trained again.

    Raises `ConfigError` if `at` does not ascend from above 0.
    """
    if not at or any(b <= a for a, b in zip((0, *at), at)):
        raise ConfigError(f"snapshots at {tuple(at)}, expected steps that ascend from above 0")
    data_key = fold(state.key, "data")

    @jax.jit(static_argnums=2)
    def run(state: TrainState, frozen: Any, count: int) -> tuple[TrainState, Array]:
        def body(state: TrainState, _: None) -> tuple[TrainState, Array]:
            state, metrics = step(state, frozen, sample(data_key, state.step))
            total, weight = metrics["loss"]
            return state, total / jnp.where(weight == 0, 1.0, weight)

        return jax.lax.scan(body, state, length=count)

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    checkpoints = Checkpoints(folder, keep=len(at))
    kept, found, before = set(checkpoints.steps()), [], 0
    try:
        for target in at:
            if target in kept:
                restored = checkpoints.restore(abstract, target)
                state, losses = restored.state, np.array(restored.meta["losses"], np.float32)
            else:
                state, losses = jax.block_until_ready(run(state, frozen, target - before))
                losses = np.asarray(losses)
                checkpoints.save(target, state, {"losses": losses.astype(float).tolist()})
            found.append(Snapshot(target, state.trainable, losses))
            if report is not None and target not in kept:
                report(found[-1])
            before = target
    finally:
        checkpoints.close()
    return found
