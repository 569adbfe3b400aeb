"""A training run in a folder: begun or resumed, logged, evaluated, checkpointed, stopped cleanly when asked to."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from jaxlm.core.distributed import is_main_process, lost_processes, wait_for_all
from jaxlm.core.errors import ProcessLostError
from jaxlm.training.callbacks import Evaluate, Log, Profile, Save
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.loop import Callback, Interrupted, fit
from jaxlm.training.program import Program
from jaxlm.training.progress import Progress
from jaxlm.training.run_log import RunLog
from jaxlm.training.state import TrainState


class ResumableBatches(Protocol):
    """Batches that go on from a saved place: `set_state(get_state())`, with a state that is JSON."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


def train_in_folder(
    out: Path,
    program: Program,
    batches: ResumableBatches,
    *,
    steps: int,
    seed: int,
    frozen: Any = None,
    meta: Mapping[str, Any] | None = None,
    check_meta: Callable[[Mapping[str, Any]], None] | None = None,
    learning_rate: Callable[[int], float] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    keep_checkpoints: int = 2,
    non_finite: str = "stop",
    flops_per_token: float | None = None,
    profile_steps: int = 0,
) -> TrainState:
    """Trains `program` until `steps`, from the newest good checkpoint in `out/checkpoints` or from the start.

    Every later step of a resumed run is the same as if it had never stopped. The folder gets checkpoints, the log of
    metrics, evaluations (`evaluate(trainable)` before the first step, every `evaluate_every` steps and at the end),
    and a trace of `profile_steps` steps. SIGTERM and SIGINT save a checkpoint first. Of several processes, which share
    the folder, the main one writes the log and shows the progress.

    Args:
      meta: JSON that a checkpoint holds beside the state and the place in the data.
      check_meta: gets the `meta` of the checkpoint to resume from, and raises if it is of another run.
      learning_rate: of each step, for the log.

    Raises:
      Interrupted: after a signal, once the state is saved.
      NonFiniteError: as `fit`.
      ProcessLostError: another process of the run has ended; the same command resumes.
      CheckpointError: there are checkpoints, but none can be used.
    """
    checkpoints = Checkpoints(out / "checkpoints", keep=keep_checkpoints)
    restored = checkpoints.restore(program.abstract_state)
    if restored is None:
        state, start = program.init(seed), 0
    else:
        if check_meta is not None:
            check_meta(restored.meta)
        state, start = restored.state, restored.step
        checkpoints.discard_after(start)
        batches.set_state(restored.meta["data"])
        if is_main_process():
            print(f"resuming after step {start}", flush=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(lost_processes("training"))
        main = is_main_process()
        log = stack.enter_context(RunLog(out, start_step=start + 1)) if main else None
        progress = Progress(steps, start_step=start, console=None if main else Console(quiet=True))
        stack.enter_context(progress)
        save = Save(checkpoints, lambda step: {**(meta or {}), "data": batches.get_state()}, checkpoint_every)
        callbacks: list[Callback] = [Log(log, progress, learning_rate, flops_per_token), save]
        evaluation = None
        if evaluate is not None:
            evaluation = Evaluate(evaluate, log, evaluate_every, progress)
            callbacks.append(evaluation)
            if start == 0:
                evaluation.at_step(0, state)
        if profile_steps:
            callbacks.append(Profile(out / "tensorboard", start + 10, profile_steps))
        try:
            with lost_processes("training"):
                state = fit(
                    program.step,
                    state,
                    frozen,
                    batches,
                    num_steps=steps,
                    put=program.put,
                    callbacks=callbacks,
                    on_interrupt=[save],
                    non_finite=non_finite,
                )
        except Interrupted as stop:
            checkpoints.wait()
            progress.note(f"{stop}; the checkpoint of step {stop.step} is saved")
            checkpoints.close()
            raise
        except ProcessLostError:
            raise  # a save that has begun waits for the lost process: it is left
        except BaseException:
            checkpoints.close()
            raise
        checkpoints.close()
        if evaluation is not None and not evaluation.latest:
            # Resumed after the last step: its evaluation is gone with the process.
            evaluation.at_step(steps, state)
    wait_for_all()  # the log is whole from here on
    return state
