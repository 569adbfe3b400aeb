"""Training: state, step, loop, checkpoints; runs in folders, phases, populations of small runs and sweeps of them."""

from jaxlm.training.callbacks import Evaluate, Log, Profile, Save
from jaxlm.training.checkpoints import Checkpoints, Restored, load_meta, load_params
from jaxlm.training.continuation import continue_state
from jaxlm.training.loop import Callback, Interrupted, fit
from jaxlm.training.low_precision import LowPrecisionObjective, Recipe, low_precision
from jaxlm.training.phases import Best, Course, Phase, keep_best, run_phased, stack_phases, start_best
from jaxlm.training.populations import Member, Outcome, Population
from jaxlm.training.program import Program
from jaxlm.training.restarts import change_every
from jaxlm.training.runs import Run, exclusive, keep_tokenizer, load_run
from jaxlm.training.session import ResumableBatches, train_in_folder
from jaxlm.training.snapshots import Snapshot, train_snapshots
from jaxlm.training.state import TrainState, init_state, state_shardings
from jaxlm.training.step import Gradients, accumulate, make_step
from jaxlm.training.sweeps import Sweep, coordinate_search, grid, random_points, steps_for

__all__ = [
    "Best",
    "Callback",
    "Checkpoints",
    "Course",
    "Evaluate",
    "Gradients",
    "Log",
    "LowPrecisionObjective",
    "Member",
    "Outcome",
    "Phase",
    "Population",
    "Profile",
    "Program",
    "Recipe",
    "Run",
    "Sweep",
    "Save",
    "Interrupted",
    "Restored",
    "ResumableBatches",
    "Snapshot",
    "TrainState",
    "accumulate",
    "change_every",
    "coordinate_search",
    "continue_state",
    "exclusive",
    "grid",
    "fit",
    "init_state",
    "keep_best",
    "keep_tokenizer",
    "load_meta",
    "load_params",
    "load_run",
    "low_precision",
    "make_step",
    "random_points",
    "run_phased",
    "stack_phases",
    "start_best",
    "state_shardings",
    "steps_for",
    "train_in_folder",
    "train_snapshots",
]
