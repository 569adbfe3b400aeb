"""Gradient descent reaches the minimum of a parabola (Cauchy, 1847).

Claim: the distance to the minimum shrinks by the same factor in every step.
Command: python -m experiments.optimization.fake; two CPU cores, 1 second; expect a distance below 0.01.
"""

import dataclasses
import os
import time
from pathlib import Path

from experiments import runner
from jaxlm.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from jaxlm.reporting import Claim, Report
from jaxlm.training.run_log import RunLog


@dataclasses.dataclass(frozen=True)
class Descent:
    """How to descend."""

    learning_rate: float = 0.1
    """Step size, relative to the gradient."""
    momentum: bool = False

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}, expected >= 0")


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 100
    """How many steps to take."""
    fail: str = ""
    """How to fail."""
    descent: Descent = dataclasses.field(default_factory=Descent)


PRESETS = {"smoke": Config(steps=3), "small": Config(), "paper": Config(steps=1000)}

FAILURES = {
    "nan": NonFiniteError("loss is NaN at step 1"),
    "checkpoint": CheckpointError("step 10 is damaged"),
    "data": DataError("train.jsonl line 3: no field 'text'"),
    "disk": OSError(28, "No space left on device", "run/report.json"),
    "bug": RuntimeError("a bug"),
    "interrupt": KeyboardInterrupt(),
}


def run(config: Config, out: Path) -> Report:
    x = 1.0
    with RunLog(out, tensorboard=False) as log:
        for step in range(config.steps):
            x -= config.descent.learning_rate * x
            log.log(step, {"train/loss": x * x})
    print(f"tunables {os.environ.get('GLIBC_TUNABLES')}")
    if config.fail == "wait":
        print("waiting", flush=True)
        time.sleep(600)
    if config.fail == "forget":
        return None
    if config.fail:
        raise FAILURES[config.fail]
    return Report(
        "Gradient descent on a parabola",
        numbers={"distance": x},
        claims=(
            Claim("the distance falls below 0.01", "0", x, x < 0.01),
            Claim("the minimum is reached", "0", x, x == 0, "tried 1,000 steps"),
        ),
    )


if __name__ == "__main__":
    runner.main(__name__)
