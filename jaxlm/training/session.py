"""A training run in a folder: begun or resumed, logged, evaluated, checkpointed, stopped cleanly when asked to."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from jaxlm.core.distributed import is_main_process, lost_processes, wait_for_all
from jaxlm.core.errors import CheckpointError, ProcessLostError
from jaxlm.core.json_files import write_json
from jaxlm.training.callbacks import Evaluate, Log, Profile, Save
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.incidents import Incidents
from jaxlm.training.loop import Callback, Interrupted, fit
from jaxlm.training.program import Program
from jaxlm.training.progress import Progress
from jaxlm.training.run_log import RunLog
from jaxlm.training.state import TrainState


class ResumableBatches(Protocol):
    """Batches that go on from a saved place: `set_state(get_state())`, with a state that is JSON.

    `provenance(index)` says in JSON where the batch with that index (the first step's is 0) comes from.
    """

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...

    def provenance(self, step: int) -> Mapping[str, Any]: ...


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
    max_skipped: int = 10,
    spike_threshold: float = 6.0,
    flops_per_token: float | None = None,
    profile_steps: int = 0,
) -> TrainState:
    """Trains `program` until `steps`, from the newest good checkpoint in `out/checkpoints` or from the start.

    Every later step of a resumed run is the same as if it had never stopped. The folder gets checkpoints, the log of
    metrics, evaluations (`evaluate(trainable)` before the first step, every `evaluate_every` steps and at the end),
    a trace of `profile_steps` steps, the state of the data (`data.json`, from which any step's batch can be made
    again), and `incidents` (see `Incidents`). SIGTERM and SIGINT save a checkpoint first. Of several processes, which
    share the folder, the main one writes the log and shows the progress.

    Args:
      meta: JSON that a checkpoint holds beside the state and the place in the data.
      check_meta: gets the `meta` of the checkpoint to resume from, and raises if it is of another run.
      learning_rate: of each step, for the log.
      non_finite, max_skipped: as in `fit`.
      spike_threshold: robust standard deviations above the median that make a loss an incident; 0: none.

    Raises:
      Interrupted: after a signal, once the state is saved.
      NonFiniteError: as `fit`.
      ProcessLostError: another process of the run has ended; the same command resumes.
      CheckpointError: there are checkpoints, but none can be used; or the last one could not be saved.
    """
    with lost_processes("connecting"):
        program.meet()
    checkpoints = Checkpoints(out / "checkpoints", keep=keep_checkpoints)
    if is_main_process():
        checkpoints.tidy()
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

    if is_main_process():
        write_json(out / "data.json", batches.get_state())

    with contextlib.ExitStack() as stack:
        stack.enter_context(lost_processes("training"))
        main = is_main_process()
        log = stack.enter_context(RunLog(out, start_step=start + 1)) if main else None
        progress = Progress(steps, start_step=start, console=None if main else Console(quiet=True))
        stack.enter_context(progress)
        incidents = Incidents(out / "incidents", batches.provenance, threshold=spike_threshold, progress=progress)
        if restored is not None:
            incidents.set_state(restored.meta.get("losses", []))

        def place(step: int) -> Mapping[str, Any]:
            return {**(meta or {}), "data": batches.get_state(), "losses": incidents.get_state()}

        save = Save(checkpoints, place, checkpoint_every)
        # A checkpoint comes before the evaluation of its step, which may be long, and a deadline near.
        callbacks: list[Callback] = [Log(log, progress, learning_rate, flops_per_token), incidents, save]
        if evaluate is not None:
            evaluation = Evaluate(evaluate, log, evaluate_every, progress)
            callbacks.append(evaluation)
            if start in (0, steps) or (evaluate_every and start % evaluate_every == 0):
                evaluation.at_step(start, state)  # of the start; or perhaps lost after the checkpoint was saved
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
                    max_skipped=max_skipped,
                )
        except Interrupted as stop:
            checkpoints.wait()
            saved = checkpoints.steps()
            what = f"the checkpoint of step {stop.step} is saved"
            if stop.step not in saved:
                what = f"NOT saved; the last checkpoint is that of step {saved[-1] if saved else 'none'}"
            progress.note(f"{stop}; {what}")
            checkpoints.close()
            raise
        except ProcessLostError:
            raise  # a save that has begun waits for the lost process: it is left
        except BaseException:
            checkpoints.close()
            raise
        checkpoints.close()
    wait_for_all()  # the log is whole from here on
    if checkpoints.steps()[-1:] != [steps]:
        raise CheckpointError(
            f"the run is done, but its last checkpoint is not saved ({checkpoints.problem}); what is there: "
            f"{checkpoints.steps()}. Make room, and give the same command again: it goes on from there"
        )
    return state
