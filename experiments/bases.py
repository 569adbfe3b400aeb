"""What experiments share: small texts held on the device, and comparisons of arms that are tuned alike."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.checks import check_counts, check_seeds
from jaxlm.core.configs import fingerprint
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.json_files import read_json, write_json
from jaxlm.core.sharding import MeshConfig
from jaxlm.data.prepare import DataConfig
from jaxlm.models.config import DecoderConfig
from jaxlm.optim.config import OptimizerConfig
from jaxlm.peft.parametrizations import Parametrization, is_base, parametrize, restart, stop_bases


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows of tokens on the device: to train on, and of documents that are held out, to tune by and to judge by."""

    train: Any
    tuning: Any
    judge: Any


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Arms of one small language model that differ in one thing, each at its own best learning rate."""

    model: DecoderConfig
    data: DataConfig
    steps: int = 250
    """Of every run, tuning runs included."""
    batch_size: int = 16
    judge_rows: int = 256
    """Rows of held-out text to tune by, and as many others to judge by."""
    tuning_seed: int = 0
    """Of the runs that choose a learning rate. They are not judged."""
    seeds: tuple[int, ...] = (1, 2)
    """Of the runs that are judged."""

    def __post_init__(self):
        check_counts(self, "steps", "batch_size", "judge_rows")
        check_seeds(self.seeds, self.tuning_seed)


@dataclasses.dataclass(frozen=True)
class MeshStudyConfig(StudyConfig):
    """A study that `compare_arms` runs whole, so that it can also be run at published sizes."""

    mesh: MeshConfig | None = None
    """Of the presets for accelerators: each run is one on a mesh, in a folder of its own (`experiments.published`)."""
    micro_batches: int = 1
    """Pieces of a batch, on a mesh."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints, and evaluations, on a mesh."""

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, "micro_batches", "checkpoint_every")


SMALL: Mapping[str, Any] = {
    "model": DecoderConfig(vocab_size=1024, num_layers=2, embed_dim=96, num_heads=4, mlp_dim=256, max_length=128),
    "data": DataConfig(vocab_size=1024, sequence_length=128),
}
"""Fields of a `StudyConfig`: model and text of studies that train on the standard library in minutes."""

SMOKE: Mapping[str, Any] = {
    "model": DecoderConfig(vocab_size=512, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, max_length=32),
    "data": DataConfig(tokenizer="byte", sequence_length=32),
    "batch_size": 4,
    "judge_rows": 8,
    "seeds": (1,),
}
"""Fields of a `StudyConfig` with which every line runs in seconds."""

FRAME: Mapping[str, Any] = {
    "warmup": 0.1, "decay": 0.9, "decay_shape": "cosine", "end_fraction": 0.1, "weight_decay": 0.0, "clip_norm": None,
    "b2": 0.999,
}  # fmt: skip
"""Fields of an `OptimizerConfig`, common to the papers on optimizers: linear warm-up over a tenth, cosine to a tenth;
no weight decay, no clipping."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm's optimizer, the learning rates that it is tuned over, and what its kernels are made of."""

    optimizer: OptimizerConfig
    rates: tuple[float, ...]
    parametrization: Parametrization = Parametrization()
    """With `optimizer.reset_every`, restarts of the optimizer are restarts of the parametrization too."""


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """How an arm did.

    `tuned`: loss on the tuning text by learning rate (not finite where a run diverged). `rate`: the best of them.
    `losses`: on the judging text, a seed each. `history`: training loss of each step, mean over seeds. `params`: of the
    first seed. `outcomes`: all there is of the judged runs.
    """

    tuned: Mapping[float, float]
    rate: float
    losses: tuple[float, ...]
    history: tuple[float, ...]
    seconds_a_step: float
    params: Any
    outcomes: Sequence[Any] = ()

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Between the best and the worst seed."""
        return max(self.losses) - min(self.losses)

    @property
    def is_at_an_edge(self) -> bool:
        """Whether the best rate is the least or the greatest that was tried, so that a better one may lie beyond."""
        return len(self.tuned) > 1 and self.rate in (min(self.tuned), max(self.tuned))


class Keeper:
    """Keeps what is finished of a study in a folder: `keep(name, compute)` is a JSON value, computed once.

    With `says` it prints the name of what it has computed.

    Raises `DataError` when what is kept under the name is of another configuration.
    """

    def __init__(self, folder: Path, config: Any, *, says: bool = True):
        self._folder, self._config, self._says = folder, fingerprint(config), says

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self._folder / (name.replace(" ", "_") + ".json")
        if path.exists():
            kept = read_json(path)
            if kept.get("config") != self._config:
                raise DataError(f"{path} is of a run with other settings: choose another --out")
            return kept["value"]
        value = compute()
        write_json(path, {"config": self._config, "value": value})
        if self._says:
            print(f"{name}: done", flush=True)
        return read_json(path)["value"]


def load_text(config: StudyConfig) -> Text | None:
    """The rows of a study, from the caches of `prepare_data`; `None` for one on a mesh, whose data stream."""
    if isinstance(config, MeshStudyConfig) and config.mesh is not None:
        return None
    return read_text(config.data, config.model.vocab_size, config.steps * config.batch_size, config.judge_rows)


def read_text(data: DataConfig, vocab_size: int, train_rows: int, judge_rows: int) -> Text:
    """At most so many rows to train on, as many to tune by, and as many to judge by.

    Raises `ConfigError` if the tokenizer has more than `vocab_size` ids.
    """
    from jaxlm.data.prepare import prepare_data
    from jaxlm.data.resident import resident_rows

    prepared, columns = prepare_data(data), ("inputs", "targets", "loss_weights", "segment_ids", "positions")
    if prepared.tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"the tokenizer has {prepared.tokenizer.vocab_size} ids but model.vocab_size is {vocab_size}")
    train, held_out = (
        resident_rows(store, data.sequence_length, max_rows=rows, columns=columns)
        for store, rows in ((prepared.train, train_rows), (prepared.validation, 2 * judge_rows))
    )
    return Text(train, *held_out.cut(0.5, 0.5))


def compare_arms(config: StudyConfig, arms: Mapping[str, Arm], text: Text | None, out: Path) -> dict[str, ArmResult]:
    """Trains every arm at each of its rates, then at the best one with each seed.

    While the best rate is the least or the greatest, one more is tried beyond it, as far apart as the last two, and
    three at most. Finished runs are kept in `out/members` (on a mesh, `out/runs`) and not repeated.

    Raises `ConfigError` if every run of an arm diverges.
    """
    return {name: _run_arm(config, name, arm, text, out) for name, arm in arms.items()}


def _run_arm(config: StudyConfig, name: str, arm: Arm, text: Text | None, out: Path) -> ArmResult:
    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM

    if text is None:
        from experiments.published import MeshRuns

        return tune_and_judge(config, name, MeshRuns(config, arm), arm.rates, out / "runs")
    objective = CausalLM(Decoder(config.model))
    tuning_loss, judge_loss = (resident_loss(objective, rows, config.batch_size) for rows in (text.tuning, text.judge))
    population, frozen = arm_population(
        config,
        arm,
        sample=lambda key, step: text.train.sample(key, step, config.batch_size),
        evaluate=lambda params: {"tuning": tuning_loss(params), "judge": judge_loss(params)},
    )
    return tune_and_judge(config, name, population, arm.rates, out / "members", frozen)


def arm_population(
    config: StudyConfig,
    arm: Arm,
    *,
    sample: Callable[[Any, Any], Any],
    evaluate: Callable[[Any], Mapping[str, Any]],
    objective: Any = None,
    start: Any = None,
) -> tuple[Any, Any]:
    """The `Population` of an arm, for causal language models, and its frozen argument.

    `evaluate` gets all parameters, whatever is trained of them. `objective` is by default `CausalLM`. `start`: what is
    trained (`tune_and_judge`) begins from these parameters; by default each member has its own.
    """
    import jax

    from jaxlm.core import trees
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training import Population, init_state, make_step

    model = Decoder(config.model)
    parts = arm_parts(model, arm, config.steps, sweep=True)
    # What is never trained is the same for all seeds. (Alone: where that is nothing, nothing is compiled.)
    frozen = jax.jit(lambda key, start: parts.cut(parts.draw(key, start))[1])(jax.random.key(config.tuning_seed), start)
    population = Population(
        init=lambda key, hparams, start=None: init_state(
            parts.cut(parts.draw(key, start))[0], parts.tx, key, hparams=hparams
        ),
        step=parts.wrap(make_step(objective or CausalLM(model), parts.tx, build=parts.build)),
        sample=sample,
        num_steps=config.steps,
        evaluate=lambda trainable: evaluate(trees.merge(trainable, frozen)),
        view=getattr(arm.optimizer, "view", None),
    )
    return population, frozen


class ArmParts(NamedTuple):
    """What an arm makes of a model.

    `draw(key, start=None)`: its parameters, or those of `start` in its form; `axes`: of these. `cut(params)`: what is
    trained and what is not; `build(trainable, frozen, step)` joins them. `tx`: the optimizer of what is trained;
    `wrap(step)`: a step with the arm's restarts.
    """

    draw: Callable[..., Any]
    axes: Any
    cut: Callable[[Any], tuple[Any, Any]]
    build: Callable[[Any, Any, Any], Any]
    tx: Any
    wrap: Callable[[Any], Any]


def arm_parts(model: Any, arm: Arm, steps: int, *, sweep: bool = False) -> ArmParts:
    """The parts of an arm for a `Decoder`; with `sweep` the optimizer reads its learning rate from `hparams`."""
    import jax
    import optax

    from jaxlm.core import trees
    from jaxlm.optim.roles import label
    from jaxlm.peft.lora import adapted_axes
    from jaxlm.training import change_every

    how = arm.parametrization

    def draw(key: Any, start: Any = None) -> Any:
        return parametrize(key, model.init(key)["params"] if start is None else start, how)

    def cut(params: Any) -> tuple[Any, Any]:
        return trees.partition(params, how.is_trained, label(params, adapted_axes(params, model.axes())))

    def build(trainable: Any, frozen: Any, step: Any) -> Any:
        params = trees.merge(trainable, frozen, step)
        return stop_bases(params) if how.name == "relora" else params

    def wrap(step: Any) -> Any:
        if not arm.optimizer.reset_every:
            return step
        return change_every(step, arm.optimizer.reset_every, lambda key, trainable: restart(key, trainable, how))

    axes = adapted_axes(jax.eval_shape(draw, jax.random.key(0)), model.axes())
    tx = arm.optimizer.make(steps, axes, sweep=sweep)
    if how.name == "relora":
        kinds = {"trained": tx, "base": optax.set_to_zero()}
        tx = optax.partition(kinds, lambda p: trees.map_named(lambda x, _: "base" if is_base(x) else "trained", p))
    return ArmParts(draw, axes, cut, build, tx, wrap)


def tune_and_judge(
    config: StudyConfig,
    name: str,
    population: Any,
    rates: Sequence[float],
    folder: Path,
    frozen: Any = None,
    start: Any = None,
) -> ArmResult:
    """Trains a `Population` at each learning rate, and at the best one with each of the seeds that are judged.

    Its members read `hparams["learning_rate"]`; its `evaluate` gives `tuning` and `judge`. With a single rate there is
    nothing to tune, and no run for it. Otherwise as `compare_arms`.
    """
    import numpy as np

    from jaxlm.training import Member

    def train(members: Sequence[Member]) -> list[Any]:
        return population.train(members, frozen=frozen, start=start, folder=folder, keep_params=True, report=say)

    def member(rate: float, seed: int) -> Member:
        return Member(f"{name} {rate:g} {seed}", seed, {"learning_rate": rate})

    tuned: dict[float, float] = {}
    untried = list(rates) if len(rates) > 1 else []
    best = rates[0]
    while untried:
        for outcome in train([member(rate, config.tuning_seed) for rate in untried]):
            tuned[outcome.member.hparams["learning_rate"]] = outcome.results["tuning"]
        finite = {rate: loss for rate, loss in tuned.items() if np.isfinite(loss)}
        if not finite:
            raise _diverged(name, rates)
        best = min(finite, key=finite.__getitem__)
        untried = _beyond(best, sorted(tuned)) if len(tuned) < len(rates) + _MORE_RATES else []
    judged = train([member(best, seed) for seed in config.seeds])
    if not any(np.isfinite(outcome.results["judge"]) for outcome in judged):
        raise _diverged(name, [best])
    history = np.mean([outcome.history["loss"] for outcome in judged], axis=0)
    return ArmResult(
        tuned=tuned,
        rate=best,
        losses=tuple(outcome.results["judge"] for outcome in judged),
        history=tuple(history.tolist()),
        seconds_a_step=min(outcome.seconds for outcome in judged) / config.steps,
        params=judged[0].params,
        outcomes=tuple(judged),
    )


_MORE_RATES = 3


def _beyond(best: float, tried: list[float]) -> list[float]:
    """The next rate if the best is the least or greatest of those tried."""
    if len(tried) > 1 and best == tried[-1]:
        return [float(f"{best * tried[-1] / tried[-2]:.6g}")]
    if len(tried) > 1 and best == tried[0]:
        return [float(f"{best * tried[0] / tried[1]:.6g}")]
    return []


def _diverged(name: str, rates: Sequence[float]) -> ConfigError:
    return ConfigError(f"arm '{name}' diverges at each of the learning rates {tuple(rates)}: try smaller ones")


def say(outcome: Any) -> None:
    """One line for a finished member."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in outcome.results.items())
    print(f"{outcome.member.name}: {losses} ({outcome.seconds:.0f} s)", flush=True)
