"""Optimizers on one footing: the table to pick one from.

    python -m experiments.optimization.optimizer_benchmark                           # small: about 10 minutes
    python -m experiments.optimization.optimizer_benchmark --arms adamw scale muon   # only these

The same small language model, text, token budget and schedule for each; every optimizer is tuned over three learning
rates (and more where the best lies at an edge) with one seed, and judged with other seeds on other text. Beside the
loss: bytes of the optimizer's state, counted on the real state, and the time of a step. Optimizers of this library
(papers in their docstrings) and Optax's own: AdamW, Lion, Adafactor, Sophia, schedule-free AdamW. Optax has no SOAP.

One model size and one budget: it says what is worth trying at yours, not which is best there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import bases, runner
from experiments.bases import Arm, ArmResult, StudyConfig
from experiments.checks import check_arms
from jaxlm.core.errors import ConfigError
from jaxlm.models.config import DecoderConfig
from jaxlm.optim.config import LowRankOptions, OptimizerConfig, SpikeOptions
from jaxlm.reporting import Figure, Report, Series, Table
from jaxlm.reporting.figures import smooth

_SCHEDULE: dict[str, Any] = {
    "warmup": 0.1, "decay": 0.9, "decay_shape": "cosine", "end_fraction": 0.1, "weight_decay": 0.0, "clip_norm": 1.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outside:
    """An optimizer of Optax with the schedule of the others, in place of an `OptimizerConfig`."""

    name: str
    transform: Callable[[OptimizerConfig, int], Any]
    """Of the schedule and the steps of the run: what becomes of gradients that are clipped already."""
    schedule: OptimizerConfig = OptimizerConfig(**_SCHEDULE)
    reset_every: int = 0
    view: Callable[[Any], Any] | None = None

    def make(self, steps: int, axes: Any, *, sweep: bool = False) -> Any:
        """As `OptimizerConfig.make`; clipped to the same norm."""
        import optax

        return optax.chain(optax.clip_by_global_norm(self.schedule.clip_norm), self.transform(self.schedule, steps))


def _lion(schedule: OptimizerConfig, steps: int) -> Any:
    import optax

    return _at_rate(optax.scale_by_lion(b1=0.9, b2=0.99), schedule, steps)


def _adafactor(schedule: OptimizerConfig, steps: int) -> Any:
    import optax

    clipped = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0))
    return _at_rate(clipped, schedule, steps)


def _sophia(schedule: OptimizerConfig, steps: int) -> Any:
    import optax

    inner = optax.contrib.sophia(1.0, weight_decay=0.0)

    def update(updates: Any, state: Any, params: Any = None, *, loss_fn: Any = None, **extra: Any):
        return inner.update(updates, state, params, obj_fn=loss_fn)

    return _at_rate(
        optax.chain(optax.GradientTransformationExtraArgs(inner.init, update), optax.scale(-1.0)), schedule, steps
    )


def _schedule_free(schedule: OptimizerConfig, steps: int) -> Any:
    """AdamW without a decay: the weights' average is the model (Defazio et al. 2024, arXiv 2405.15682)."""
    import optax

    from jaxlm.optim import FromHparams, scale_by_learning_rate, warmup_stable_decay

    rate = warmup_stable_decay(1.0, steps, round(schedule.warmup * steps), 0)
    adam = optax.chain(optax.scale_by_adam(b1=0.0, b2=0.99), scale_by_learning_rate(FromHparams(schedule=rate)))
    # Averages are weighed by the rate relative to its top.
    return optax.contrib.schedule_free(adam, rate, b1=0.9)


def _averaged(state: Any) -> Any:
    import optax

    _, free = state.opt_state
    return optax.contrib.schedule_free_eval_params(free, state.trainable)


def _at_rate(direction: Any, schedule: OptimizerConfig, steps: int) -> Any:
    """Updates of this direction, at the rate that each run reads from its `hparams`."""
    import optax

    from jaxlm.optim import FromHparams, scale_by_learning_rate

    rate = scale_by_learning_rate(FromHparams(schedule=schedule.schedule(steps, peak=1.0)))
    return optax.chain(direction, rate)


_LOW_RANK = LowRankOptions(rank=24, period=50)


def _own(name: str, rates: tuple[float, ...], **more: Any) -> Arm:
    return Arm(OptimizerConfig(name, **{**_SCHEDULE, **more}), rates)


_ADAM, _NORMALIZED, _PROJECTED = (2e-3, 4e-3, 8e-3), (5e-4, 1e-3, 2e-3), (4e-3, 8e-3, 1.6e-2)
ARMS: Mapping[str, Arm] = {
    "adamw": _own("adamw", _ADAM),
    "muon": _own("muon", _ADAM),
    "scale": _own("scale", _NORMALIZED, clip_norm=None),
    "swan": _own("swan", _NORMALIZED, clip_norm=None),
    "galore": _own("galore", _PROJECTED, low_rank=_LOW_RANK),
    "natural_galore": _own("natural_galore", _PROJECTED, low_rank=dataclasses.replace(_LOW_RANK, history=10)),
    "fira": _own("fira", _PROJECTED, low_rank=_LOW_RANK),
    "apollo": _own("apollo", _PROJECTED, low_rank=_LOW_RANK, clip_norm=None),
    "apollo_mini": _own("apollo_mini", _PROJECTED, low_rank=_LOW_RANK, clip_norm=None),
    "spam": _own("spam", _ADAM, spikes=SpikeOptions(period=100, warmup=20)),
    "stable_spam": _own("stable_spam", _ADAM, spikes=SpikeOptions(period=100)),
    "adamw_8bit": _own("adamw_8bit", _ADAM),
    "lion": Arm(Outside("lion", _lion), (3e-4, 6e-4, 1.2e-3)),
    "adafactor": Arm(Outside("adafactor", _adafactor), _ADAM),
    "sophia": Arm(Outside("sophia", _sophia), (1e-3, 2e-3, 4e-3)),
    "schedule_free": Arm(Outside("schedule_free", _schedule_free, view=_averaged), _ADAM),
}


def arm_rank(arm: Arm) -> int:
    """The rank of an arm's subspaces; 1 if it has none."""
    low_rank = arm.optimizer.name in ("galore", "natural_galore", "fira", "apollo")
    return arm.optimizer.low_rank.rank if low_rank else 1


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """A comparison of optimizers."""

    arms: tuple[str, ...] = tuple(ARMS)
    """Which; by default all."""

    def __post_init__(self):
        super().__post_init__()
        check_arms(self.arms, ARMS)
        for name in self.arms:
            if self.model.embed_dim < arm_rank(ARMS[name]):
                raise ConfigError(
                    f"arm '{name}' has rank {arm_rank(ARMS[name])}, model.embed_dim is {self.model.embed_dim}"
                )


SMALL = Config(**bases.SMALL, steps=200, batch_size=8)

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        **bases.SMOKE
        | {"model": DecoderConfig(512, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=32, max_length=32)},
        steps=2,
        arms=("adamw", "lion", "schedule_free"),
    ),
    "small": SMALL,
    # As `small` for a budget that no longer flatters what starts fast: about an hour.
    "long": dataclasses.replace(SMALL, steps=1500, batch_size=16),
}


def run(config: Config, out: Path) -> Report:
    """Trains and judges every optimizer; what is finished in `out` is not repeated."""
    text = bases.load_text(config)
    return report(config, bases.compare_arms(config, {name: ARMS[name] for name in config.arms}, text, out))


def report(config: Config, results: Mapping[str, ArmResult]) -> Report:
    """The table and two plots."""
    state = {name: state_bytes(config, ARMS[name]) for name in results}
    parameters = parameter_count(config)
    fastest = min(r.seconds_a_step for r in results.values())
    ordered = sorted(results.items(), key=lambda item: item[1].loss)
    rows = tuple(
        (
            name, r.loss, math.exp(r.loss), r.spread, state[name] / parameters, 1000 * r.seconds_a_step,
            r.seconds_a_step / fastest, r.rate, r.is_at_an_edge,
        )
        for name, r in ordered
    )  # fmt: skip
    columns = (
        "optimizer", "loss", "perplexity", "seeds apart", "state, bytes a parameter", "ms a step", "times the fastest",
        "learning rate", "at an edge",
    )  # fmt: skip
    note = "Held-out loss in nats a token. Float32 parameters: AdamW's state is 8 bytes a parameter."
    points = tuple(Series(name, (state[name] / parameters,), (r.loss,), "points") for name, r in ordered)
    curves = tuple(Series(name, range(1, len(r.history) + 1), smooth(r.history)) for name, r in ordered[:6])
    return Report(
        title="Optimizers on one footing",
        summary=f"{len(results)} optimizers, {config.steps} steps of {config.batch_size} rows each, best first.",
        numbers={f"loss, {name}": r.loss for name, r in ordered},
        tables=(Table("Optimizers", columns, rows, note),),
        figures=(
            Figure("Loss and memory", points, "bytes of state a parameter", "nats a token"),
            Figure("Training loss of the best six", curves, "step", "nats a token (smoothed)"),
        ),
    )


def state_bytes(config: Config, arm: Arm) -> int:
    """Bytes of the real state, counted by shape."""
    import jax

    from jaxlm.core import trees
    from jaxlm.models import Decoder

    model = Decoder(config.model)
    tx = arm.optimizer.make(config.steps, model.axes(), sweep=True)
    return trees.num_bytes(jax.eval_shape(tx.init, model.abstract_params()))


def parameter_count(config: Config) -> int:
    """Of the model."""
    from jaxlm.core import trees
    from jaxlm.models import Decoder

    return trees.count(Decoder(config.model).abstract_params())


if __name__ == "__main__":
    runner.main(__name__)
