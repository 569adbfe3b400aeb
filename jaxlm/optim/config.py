"""An optimizer and its schedule as settings of a run."""

import dataclasses
from typing import Any

import optax

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.optim.apollo import apollo, apollo_mini
from jaxlm.optim.eight_bit import adamw_8bit
from jaxlm.optim.fisher import DAMPING_MODES
from jaxlm.optim.galore import fira, galore, natural_galore
from jaxlm.optim.learning_rate import FromHparams
from jaxlm.optim.normalized import HEAD_ROLES, NORMALIZATIONS, NORMALIZED_ROLES, scale_optimizer, swan
from jaxlm.optim.optimizers import adamw, muon
from jaxlm.optim.reset import reset_state_every
from jaxlm.optim.schedules import DECAY_SHAPES, Schedule, quick_recovery, warmup_stable_decay
from jaxlm.optim.spam import spam, stable_spam
from jaxlm.optim.sparse import cast

OPTIMIZERS = (
    "adamw",
    "muon",
    "scale",
    "swan",
    "galore",
    "natural_galore",
    "fira",
    "apollo",
    "apollo_mini",
    "spam",
    "stable_spam",
    "adamw_8bit",
    "cast",
)
MOMENTUM = {"head": HEAD_ROLES, "none": (), "all": NORMALIZED_ROLES}


@dataclasses.dataclass(frozen=True)
class ScaleOptions:
    """Of `scale`."""

    normalization: str = "column"
    """`column`, or an ablation: `row`, `sign`, `singular`, `none`."""
    momentum: float = 0.9
    momentum_on: str = "head"
    """`head`, or an ablation: `none`, `all`."""
    adam_learning_rate: float = 2e-2
    """At the top of the schedule, for norm scales and biases (1B parameters and more: 1e-3)."""


@dataclasses.dataclass(frozen=True)
class LowRankOptions:
    """Of `galore`, `natural_galore`, `fira`, `apollo`, `apollo_mini` (whose rank is 1)."""

    rank: int = 128
    """At most the smaller side of every kernel."""
    period: int = 200
    """Steps between two subspaces."""
    scale: float | None = None
    """Factor of the kernels' updates; by default 0.25, for `apollo` 1 and for `apollo_mini` 128."""
    history: int = 20
    """Gradients in the Fisher matrix of `natural_galore`."""
    damping: float = 1e-3
    """Of that matrix."""
    damping_mode: str = "absolute"
    """`absolute`, or `relative` to the mean squared norm in the history."""


@dataclasses.dataclass(frozen=True)
class SpikeOptions:
    """Of `spam` and `stable_spam`."""

    period: int | None = None
    """Steps between two resets of the moments; by default 500, for `stable_spam` 1000."""
    warmup: int = 150
    """Steps that the update grows over after a reset (`spam`)."""
    threshold: float = 5000.0
    """Squared gradient over second moment that counts as a spike (`spam`)."""


@dataclasses.dataclass(frozen=True)
class SparseOptions:
    """Of `cast`."""

    n: int = 2
    """Weights kept of every `m` inputs."""
    m: int = 4
    strength: float = 4e-7
    """Of the pull to zero, near the size of the gradients."""
    refresh: int = 10
    """Steps between two masks."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, and a warm-up, stable, decay schedule given in shares of the run."""

    name: str = "adamw"
    """`adamw`; `muon` (on the matrices of the blocks, Adam on the rest); `scale`, `swan` (normalized SGD, almost no
    state); `galore`, `natural_galore`, `fira`, `apollo`, `apollo_mini` (low-rank state); `spam`, `stable_spam`
    (against spikes); `adamw_8bit` (moments in 8 bits); `cast` (towards N:M sparsity)."""
    learning_rate: float = 1e-3
    """At the top of the schedule."""
    warmup: float = 0.05
    """Share of the steps that warm up."""
    decay: float = 0.2
    """Share of the steps that decay, at the end."""
    decay_shape: str = "linear"
    """`linear`, `cosine`, `sqrt` or `exponential`."""
    end_fraction: float = 0.05
    """Rate at the end as a share of the top."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Times the learning rate; not on norms and biases."""
    clip_norm: float | None = 1.0
    """Global norm that gradients are clipped to."""
    scale: ScaleOptions = ScaleOptions()
    low_rank: LowRankOptions = LowRankOptions()
    spikes: SpikeOptions = SpikeOptions()
    sparse: SparseOptions = SparseOptions()
    reset_every: int = 0
    """Steps between two restarts: the whole state begins anew, and the learning rate recovers; 0: never."""
    recovery: int = 10
    """Steps of that recovery."""
    block: int = 256
    """Entries that share a scale in `adamw_8bit`."""

    def __post_init__(self):
        choices = (
            ("name", self.name, OPTIMIZERS),
            ("decay_shape", self.decay_shape, DECAY_SHAPES),
            ("scale.normalization", self.scale.normalization, NORMALIZATIONS),
            ("scale.momentum_on", self.scale.momentum_on, MOMENTUM),
            ("low_rank.damping_mode", self.low_rank.damping_mode, DAMPING_MODES),
        )
        for name, value, valid in choices:
            if value not in valid:
                raise ConfigError(f"optimizer.{name} is '{value}': {nearest(value, valid)}")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}, expected a share from 0 to 1")
        if self.reset_every < 0:
            raise ConfigError(f"optimizer.reset_every is {self.reset_every}, expected at least 1, or 0 for never")
        if self.warmup + self.decay > 1:
            raise ConfigError(f"optimizer.warmup {self.warmup} + optimizer.decay {self.decay} is more than the run")

    def schedule(self, steps: int, peak: float | None = None) -> Schedule:
        """The learning rate of each step of a run of `steps`; `peak` by default is `learning_rate`."""
        warmup, decay = round(self.warmup * steps), round(self.decay * steps)
        schedule = warmup_stable_decay(
            self.learning_rate if peak is None else peak,
            steps,
            warmup,
            min(decay, steps - warmup),
            self.decay_shape,
            self.end_fraction,
        )
        return quick_recovery(schedule, self.reset_every, self.recovery) if self.reset_every else schedule

    def make(self, steps: int, axes: Any, *, sweep: bool = False) -> optax.GradientTransformationExtraArgs:
        """The Optax transformation for parameters with these logical axes.

        `b1`, `b2` and `eps` are those of Adam wherever the optimizer has one. With `sweep` the top of the schedule is
        `hparams["learning_rate"]` of the run's state in place of `learning_rate`.

        Raises:
          ConfigError: an option out of its range, or an optimizer whose roles match no parameter.
        """
        tx = self._make(steps, axes, sweep)
        return reset_state_every(tx, self.reset_every) if self.reset_every else tx

    def _make(self, steps: int, axes: Any, sweep: bool) -> optax.GradientTransformationExtraArgs:
        schedule = FromHparams(schedule=self.schedule(steps, peak=1.0)) if sweep else self.schedule(steps)
        shared = {"axes": axes, "weight_decay": self.weight_decay, "clip_norm": self.clip_norm}
        adam = {"b1": self.b1, "b2": self.b2, "eps": self.eps}
        adam_for_rest = {"adam_b1": self.b1, "adam_b2": self.b2, "adam_eps": self.eps}
        low = self.low_rank
        low_rank = {"period": low.period, **({} if low.scale is None else {"scale": low.scale})}
        fisher = {"history": low.history, "damping": low.damping, "damping_mode": low.damping_mode}
        reset = {} if self.spikes.period is None else {"period": self.spikes.period}
        match self.name:
            case "adamw":
                return adamw(schedule, **adam, **shared)
            case "muon":
                return muon(schedule, **adam_for_rest, **shared)
            case "scale":
                return scale_optimizer(
                    schedule,
                    normalization=self.scale.normalization,
                    momentum=self.scale.momentum,
                    momentum_roles=MOMENTUM[self.scale.momentum_on],
                    adam_learning_rate=self.schedule(steps, self.scale.adam_learning_rate),
                    **adam_for_rest,
                    **shared,
                )
            case "swan":
                return swan(schedule, **adam, **shared)
            case "galore":
                return galore(schedule, rank=low.rank, **low_rank, **adam, **shared)
            case "natural_galore":
                return natural_galore(schedule, rank=low.rank, **low_rank, **fisher, **adam, **shared)
            case "fira":
                return fira(schedule, rank=low.rank, **low_rank, **adam, **shared)
            case "apollo":
                return apollo(schedule, rank=low.rank, **low_rank, **adam, **shared)
            case "apollo_mini":
                return apollo_mini(schedule, **low_rank, **adam, **shared)
            case "spam":
                limits = {"warmup": self.spikes.warmup, "threshold": self.spikes.threshold}
                return spam(schedule, **reset, **limits, **adam, **shared)
            case "stable_spam":
                return stable_spam(schedule, **reset, **adam, **shared)
            case "cast":
                return cast(schedule, steps, **dataclasses.asdict(self.sparse), **adam, **shared)
            case _:
                return adamw_8bit(schedule, block=self.block, **adam, **shared)
