"""Training: state, step, loop, checkpoints."""

from jaxlm.training.checkpoints import Checkpoints, Restored, load_meta, load_params
from jaxlm.training.loop import Callback, Interrupted, fit
from jaxlm.training.state import TrainState, init_state, state_shardings
from jaxlm.training.step import Gradients, accumulate, make_step

__all__ = [
    "Callback",
    "Checkpoints",
    "Gradients",
    "Interrupted",
    "Restored",
    "TrainState",
    "accumulate",
    "fit",
    "init_state",
    "load_meta",
    "load_params",
    "make_step",
    "state_shardings",
]
