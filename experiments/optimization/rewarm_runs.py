"""The runs of `experiments.optimization.rewarm`: upstream in parts, then every continuation of the grid."""

import functools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import bases
from jaxlm.core.errors import ConfigError

if TYPE_CHECKING:
    from experiments.optimization.rewarm import Config

LEGS = 4
"""Parts of the upstream run; the states between them are the earlier checkpoints."""
WARMUP = 0.01
"""Share of the steps that warm up, wherever warm-ups are not compared."""

CONSTANT, SAME, SAME_CONSTANT, KEPT = "constant", "same data, re-warmed", "same data, constant", "moments kept"


class Course(NamedTuple):
    """What became of one kind of run: held-out losses a seed each, and the mean course of both losses."""

    tuning: tuple[float, ...]
    upstream: tuple[float, ...]
    downstream: tuple[float, ...]
    tracked: Mapping[str, tuple[float, ...]]

    @property
    def loss(self) -> dict[str, float]:
        """Means over seeds, by stream."""
        return {"upstream": statistics.fmean(self.upstream), "downstream": statistics.fmean(self.downstream)}


class Results(NamedTuple):
    """`courses`: by name, as `plan_continuations` names them. `tokens`: at which `tracked` was measured."""

    peak: float
    tuned: Mapping[float, float]
    courses: Mapping[str, Course]
    tokens: tuple[int, ...]


class Kind(NamedTuple):
    """One kind of continuation: where it starts (`LEGS`: at the end of upstream; None: from scratch), on which data,
    whether with the old moments, and the numbers of its schedule."""

    start: int | None
    stream: str
    keep: bool
    hparams: Mapping[str, float]


def train(config: "Config", folder: Path) -> Results:
    """Every run; what is finished in `folder` is not repeated."""
    import jax
    import numpy as np

    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.optim import ScheduleFromHparams, adamw, rewarm
    from jaxlm.training import Member, Population, continue_state, init_state, make_step

    streams = {name: _load(config, name) for name in ("upstream", "downstream")}
    model = Decoder(config.model)
    objective = CausalLM(model)

    def optimizer(steps: int) -> Any:
        rate = ScheduleFromHparams(
            lambda h: rewarm(h["peak"], steps, h["warmup_steps"], end_fraction=h["end_fraction"])
        )
        axes = model.axes()
        return adamw(rate, axes=axes, b2=config.b2, weight_decay=config.weight_decay, clip_norm=1.0)

    def losses(part: str) -> Any:
        functions = {n: resident_loss(objective, getattr(s, part), config.batch_size) for n, s in streams.items()}
        return lambda params: {f"{part} {name}": f(params) for name, f in functions.items()}

    tuning, judge, tracked = (losses(part) for part in ("tuning", "judge", "tracked"))

    def population(tx: Any, stream: str, steps: int, keep: bool, restart: bool, **more: Any) -> Population:
        def init(key: Any, hparams: Any, start: Any) -> Any:
            return continue_state(start, tx, keep_optimizer=keep, restart=restart, hparams=hparams, key=key)

        def sample(key: Any, step: Any) -> Any:
            return streams[stream].train.sample(key, step, config.batch_size)

        return Population(
            init, make_step(objective, tx), sample, steps, lambda p: tuning(p) | judge(p), **more
        )  # fmt: skip

    before = optimizer(config.upstream_steps)
    leg = population(before, "upstream", config.upstream_steps // LEGS, keep=True, restart=False)
    warmup = round(WARMUP * config.upstream_steps)

    @functools.partial(jax.jit, static_argnums=0)
    def init(tx: Any, key: Any, hparams: Mapping[str, Any]) -> Any:
        return init_state(model.init(key)["params"], tx, key, hparams=hparams)

    def fresh(tx: Any, seed: int, hparams: Mapping[str, float]) -> Any:
        return init(tx, jax.random.key(seed), hparams)

    def upstream(peak: float, seed: int) -> tuple[list[Any], float]:
        hparams = {"peak": peak, "warmup_steps": warmup, "end_fraction": config.end_fraction}
        states = [fresh(before, seed, hparams)]
        for i in range(LEGS):
            member = Member(f"upstream {peak:g} {seed} part {i + 1}", seed, hparams)
            (outcome,) = leg.train([member], start=states[-1], folder=folder, keep_state=True, report=bases.say)
            states.append(outcome.state)
        return states, outcome.results["tuning upstream"]

    tuned = {peak: upstream(peak, config.tuning_seed)[1] for peak in config.upstream_rates}
    finite = {peak: loss for peak, loss in tuned.items() if math.isfinite(loss)}
    if not finite:
        raise ConfigError(f"the upstream run diverges at each of the rates {config.upstream_rates}: try smaller ones")
    peak = min(finite, key=finite.__getitem__)

    after = optimizer(config.steps)
    every = math.gcd(config.steps, config.track_every)
    kinds = {
        (stream, keep): population(after, stream, config.steps, keep, True, track=tracked, track_every=every)
        for stream, keep in (("downstream", False), ("downstream", True), ("upstream", False))
    }
    plan, outcomes = plan_continuations(config, peak), {}
    for seed in config.seeds:
        states, _ = upstream(peak, seed)
        for name, kind in plan.items():
            start = fresh(after, seed, kind.hparams) if kind.start is None else states[kind.start]
            member = Member(f"{name} {seed}", seed, kind.hparams)
            (outcome,) = kinds[kind.stream, kind.keep].train([member], start=start, folder=folder, report=bases.say)
            outcomes.setdefault(name, []).append(outcome)

    def course(found: list[Any]) -> Course:
        def column(name: str) -> tuple[float, ...]:
            return tuple(o.results[name] for o in found)

        followed = {
            stream: tuple(np.mean([o.tracked[f"tracked {stream}"] for o in found], axis=0).tolist())
            for stream in streams
        }
        return Course(column("tuning downstream"), column("judge upstream"), column("judge downstream"), followed)

    tokens = config.batch_size * config.downstream.sequence_length
    at = tuple(range(0, config.steps * tokens + 1, every * tokens))
    return Results(peak, tuned, {name: course(found) for name, found in outcomes.items()}, at)


def plan_continuations(config: "Config", peak: float) -> dict[str, Kind]:
    def numbers(share: float = 1.0, warmup: float = WARMUP, end: float = config.end_fraction) -> dict[str, float]:
        return {"peak": share * peak, "warmup_steps": round(warmup * config.steps), "end_fraction": end}

    constant = numbers(config.end_fraction, 0.0, 1.0)
    plan = {CONSTANT: Kind(LEGS, "downstream", False, constant)}
    plan |= {peak_name(p): Kind(LEGS, "downstream", False, numbers(p)) for p in config.peaks}
    plan |= {scratch_name(p): Kind(None, "downstream", False, numbers(p)) for p in config.peaks}
    for warmup in config.warmups:
        plan[warmup_name(warmup)] = Kind(LEGS, "downstream", False, numbers(warmup=warmup))
    for leg in range(LEGS // 2, LEGS):
        plan[start_name(leg)] = Kind(leg, "downstream", False, numbers())
    plan[KEPT] = Kind(LEGS, "downstream", True, numbers())
    plan[SAME] = Kind(LEGS, "upstream", False, numbers())
    plan[SAME_CONSTANT] = Kind(LEGS, "upstream", False, constant)
    return plan


def peak_name(share: float) -> str:
    return f"peak {share:g}"


def warmup_name(share: float) -> str:
    return peak_name(1.0) if share == WARMUP else f"warm-up {100 * share:g} %"


def scratch_name(share: float) -> str:
    return f"scratch, peak {share:g}"


def start_name(leg: int) -> str:
    return f"start at {leg}/{LEGS}"


class Stream(NamedTuple):
    """Rows of one text: to train on, to tune by, to judge by, and those of the latter that runs are followed on."""

    train: Any
    tuning: Any
    judge: Any
    tracked: Any


def _load(config: "Config", name: str) -> Stream:
    most = config.batch_size * (config.upstream_steps + config.steps)
    text = bases.read_text(getattr(config, name), config.model.vocab_size, most, config.judge_rows)
    tracked = text.judge.cut(min(1.0, config.track_rows / text.judge.count))[0]
    return Stream(text.train, text.tuning, text.judge, tracked)
