"""CAST: a trained model becomes 2:4 sparse while it trains on, at almost no loss.

Huang et al., "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models",
2025, arXiv 2509.25996 (its algorithm as others report it). The forward pass stays dense; the optimizer fades the
gradient of the weights that magnitude masks would remove into a pull to zero; groups of weights have trained factors;
the dense model that it started from teaches. At the end pruning removes nothing that still matters.

    python -m experiments.optimization.cast                        # small

A small dense model is trained first. Then every arm retrains it on text that it has not seen, for the same steps:
with the mask fixed (`static`), with masks that follow the weights and straight-through gradients (`sr_ste`, Zhou et
al. 2021), and with CAST. These are tuned over the same learning rates with one seed and judged with others on other
text. CAST without one of its parts runs at CAST's own rate. Every loss is that of the pruned model.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11; 17 minutes beside other jobs): over the dense model's loss of
3.036, pruning at once adds 0.280, CAST 0.012, SR-STE 0.020 and a fixed mask 0.002, so that at this size, with a base
far from done, the plainest way is best. CAST's masked weights fall to 0.7 % of what they were. Without the teacher it
loses 0.047, without new masks 0.021; factors change nothing.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import bases, runner
from experiments.bases import ArmResult, StudyConfig
from experiments.checks import check_arms, check_counts, check_rates
from jaxlm.core.errors import ConfigError
from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.sparse import decay_budget
from jaxlm.reporting import Claim, Figure, Report, Series, Table
from jaxlm.reporting.figures import smooth

ARMS = ("static", "sr_ste", "cast")
ABLATIONS = ("without factors", "without teacher", "without refresh")
_FLIPS_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """A dense model, and ways to make it sparse. `steps` and `seeds` are those of retraining."""

    base_steps: int = 2000
    """Of the dense model."""
    base_learning_rate: float = 4e-3
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Every arm is tuned over these (and more where the best lies at an edge)."""
    arms: tuple[str, ...] = (*ARMS, *ABLATIONS)
    """`static`, `sr_ste`, `cast`, and CAST without one of its parts."""
    n: int = 2
    m: int = 4
    groups: int = 2
    """Factors of each output of a kernel."""
    refresh: int = 10
    """Steps between two masks of CAST."""
    teacher_weight: float = 1 / 3
    """Share of the divergence from the dense model in CAST's loss."""
    sr_ste_strength: float = 2e-4
    """As published, for SGD."""
    budget: float = 3.0
    """The least `decay_budget` of CAST at the greatest of `rates`, in mean magnitudes of the kernels' weights."""

    def __post_init__(self):
        super().__post_init__()
        check_arms(self.arms, (*ARMS, *ABLATIONS))
        check_counts(self, "base_steps", "groups", "refresh")
        check_rates(self, "rates")
        if "cast" not in self.arms and set(self.arms) & set(ABLATIONS):
            raise ConfigError("arms without a part of CAST run at its learning rate: add arm 'cast'")


SMALL = Config(**bases.SMALL, steps=500, batch_size=8)

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        **bases.SMOKE,
        base_steps=3,
        steps=20,
        rates=(2e-2,),
        arms=("static", "cast"),
        budget=0.0,
    ),
    "small": SMALL,
}

# Warm-up over a twentieth, the last 30 % linear to a twentieth: what is masked ends as small as the last rates.
_SCHEDULE: dict[str, Any] = {"warmup": 0.05, "decay": 0.3, "weight_decay": 0.0, "b2": 0.999}


@dataclasses.dataclass(frozen=True)
class Base:
    """The dense model, its loss on the judging text, and what CAST is set by."""

    params: Any
    masks: Any
    """Of its magnitudes."""
    loss: float
    kept: float
    """Mean magnitude of the weights that the masks would keep."""
    masked: float
    """The same of those that they would remove."""
    strength: float
    """Median magnitude of the first moment over the latter."""


def run(config: Config, out: Path) -> Report:
    """Trains the dense model and every arm; what is finished in `out` is not repeated."""
    total = config.steps + config.base_steps
    text = bases.load_text(dataclasses.replace(config, steps=total))
    first, second = text.train.cut(config.base_steps / total, config.steps / total)
    base = train_base(config, dataclasses.replace(text, train=first), out / "members")
    if "cast" in config.arms:
        check_budget(config, base)
    text = dataclasses.replace(text, train=second)
    pruned = _one_shot(config, base, text)
    results: dict[str, ArmResult] = {}
    for arm in config.arms:
        rates = (results["cast"].rate,) if arm in ABLATIONS else config.rates
        results[arm] = retrain(config, arm, base, text, rates, out / "members")
    return report(config, base, pruned, results)


def train_base(config: Config, text: bases.Text, folder: Path) -> Base:
    """The dense model, trained until its learning rate is nearly zero."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.compression import magnitude_masks
    from jaxlm.compression.sparsity import magnitudes
    from jaxlm.core import trees
    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training import Member, Population, init_state, make_step

    model = Decoder(config.model)
    objective = CausalLM(model)
    optimizer = OptimizerConfig(learning_rate=config.base_learning_rate, warmup=0.05, decay=0.5, end_fraction=0.01)
    tx = optimizer.make(config.base_steps, model.axes())
    population = Population(
        init=lambda key, hparams: init_state(model.init(key)["params"], tx, key),
        step=make_step(objective, tx),
        sample=lambda key, step: text.train.sample(key, step, config.batch_size),
        num_steps=config.base_steps,
        evaluate=lambda params: {"judge": resident_loss(objective, text.judge, config.batch_size)(params)},
    )
    member = Member("dense", config.tuning_seed)
    (outcome,) = population.train([member], folder=folder, keep_params=True, report=bases.say)
    params = outcome.params

    def mean_gradient(params: Any) -> Any:
        def add(total: Any, step: Any) -> tuple[Any, None]:
            batch = text.train.sample(jax.random.key(config.tuning_seed), step, config.batch_size)
            loss = lambda p: objective.sums(p, batch)["loss"] / jnp.sum(batch["loss_weights"])  # noqa: E731
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(10))
        return jax.tree.map(lambda g: g / 10, total)

    @jax.jit
    def measure(params: Any) -> tuple[Any, Any, dict[str, Any]]:
        masks = magnitude_masks(params, config.n, config.m)
        return masks, mean_gradient(params), magnitudes(params, masks)

    masks, gradient, sizes = measure(params)
    gradients = dict(trees.named_leaves(gradient))
    removed = [np.abs(gradients[path])[~np.asarray(mask)] for path, mask in trees.named_leaves(masks)]
    strength = float(np.median(np.concatenate(removed)))
    return Base(params, masks, outcome.results["judge"], float(sizes["kept"]), float(sizes["masked"]), strength)


def check_budget(config: Config, base: Base) -> None:
    """Raises `ConfigError` if the run is too short, or its rates are too small, to move masked weights to zero."""
    rate, mean_weight = max(config.rates), (config.n * base.kept + (config.m - config.n) * base.masked) / config.m
    far = decay_budget(OptimizerConfig("cast", **_SCHEDULE).schedule(config.steps, rate), config.steps)
    if far < config.budget * mean_weight:
        raise ConfigError(
            f"in {config.steps} steps at {rate} a masked weight travels {far:.3f}, expected {config.budget} "
            f"times the mean weight {mean_weight:.3f} or more: more steps, or higher rates"
        )


def retrain(config: Config, arm: str, base: Base, text: bases.Text, rates: Sequence[float], folder: Path) -> ArmResult:
    """One arm from the dense model on; results of the pruned model, and what pruning it changed."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlm.compression import add_group_scales, apply_masks, fold_and_prune, magnitude_masks, straight_through
    from jaxlm.compression.sparsity import in_blocks, magnitudes
    from jaxlm.core import trees
    from jaxlm.core.sparsity import flip_rate
    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM, Distillation
    from jaxlm.optim.config import SparseOptions
    from jaxlm.optim.sparse import add_masked_decay
    from jaxlm.peft.lora import adapted_axes
    from jaxlm.training import Population, init_state, make_step

    model, nm, is_cast = Decoder(config.model), (config.n, config.m), _is_cast(arm)
    refresh = config.steps if arm == "without refresh" else config.refresh
    options = SparseOptions(config.n, config.m, base.strength, refresh)
    optimizer = OptimizerConfig("cast" if is_cast else "adamw", sparse=options, **_SCHEDULE)
    start = base.params
    if is_cast and arm != "without factors":
        start = add_group_scales(start, config.groups, config.m)
    tx = optimizer.make(config.steps, adapted_axes(start, model.axes()), sweep=True)
    if arm == "sr_ste":
        kernels = trees.map_named(lambda path, _: in_blocks(path), start)
        tx = optax.chain(optax.masked(add_masked_decay(config.sr_ste_strength, *nm), kernels), tx)

    plain = CausalLM(model)
    objective: Any = plain
    if is_cast and arm != "without teacher":
        objective = Distillation(model, weight=config.teacher_weight, teacher=lambda params, frozen: frozen["dense"])

    def build(trainable: Any, frozen: Any, step: Any) -> Any:
        if arm == "static":
            return apply_masks(trainable, frozen["masks"])
        return straight_through(trainable, magnitude_masks(trainable, *nm)) if arm == "sr_ste" else trainable

    plain_step = make_step(objective, tx, build=build)

    def step(state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        new, metrics = plain_step(state, frozen, batch)
        seen = state.step % _FLIPS_EVERY == 0
        before, after = state.trainable, new.trainable
        flips = jax.lax.cond(
            seen, lambda: flip_rate(magnitude_masks(before, *nm), magnitude_masks(after, *nm)), lambda: jnp.float32(0)
        )
        return new, {**metrics, "flips": (flips, seen.astype(jnp.float32))}

    def evaluate(trainable: Any) -> dict[str, Any]:
        masks = base.masks if arm == "static" else magnitude_masks(trainable, *nm)
        trained = apply_masks(trainable, masks) if arm == "static" else trainable
        pruned = fold_and_prune(apply_masks(trained, masks), *nm)
        tuning, judge = (resident_loss(plain, rows, config.batch_size) for rows in (text.tuning, text.judge))
        sizes = magnitudes(trained, masks)
        found = {"tuning": tuning(pruned), "judge": judge(pruned), "before pruning": judge(trained)}
        return {**found, "kept": sizes["kept"], "masked": sizes["masked"]}

    population = Population(
        init=lambda key, hparams, start: init_state(start, tx, key, hparams=hparams),
        step=step,
        sample=lambda key, step: text.train.sample(key, step, config.batch_size),
        num_steps=config.steps,
        evaluate=evaluate,
    )
    frozen = {"dense": base.params, "masks": base.masks}
    return bases.tune_and_judge(config, arm, population, rates, folder, frozen, start)


def report(config: Config, base: Base, pruned: float, results: Mapping[str, ArmResult]) -> Report:
    """Tables, figures and claims of finished runs."""
    means = {name: _means(r) for name, r in results.items()}
    rows: list[tuple] = [
        ("dense", None, base.loss, None, None, None),
        ("pruned at once", None, pruned, None, None, None),
    ]
    for name, r in results.items():
        found = means[name]
        # The forward pass of other arms is sparse in training already.
        change, shrunk = r.loss - found["before pruning"], found["kept"] / max(found["masked"], 1e-12)
        rows.append((name, r.rate, r.loss, r.spread, *((change, shrunk) if _is_cast(name) else (None, None))))
    columns = ("arm", "learning rate", "loss", "seeds apart", "changed by pruning", "kept / masked weight")
    flips = tuple(Series(name, *_flips(r)) for name, r in results.items() if name != "static")
    curves = tuple(
        Series(name, range(1, len(r.history) + 1), smooth(r.history))
        for name, r in results.items()
        if name in ("static", "sr_ste", "without teacher")
    )
    return Report(
        title="CAST: sparsity-aware training",
        summary=f"A dense model made {config.n}:{config.m} sparse while it trains on, beside other ways to do so.",
        numbers={"loss, dense": base.loss, **{f"loss, {name}": r.loss for name, r in results.items()}},
        claims=tuple(claims(base, pruned, results)),
        tables=(Table("Held-out loss of the pruned model, nats a token", columns, tuple(rows)),),
        figures=(
            Figure("Flips of the mask", flips, "step", "share of weights in one step"),
            Figure("Training loss", curves, "step", "nats a token (smoothed)"),
        ),
    )


def claims(base: Base, pruned: float, results: Mapping[str, ArmResult]) -> list[Claim]:
    """The paper's claims that the arms at hand can judge."""
    found = []
    gap = {name: r.loss - base.loss for name, r in results.items()} | {"pruned at once": pruned - base.loss}

    def compare(statement: str, first: str, second: str, paper: str | None = None) -> None:
        if first in gap and second in gap:
            measured = f"loss over dense {gap[first]:+.4f} and {gap[second]:+.4f}"
            found.append(Claim(statement, paper, measured, gap[first] < gap[second]))

    compare("Retraining with a fixed mask beats pruning at once.", "static", "pruned at once")
    compare("Masks that follow the weights (SR-STE) beat a fixed one.", "sr_ste", "static")
    compare("CAST loses less than SR-STE.", "cast", "sr_ste", "least loss of all retraining methods")
    if "cast" not in results:
        return found
    cast = _means(results["cast"])
    change = results["cast"].loss - cast["before pruning"]
    found.append(Claim("Pruning at the end changes CAST's loss by less than 0.01.", None, change, abs(change) < 0.01))
    masked, kept = cast["masked"] / base.masked, cast["kept"] / base.kept
    statement = "CAST's masked weights shrink to a tenth or less, and the kept ones stay (within a factor of 1.5)."
    measured = f"{masked:.3g} and {kept:.3g} of the dense model's"
    found.append(Claim(statement, None, measured, masked <= 0.1 and 1 / 1.5 <= kept <= 1.5))
    if "sr_ste" in results:
        last = {name: statistics.fmean(_flips(results[name])[1][-5:]) for name in ("cast", "sr_ste")}
        measured = f"{last['sr_ste']:.2g} and {last['cast']:.2g} of the weights a step"
        statement = "At the end SR-STE's masks still flip more than CAST's."
        found.append(Claim(statement, None, measured, last["sr_ste"] > last["cast"]))
    for name in ABLATIONS:
        compare(f"CAST is better than CAST {name}.", "cast", name)
    return found


def _one_shot(config: Config, base: Base, text: bases.Text) -> float:
    """Loss of the dense model pruned by magnitude."""
    import jax

    from jaxlm.compression import fold_and_prune
    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM

    loss = resident_loss(CausalLM(Decoder(config.model)), text.judge, config.batch_size)
    return float(jax.jit(lambda params: loss(fold_and_prune(params, config.n, config.m)))(base.params))


def _is_cast(arm: str) -> bool:
    return arm == "cast" or arm in ABLATIONS


def _means(result: ArmResult) -> dict[str, float]:
    names = result.outcomes[0].results
    return {name: statistics.fmean(o.results[name] for o in result.outcomes) for name in names}


def _flips(result: ArmResult) -> tuple[list[int], list[float]]:
    steps = range(0, len(result.outcomes[0].history["flips"]), _FLIPS_EVERY)
    return [s + 1 for s in steps], [
        statistics.fmean(float(o.history["flips"][s]) for o in result.outcomes) for s in steps
    ]


if __name__ == "__main__":
    runner.main(__name__)
