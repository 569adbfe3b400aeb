"""SCALE: column-normalized SGD with momentum for the head alone matches Adam, with the memory of SGD.

Glentis, Li, Han and Hong, "A Minimalist Optimizer Design for LLM Pretraining", 2025, arXiv 2506.16659. Two changes make
SGD match Adam in pretraining: every gradient matrix is normalized by columns (output units), and the language-model
head, whose gradient varies most from batch to batch, has momentum. Optimizer state: the head's momentum.

    python -m experiments.optimization.scale                        # small: 7 minutes on two CPU cores
    python -m experiments.optimization.scale --preset ablation      # all normalizations and uses of momentum
    python -m experiments.optimization.scale --preset llama_1b --data.path 'c4/*.jsonl.gz'       # on TPU v5e-16

Arms share model, data and steps. Each is tuned over four learning rates of its own (and more where the best lies at an
edge) with one seed, and judged with other seeds on other text.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11): held-out loss 3.81 with Adam, 3.74 with SCALE, 5.40 with SGD,
4.02 with normalized columns and 3.87 with normalized rows. Two of the paper's claims do not hold at this size: rows do
better than columns, and the embedding's gradient varies as much as the head's (0.127 and 0.124).
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import bases, published, runner
from experiments.bases import FRAME, Arm, ArmResult, MeshStudyConfig
from experiments.checks import check_arms, check_rates
from jaxlm.core.errors import ConfigError
from jaxlm.optim.config import OptimizerConfig, ScaleOptions
from jaxlm.reporting import Claim, Figure, Report, Series, Table
from jaxlm.reporting.figures import smooth

_ADAM_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
_NORMALIZED_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
_SGD_RATES = (0.3, 1.0, 3.0, 10.0)


def _normalized(normalization: str, momentum_on: str) -> OptimizerConfig:
    return OptimizerConfig("scale", scale=ScaleOptions(normalization, momentum_on=momentum_on), **FRAME)


ARMS: Mapping[str, Arm] = {
    "adam": Arm(OptimizerConfig("adamw", **FRAME), _ADAM_RATES),
    "sgd": Arm(_normalized("none", "none"), _SGD_RATES),
    "column": Arm(_normalized("column", "none"), _NORMALIZED_RATES),
    "row": Arm(_normalized("row", "none"), _NORMALIZED_RATES),
    "scale": Arm(_normalized("column", "head"), _NORMALIZED_RATES),
    "sign": Arm(_normalized("sign", "none"), _NORMALIZED_RATES),
    "singular": Arm(_normalized("singular", "none"), _NORMALIZED_RATES),
    "column, momentum everywhere": Arm(_normalized("column", "all"), _NORMALIZED_RATES),
    "row, momentum for the head": Arm(_normalized("row", "head"), _NORMALIZED_RATES),
    "singular, momentum for the head": Arm(_normalized("singular", "head"), _NORMALIZED_RATES),
}


@dataclasses.dataclass(frozen=True)
class Config(MeshStudyConfig):
    """A comparison of optimizers."""

    arms: tuple[str, ...] = ("adam", "sgd", "column", "row", "scale")
    """What is compared: `adam`, `sgd`, and normalizations with momentum for nothing, the head or everything."""
    variance_batches: int = 32
    """Batches from which each matrix's gradient variance is measured, in the first trained model of arm `adam`."""
    rates: tuple[float, ...] = ()
    """Learning rates that arms are tuned over in place of their own."""

    def __post_init__(self):
        super().__post_init__()
        check_arms(self.arms, ARMS)
        if self.rates:
            check_rates(self, "rates")
        if self.variance_batches < 2:
            raise ConfigError(f"variance_batches is {self.variance_batches}, expected at least 2")


SMALL = Config(**bases.SMALL)

# Steps and SCALE's learning rate in the paper; Adam is tuned by giving `--rates` several.
_PUBLISHED: Mapping[str, tuple[int, float]] = {
    "llama_60m": (11_000, 1e-3),
    "llama_130m": (20_000, 1e-3),
    "llama_350m": (60_000, 1e-3),
    "llama_1b": (100_000, 2e-4),
    "llama_7b": (150_000, 1e-4),
}

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(SMALL, **bases.SMOKE, steps=3, arms=("adam", "scale"), variance_batches=2),
    "small": SMALL,
    "ablation": dataclasses.replace(SMALL, arms=tuple(ARMS)),
    **{
        name: published.at_size(SMALL, name, arms=("adam", "scale"), steps=steps, rates=(rate,))
        for name, (steps, rate) in _PUBLISHED.items()
    },
}
TOPOLOGIES = published.TOPOLOGIES

# The paper's perplexities of 60M models (table 2; the ablation's from its figures as others report them).
_PAPER = {"adam": 30.05, "scale": 30.81, "column": 39.89, "row": 79.27, "sign": 54.36, "singular": 34.15}


def run(config: Config, out: Path) -> Report:
    """Trains and judges all arms; what is finished in `out` is not repeated."""
    text = bases.load_text(config)
    results = bases.compare_arms(config, {name: _arm(config, name) for name in config.arms}, text, out)
    variance = _variance(config, text, results["adam"].params) if "adam" in results and text else {}
    return report(results, variance)


def make_program(config: Config, devices: Any = None) -> tuple[Any, Any]:
    """SCALE's training program of a preset with a mesh, for `experiments.plan`."""
    return published.make_program(config, _arm(config, "scale"), devices=devices)


def _arm(config: Config, name: str) -> Arm:
    return dataclasses.replace(ARMS[name], rates=config.rates or ARMS[name].rates)


def report(results: Mapping[str, ArmResult], variance: Mapping[str, float]) -> Report:
    """Tables, figures and claims of a finished comparison."""
    rows = tuple((name, r.rate, r.loss, r.spread, r.is_at_an_edge) for name, r in results.items())
    columns = ("optimizer", "learning rate", "loss", "seeds apart", "at an edge")
    arms = Table("Held-out loss, nats a token", columns, rows)
    memory = Table(
        "Weights and optimizer state, GB at two bytes a number",
        ("model", "adam", "muon", "scale", "scale / adam"),
        tuple(_memory_row(size) for size in ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b")),
        "The paper states 0.35, 0.23 and 0.15 GB for 60M, 8.03, 5.36 and 2.81 GB for 1B.",
    )
    tables = [arms, memory]
    if variance:
        ordered = sorted(variance.items(), key=lambda item: -item[1])
        tables.append(Table("Variance of the gradient from batch to batch", ("matrix", "variance"), tuple(ordered)))
    curves = tuple(Series(name, range(1, len(r.history) + 1), smooth(r.history)) for name, r in results.items())
    rates = tuple(Series(name, tuple(r.tuned), tuple(r.tuned.values())) for name, r in results.items())
    figures = [Figure("Training loss", curves, "step", "nats a token (smoothed)")]
    if tuning := _finite(rates):
        figures.append(Figure("Tuning", tuning, "learning rate", "nats a token on the tuning text", x_scale="log"))
    numbers = {f"loss, {name}": r.loss for name, r in results.items()}
    numbers |= {f"milliseconds a step, {name}": 1000 * r.seconds_a_step for name, r in results.items()}
    return Report(
        title="SCALE: a minimalist optimizer",
        summary="Column normalization and momentum for the head alone, beside Adam, SGD and other normalizations.",
        numbers=numbers,
        claims=tuple(claims(results, variance)),
        tables=tuple(tables),
        figures=tuple(figures),
    )


def claims(results: Mapping[str, ArmResult], variance: Mapping[str, float]) -> list[Claim]:
    """The paper's claims that the arms at hand can judge."""
    found = []
    at_edge = [name for name, r in results.items() if r.is_at_an_edge]
    note = f"Best at an edge of the rates tried: {', '.join(at_edge)}." if at_edge else ""

    def compare(statement: str, first: str, second: str, holds: Any) -> None:
        if first in results and second in results:
            a, b = results[first].loss, results[second].loss
            paper = None
            if first in _PAPER and second in _PAPER:
                paper = f"perplexity {_PAPER[first]} and {_PAPER[second]}"
            found.append(Claim(statement, paper, f"loss {a:.4f} and {b:.4f}", holds(a, b), note))

    compare("SCALE's loss is within 3 % of tuned Adam's.", "scale", "adam", lambda a, b: a <= 1.03 * b)
    compare("Normalizing columns beats normalizing rows.", "column", "row", lambda a, b: a < b)
    compare("Momentum for the head improves on column normalization.", "scale", "column", lambda a, b: a < b)
    compare("Plain SGD stays far behind Adam (more than 10 %).", "sgd", "adam", lambda a, b: a > 1.1 * b)
    if variance:
        largest = max(variance, key=variance.__getitem__)
        statement = "Of all matrices, the head's gradient varies most from batch to batch."
        found.append(Claim(statement, "the head", largest, largest.startswith("head")))
    *_, ratio = _memory_row("llama-1b")
    statement = "Weights and state of the 1B model take 35 to 45 % of the memory with Adam."
    found.append(Claim(statement, 2.81 / 8.03, ratio, 0.345 <= ratio <= 0.455))
    return found


def _variance(config: Config, text: bases.Text, params: Any) -> dict[str, float]:
    """By matrix: of each kernel the sum over layers is not taken, the greatest layer's counts."""
    import jax
    import jax.numpy as jnp

    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training.probes import gradient_variance

    key, count = jax.random.key(config.tuning_seed), config.variance_batches

    def measure(params: Any) -> Any:
        batches = jax.vmap(lambda step: text.train.sample(key, step, config.batch_size))(jnp.arange(count))
        return gradient_variance(CausalLM(Decoder(config.model)), params, batches)

    found = {}
    for path, values in jax.device_get(jax.jit(measure)(params)).items():
        if path.endswith(("kernel", "table")):
            name = path.removeprefix("blocks/0/").removesuffix("/kernel").removesuffix("/table")
            found[name] = float(values.max())
    return found


def _memory_row(size: str) -> tuple[str, float, float, float, float]:
    """GB of weights and state with Adam, Muon on all matrices (as in the paper's table) and SCALE; SCALE's share."""
    import jax
    import jax.numpy as jnp

    from jaxlm.models import Decoder
    from jaxlm.models.presets import preset
    from jaxlm.optim.memory import model_bytes

    model = Decoder(preset(size))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.abstract_params())
    axes = model.axes()
    adam = model_bytes("adamw", params, axes) / 1e9
    muon = model_bytes("muon", params, axes, muon_roles=("matrix", "embed", "head")) / 1e9
    scale = model_bytes("scale", params, axes) / 1e9
    return size, adam, muon, scale, scale / adam


def _finite(lines: tuple[Series, ...]) -> tuple[Series, ...]:
    kept = []
    for line in lines:
        points = [(x, y) for x, y in zip(line.x, line.y) if math.isfinite(y)]
        if points:
            kept.append(dataclasses.replace(line, x=[x for x, _ in points], y=[y for _, y in points]))
    return tuple(kept)


if __name__ == "__main__":
    runner.main(__name__)
