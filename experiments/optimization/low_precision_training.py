"""Low-precision training: 8 bits train like 32, 4 bits need chance, and rounding at random keeps small updates alive.

Hao et al., "Low-Precision Training of Large Language Models: Methods, Challenges, and Opportunities", 2025, a survey
(list: Hao840/Awesome-Low-Precision-Training). It has no headline figure; what it says of its groups is shown here with
a representative of each: fixed point and integers, floating point, microscaling, quantization-aware training.

    python -m experiments.optimization.low_precision_training        # small: 10 minutes on two CPU cores
    python -m experiments.pretrain --preset llama_1b_fp8_h200        # 1B LLaMA, FP8 with delayed scaling, one H200
    python -m experiments.pretrain --preset llama_1b_int8            # the same with int8 SwitchBack, TPU v5e-64

All arms share model, data, order of batches, initialization and learning rate: the one that is best for float32, as is
customary in what the survey compares (it favors float32, if anything). Formats that a CPU lacks are emulated exactly.
The arms that keep weights without a wider copy run at a small share of that rate, where updates are smaller than half
a unit in the last place of the weights, beside float32 at the same rate.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11; 11 minutes beside other jobs): held-out loss 4.171 with float32,
within 0.2 % of it with 8 and 16 bits, 4.192 and 4.203 with MXFP4 (to nearest, at random), 4.157 with BitNet, 4.194 with
training for W4A8, which rounding afterwards (4.172) beats: 250 steps are too few for rounding to hurt. At the small
rate weights rounded to nearest make 43 % (bfloat16) and 1 % (16-bit fixed point) of float32's progress, at random all.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import bases, runner
from experiments.bases import StudyConfig
from experiments.checks import check_rates
from jaxlm.core.errors import ConfigError
from jaxlm.core.policies import precision_policy
from jaxlm.data.prepare import DataConfig
from jaxlm.models.config import DecoderConfig
from jaxlm.optim.config import OptimizerConfig
from jaxlm.reporting import Claim, Figure, Report, Series, Table
from jaxlm.reporting.figures import smooth

_OPTIMIZER = OptimizerConfig("adamw", **bases.FRAME)
BASELINE, SLOW_BASELINE = "float32", "float32, small rate"
NEAR = ("bfloat16", "float16", "int8_switchback", "int8_block", "fp8_delayed", "fp8_current", "mxfp8")
"""What should be within 1 % of float32."""
FLOATS = ("bfloat16", "float16", "fp8_delayed", "fp8_current", "mxfp8", "mxfp4_stochastic")
SLOW = ("bf16_weights", "bf16_weights_stochastic", "fixed16_weights", "fixed16_weights_stochastic")
POST_TRAINING = "float32, rounded to W4A8 afterwards"


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """A comparison of precision policies."""

    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Learning rates that float32 is tuned over."""
    arms: tuple[str, ...] = (*NEAR, "mxfp4", "mxfp4_stochastic", "qat_w4a8", "bitnet")
    """Precision policies at the best of them."""
    slow_arms: tuple[str, ...] = SLOW
    """Policies at a small share of it."""
    slow_share: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        for name in (*self.arms, *self.slow_arms):
            precision_policy(name)
        check_rates(self, "rates")
        if not 0 < self.slow_share < 1:
            raise ConfigError(f"slow_share is {self.slow_share}, expected between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Result:
    """An arm's loss on the judging text, a seed each; its training loss by step, mean over seeds."""

    losses: tuple[float, ...]
    history: tuple[float, ...]
    seconds_a_step: float

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


SMALL = Config(
    model=DecoderConfig(
        vocab_size=1024, num_layers=2, embed_dim=128, num_heads=4, mlp_dim=384, max_length=64, remat="none"
    ),
    data=DataConfig(vocab_size=1024, sequence_length=64),
    steps=250,
    batch_size=8,
)

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        model=DecoderConfig(
            vocab_size=512, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=32, max_length=32, remat="none"
        ),
        data=DataConfig(tokenizer="byte", sequence_length=32),
        steps=2,
        batch_size=4,
        judge_rows=8,
        seeds=(1,),
        rates=(4e-3,),
        arms=("qat_w4a8",),
        slow_arms=("bf16_weights_stochastic",),
    ),
    "small": SMALL,
    # Every recipe there is, and time to tell them apart; for an accelerator.
    "long": dataclasses.replace(
        SMALL,
        steps=5000,
        batch_size=64,
        arms=(*SMALL.arms, "int8_vector", "fp8_block", "mxfp6", "nvfp4"),
    ),
}


def run(config: Config, out: Path) -> Report:
    """Trains and judges all arms; what is finished in `out` is not repeated."""
    from jaxlm.training import Member

    text = bases.load_text(config)

    def train(population: Any, name: str, rate: float, seeds: tuple[int, ...], keep: bool = False) -> list[Any]:
        members = [Member(f"{name} {rate:g} {seed}", seed, {"learning_rate": rate}) for seed in seeds]
        return population.train(members, folder=out / "members", keep_params=keep, report=bases.say)

    float32 = _population(config, BASELINE, text)
    tuning = {r: train(float32, BASELINE, r, (config.tuning_seed,))[0].results["tuning"] for r in config.rates}
    finite = [rate for rate, loss in tuning.items() if math.isfinite(loss)]
    if not finite:
        raise ConfigError(f"float32 diverges at each of the learning rates {config.rates}: try smaller ones")
    rate = min(finite, key=tuning.__getitem__)
    outcomes = {BASELINE: train(float32, BASELINE, rate, config.seeds, keep=True)}
    for name in config.arms:
        outcomes[name] = train(_population(config, name, text), name, rate, config.seeds)
    slow = config.slow_share * rate
    if config.slow_arms:
        outcomes[SLOW_BASELINE] = train(float32, SLOW_BASELINE, slow, config.seeds)
    for name in config.slow_arms:
        outcomes[name] = train(_population(config, name, text), name, slow, config.seeds)
    results = {name: _result(found, config.steps) for name, found in outcomes.items()}
    if "qat_w4a8" in config.arms:
        losses = _rounded_afterwards(config, [o.params for o in outcomes[BASELINE]], text)
        results[POST_TRAINING] = Result(losses, (), 0.0)
    return report(config, rate, tuning, results)


def _population(config: Config, policy: str, text: bases.Text) -> Any:
    """Runs that differ in nothing but seed and learning rate."""
    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training import Population, init_state, low_precision, make_step

    model = Decoder(config.model)
    tx = _OPTIMIZER.make(config.steps, model.axes(), sweep=True)
    recipe = low_precision(CausalLM(model), tx, precision_policy(policy), model.axes())
    tuning, judge = (resident_loss(recipe.objective, rows, config.batch_size) for rows in (text.tuning, text.judge))

    def init(key: Any, hparams: Any) -> Any:
        params = recipe.prepare(model.init(key)["params"])
        return init_state(params, recipe.tx, key, extra=recipe.extra(params), hparams=hparams)

    return Population(
        init=init,
        step=make_step(recipe.objective, recipe.tx, apply_updates=recipe.apply_updates),
        sample=lambda key, step: text.train.sample(key, step, config.batch_size),
        num_steps=config.steps,
        evaluate=lambda params: {"tuning": tuning(params), "judge": judge(params)},
    )


def _rounded_afterwards(config: Config, params: list[Any], text: bases.Text) -> tuple[float, ...]:
    """The losses of trained models with weights in 4 and activations in 8 bits, as `qat_w4a8` has them in training."""
    import jax

    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training import LowPrecisionObjective
    from jaxlm.training.low_precision import kernels_under_policy

    model = Decoder(config.model)
    policy = precision_policy("qat_w4a8")
    objective = LowPrecisionObjective(CausalLM(model), policy, kernels_under_policy(model.axes()))
    loss = jax.jit(resident_loss(objective, text.judge, config.batch_size))
    return tuple(float(loss(p)) for p in params)


def _result(outcomes: list[Any], steps: int) -> Result:
    import numpy as np

    return Result(
        losses=tuple(o.results["judge"] for o in outcomes),
        history=tuple(np.mean([o.history["loss"] for o in outcomes], axis=0).tolist()),
        seconds_a_step=min(o.seconds for o in outcomes) / steps,
    )


def report(config: Config, rate: float, tuning: Mapping[float, float], results: Mapping[str, Result]) -> Report:
    """Tables, figures and claims of a finished comparison."""
    rows = []
    for name, r in results.items():
        baseline = results[SLOW_BASELINE if name in (*config.slow_arms, SLOW_BASELINE) else BASELINE]
        gap = 100 * (r.loss / baseline.loss - 1)
        rows.append((name, r.loss, gap, max(r.losses) - min(r.losses), 1000 * r.seconds_a_step or None))
    columns = ("policy", "loss", "% above float32", "seeds apart", "ms a step (emulated)")
    edge = ", at an edge" if len(tuning) > 1 and rate in (min(tuning), max(tuning)) else ""
    at_rate = f"All at learning rate {rate:g}, the best of float32 ({_listed(tuning)}{edge}); "
    slow = f"those without wider weights, and '{SLOW_BASELINE}', at {config.slow_share * rate:g}."
    curves = {name: r.history for name, r in results.items() if r.history}
    groups = (
        ("Training loss", {n: h for n, h in curves.items() if n not in (*config.slow_arms, SLOW_BASELINE)}),
        ("Training loss at a small rate", {n: curves[n] for n in (SLOW_BASELINE, *config.slow_arms) if n in curves}),
    )
    figures = tuple(
        Figure(
            title,
            tuple(Series(name, range(1, len(h) + 1), smooth(h)) for name, h in group.items()),
            "step",
            "nats a token (smoothed)",
        )
        for title, group in groups
        if group
    )
    return Report(
        title="Low-precision training",
        summary="A representative of each group of number formats, trained beside float32 with everything else equal.",
        numbers={"learning rate": rate} | {f"loss, {name}": r.loss for name, r in results.items()},
        claims=tuple(claims(results)),
        tables=(Table("Held-out loss, nats a token", columns, tuple(rows), at_rate + slow),),
        figures=figures,
    )


def claims(results: Mapping[str, Result]) -> list[Claim]:
    """What the survey says that the arms at hand can judge."""
    found = []
    base = results[BASELINE].loss

    def gap(name: str) -> float:
        return results[name].loss / base - 1

    for name in NEAR:
        if name in results:
            statement = f"Training with {name} ends within 1 % of float32's loss."
            found.append(Claim(statement, None, f"{100 * gap(name):+.2f} %", abs(gap(name)) <= 0.01))
    if "mxfp4" in results:
        others = [name for name in FLOATS if name in results]
        worst = max(others, key=gap, default=None)
        if worst:
            measured = f"{100 * gap('mxfp4'):+.2f} %; next {worst}, {100 * gap(worst):+.2f} %"
            statement = "MXFP4 rounded to nearest is the worst of the floating-point arms."
            found.append(Claim(statement, None, measured, gap("mxfp4") > gap(worst)))
    _compare(
        found, results, "Stochastic rounding with a Hadamard transform improves MXFP4.", "mxfp4_stochastic", "mxfp4"
    )
    for name, what in (("bf16_weights", "bfloat16"), ("fixed16_weights", "16-bit fixed-point")):
        if {name, f"{name}_stochastic", SLOW_BASELINE} <= results.keys():
            kept = {n: _progress(results, n) for n in (name, f"{name}_stochastic")}
            measured = " and ".join(f"{100 * share:.0f} %" for share in kept.values())
            statement = (
                f"At a small rate {what} weights rounded to nearest make less than 90 % of float32's progress, "
                "rounded at random more than 95 %."
            )
            holds = kept[name] < 0.9 and kept[f"{name}_stochastic"] > 0.95
            found.append(Claim(statement, None, measured, holds))
    statement = "Training for W4A8 beats rounding a float32 model to it afterwards."
    _compare(found, results, statement, "qat_w4a8", POST_TRAINING)
    return found


def _compare(found: list[Claim], results: Mapping[str, Result], statement: str, better: str, worse: str) -> None:
    if better in results and worse in results:
        a, b = results[better].loss, results[worse].loss
        found.append(Claim(statement, None, f"loss {a:.4f} and {b:.4f}", a < b))


def _progress(results: Mapping[str, Result], name: str) -> float:
    """How much of float32's way from the loss of the first step, at the same small rate."""
    start = results[SLOW_BASELINE].history[0]
    return (start - results[name].loss) / (start - results[SLOW_BASELINE].loss)


def _listed(tuning: Mapping[float, float]) -> str:
    return ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in tuning.items())


if __name__ == "__main__":
    runner.main(__name__)
