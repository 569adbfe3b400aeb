"""Training that goes on from a state: another phase, other data, another schedule, or a branch of a run.

What is kept and what begins again is said each time. The parameters always stay; the optimizer's state is kept or made
fresh, and the step counts on or from 0 again, which is what schedules and the order of data follow:

    again = continue_state(state, tx, keep_optimizer=False, restart=True)     # re-warm a checkpoint on other data
    branch = continue_state(state, tx, keep_optimizer=True, restart=False)    # decay from a stable checkpoint

where for the branch `tx` has the schedule `warmup_stable_decay(peak, state.step + decay, warmup, decay)`, which agrees
with that of the trunk up to the branch (Hu et al. 2024, arXiv 2404.06395, section 4.2).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.errors import ConfigError
from jaxlm.core.trees import named_leaves
from jaxlm.training.state import TrainState


def continue_state(
    state: TrainState,
    tx: optax.GradientTransformation,
    *,
    keep_optimizer: bool,
    restart: bool,
    hparams: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
) -> TrainState:
    """The state that training goes on from. Traceable. `extra` is kept.

    With `keep_optimizer` and without `restart`, and `tx` having the same rates, the run is bit for bit the one that
    never stopped.

    Args:
      state: where the run before ended, or a checkpoint of it.
      tx: the optimizer of what follows.
      keep_optimizer: go on with the moments of the run before; otherwise they begin at `tx.init`. Released weights
        without their optimizer's state can only be continued so (as in Gupta et al. 2023, arXiv 2308.04014).
      restart: the step begins at 0 again: a new schedule and a new order of data.
      hparams: those of what follows, by default the same.
      key: the random key of what follows, by default the same.

    Raises:
      ConfigError: the optimizer state that is to be kept is not one of `tx`; names a leaf that differs.
    """
    opt_state = state.opt_state if keep_optimizer else tx.init(state.trainable)
    if keep_optimizer:
        _check(state.opt_state, jax.eval_shape(tx.init, state.trainable))
    if hparams is not None:
        hparams = {name: jnp.asarray(value, jnp.float32) for name, value in hparams.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32) if restart else state.step,
        trainable=state.trainable,
        opt_state=opt_state,
        extra=state.extra,
        key=state.key if key is None else key,
        hparams=state.hparams if hparams is None else hparams,
    )


def _check(kept: Any, wanted: Any) -> None:
    have, want = (
        {path: (tuple(x.shape), jnp.dtype(x.dtype).name) for path, x in named_leaves(t)} for t in (kept, wanted)
    )
    if have != want:
        path = min(path for path in {*have, *want} if have.get(path) != want.get(path))
        raise ConfigError(
            f"the optimizer state cannot be kept: '{path}' is {have.get(path, 'absent')}, and of the optimizer that "
            f"follows {want.get(path, 'absent')}; use the same optimizer, or keep_optimizer=False"
        )
