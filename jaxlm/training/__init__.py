"""Training: state, step, loop, checkpoints."""

from jaxlm.training.callbacks import Evaluate, Log, Profile, Save
from jaxlm.training.checkpoints import Checkpoints, Restored, load_meta, load_params
from jaxlm.training.loop import Callback, Interrupted, fit
from jaxlm.training.low_precision import LowPrecisionObjective, Recipe, low_precision
from jaxlm.training.populations import Member, Outcome, Population
from jaxlm.training.program import Program
from jaxlm.training.restarts import change_every
from jaxlm.training.runs import Run, exclusive, keep_tokenizer, load_run
from jaxlm.training.session import ResumableBatches, train_in_folder
from jaxlm.training.state import TrainState, init_state, state_shardings
from jaxlm.training.step import Gradients, accumulate, make_step

__all__ = [
    "Callback",
    "Checkpoints",
    "Evaluate",
    "Gradients",
    "Log",
    "LowPrecisionObjective",
    "Member",
    "Outcome",
    "Population",
    "Profile",
    "Program",
    "Recipe",
    "Run",
    "Save",
    "Interrupted",
    "Restored",
    "ResumableBatches",
    "TrainState",
    "accumulate",
    "change_every",
    "exclusive",
    "fit",
    "init_state",
    "keep_tokenizer",
    "load_meta",
    "load_params",
    "load_run",
    "low_precision",
    "make_step",
    "state_shardings",
    "train_in_folder",
]
