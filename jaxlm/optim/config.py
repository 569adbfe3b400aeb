"""An optimizer and its schedule as settings of a run."""

import dataclasses
from typing import Any

import optax

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.optim.optimizers import adamw, muon
from jaxlm.optim.schedules import DECAY_SHAPES, Schedule, warmup_stable_decay

OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, and a warm-up, stable, decay schedule given in shares of the run."""

    name: str = "adamw"
    """`adamw`, or `muon`: Muon on the matrices of the blocks, Adam on the rest."""
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

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"optimizer.name is '{self.name}': {nearest(self.name, OPTIMIZERS)}")
        if self.decay_shape not in DECAY_SHAPES:
            raise ConfigError(
                f"optimizer.decay_shape is '{self.decay_shape}': {nearest(self.decay_shape, DECAY_SHAPES)}"
            )
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}, expected a share from 0 to 1")
        if self.warmup + self.decay > 1:
            raise ConfigError(f"optimizer.warmup {self.warmup} + optimizer.decay {self.decay} is more than the run")

    def schedule(self, steps: int) -> Schedule:
        """The learning rate of each step of a run of `steps`."""
        warmup, decay = round(self.warmup * steps), round(self.decay * steps)
        return warmup_stable_decay(
            self.learning_rate, steps, warmup, min(decay, steps - warmup), self.decay_shape, self.end_fraction
        )

    def make(self, steps: int, axes: Any) -> optax.GradientTransformationExtraArgs:
        """The Optax transformation for parameters with these logical axes."""
        schedule = self.schedule(steps)
        shared = {"axes": axes, "weight_decay": self.weight_decay, "clip_norm": self.clip_norm}
        if self.name == "adamw":
            return adamw(schedule, b1=self.b1, b2=self.b2, eps=self.eps, **shared)
        return muon(schedule, adam_b1=self.b1, adam_b2=self.b2, adam_eps=self.eps, **shared)
