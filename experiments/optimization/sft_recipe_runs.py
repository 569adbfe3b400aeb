"""The runs of `experiments.optimization.sft_recipe`: a base, a grid of fine-tunings, their schedules, and phases."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.bases import say
from jaxlm.core.errors import ConfigError
from jaxlm.data.synthetic.skills import KINDS, Example, World, as_record, draw_examples, text_pairs

if TYPE_CHECKING:
    from experiments.optimization.sft_recipe import Config

CONSTANT, COSINE = 1.0, 0.0
"""Rates at the end as shares of the peak, which tell the schedules apart."""


class Setting(NamedTuple):
    """What is varied of a fine-tuning run. `warmup` is a share of its steps."""

    batch_size: int
    rate: float
    warmup: float = 0.0
    end_fraction: float = CONSTANT


class Scores(NamedTuple):
    """Exact matches by kind: on held-out instructions to tune by, on others to judge by, and on the plain form."""

    tuning: Mapping[str, float]
    judge: Mapping[str, float]
    plain: Mapping[str, float]

    @property
    def quality(self) -> float:
        """Mean over the kinds that are judged."""
        return statistics.fmean(self.judge.values())


class Run(NamedTuple):
    """A finished run: its scores, and gradient norm (before clipping) and loss of each step."""

    setting: Setting
    seed: int
    scores: Scores
    grad_norms: np.ndarray
    losses: np.ndarray


class PhaseRun(NamedTuple):
    """A finished run in phases, or stacked: at `samples` seen, `courses` is the mean exact match on what is tuned by.
    `marks`: the samples at which the best checkpoints were."""

    seed: int
    scores: Scores
    samples: tuple[int, ...]
    course: tuple[float, ...]
    marks: tuple[int, ...]


class Results(NamedTuple):
    """`tuned`: mean exact match on what is tuned by, for each batch size, and rate. `grid`: runs of the judged seeds at
    all of these rates. `schedules`: at the batch size and rate of the comparisons. `phased_tuned`: as `tuned`."""

    before: Scores
    tuned: Mapping[int, Mapping[float, float]]
    grid: Sequence[Run]
    schedules: Sequence[Run]
    phased_tuned: Mapping[float, float]
    phased: Sequence[PhaseRun]
    stacked: Sequence[PhaseRun]


def train(config: "Config", folder: Path) -> Results:
    """Every run; what is finished in `folder` is not repeated."""
    lab = Lab(config, folder)
    tuned = {
        size: tune(config, lambda rates, size=size: lab.try_rates(size, rates)) for size in config.batch_sizes
    }
    grid = lab.grid([Setting(size, rate) for size, found in tuned.items() for rate in found], config.seeds)
    rate = best_rate(tuned[config.compare_batch])
    settings = [
        Setting(config.compare_batch, rate, warmup, end) for warmup in config.warmups for end in (CONSTANT, COSINE)
    ]
    schedules = lab.grid(settings, config.seeds)
    phased_tuned = tune(config, lab.try_phased)
    return Results(
        before=lab.judge(lab.base),
        tuned=tuned,
        grid=grid,
        schedules=schedules,
        phased_tuned=phased_tuned,
        phased=[lab.in_phases("phased", lab.phases, best_rate(phased_tuned), seed) for seed in config.seeds],
        stacked=[lab.in_phases("stacked", [lab.stacked], rate, seed) for seed in config.seeds],
    )


def tune(config: "Config", attempt: Any) -> dict[float, float]:
    """The score of each rate, with more rates beyond the best while that is the least or the greatest."""
    tuned: dict[float, float] = {}
    untried = list(config.rates)
    while untried:
        tuned |= attempt(untried)
        if not any(map(math.isfinite, tuned.values())):
            raise ConfigError(f"every run diverges at the rates {sorted(tuned)}: try smaller ones")
        tried, best = sorted(tuned), best_rate(tuned)
        untried = []
        if len(tried) > 1 and len(tried) < len(config.rates) + config.more_rates and best in (tried[0], tried[-1]):
            next_to = tried[1] if best == tried[0] else tried[-2]
            untried = [float(f"{best * best / next_to:.2g}")]
    return dict(sorted(tuned.items()))


def best_rate(tuned: Mapping[float, float]) -> float:
    """The rate with the highest score; the least of equals."""
    return max(sorted(tuned), key=lambda rate: tuned[rate] if math.isfinite(tuned[rate]) else -math.inf)


class Lab:
    """The base, the data and the compiled programs, which all runs share."""

    def __init__(self, config: "Config", folder: Path):
        import jax

        from jaxlm.data.resident import join_rows
        from jaxlm.evals import resident_matches
        from jaxlm.models import Decoder

        self.config, self.folder = config, folder
        self._load()
        self.model = Decoder(self.model_config)
        data = draw_data(config)
        self.rows = {kind: self._chat_rows(data.train[kind]) for kind in KINDS}
        held_out = [
            *(self._chat_rows(part[kind]) for part in (data.tuning, data.judge) for kind in KINDS),
            *(self._text_rows(data.plain[kind], answers_only=True) for kind in KINDS),
        ]
        self._tuning = resident_matches(self.model, join_rows(held_out[: len(KINDS)]), config.held_out)
        self._all = resident_matches(self.model, join_rows(held_out), config.held_out)
        self._scores = jax.jit(self.evaluate)
        if self.base is None:
            self.base = self._train_base(data.base)

    def judge(self, params: Any) -> Scores:
        """The scores of parameters."""
        return to_scores({name: float(x) for name, x in self._scores(params).items()})

    def evaluate(self, params: Any) -> dict[str, Any]:
        """All scores, and `error`: one less the mean of those to tune by. Traceable."""
        found = self._all(params).reshape(3, len(KINDS), -1).mean(-1)
        scores = {f"{part} {k}": found[i, j] for i, part in enumerate(Scores._fields) for j, k in enumerate(KINDS)}
        return {"error": 1.0 - found[0].mean(), **scores}

    def evaluate_tuning(self, params: Any) -> dict[str, Any]:
        """The scores to tune by, and their `mean`. Traceable."""
        found = self._tuning(params).reshape(len(KINDS), -1).mean(-1)
        return {**dict(zip(KINDS, found)), "mean": found.mean()}

    def try_rates(self, batch_size: int, rates: Sequence[float]) -> dict[float, float]:
        """The scores to tune by, of the tuning seed's run at each rate."""
        runs = self.grid([Setting(batch_size, rate) for rate in rates], (self.config.tuning_seed,))
        return {run.setting.rate: statistics.fmean(run.scores.tuning.values()) for run in runs}

    def try_phased(self, rates: Sequence[float]) -> dict[float, float]:
        """The same of runs in phases."""
        runs = {rate: self.in_phases("phased", self.phases, rate, self.config.tuning_seed) for rate in rates}
        return {rate: statistics.fmean(run.scores.tuning.values()) for rate, run in runs.items()}

    def grid(self, settings: Sequence[Setting], seeds: Sequence[int]) -> list[Run]:
        """A run of each setting and seed, all of equal samples."""
        from jaxlm.training import Sweep

        config = self.config
        sweep = Sweep(
            lambda point: self.population(int(point["batch_size"])),
            ("rate", "warmup", "end_fraction", "steps"),
            metric="error",
            seeds=tuple(seeds),
            folder=self.folder / "grid",
            budget=config.samples * config.length,
            start=self.base,
            report=say,
        )
        points = [{**s._asdict(), "steps": float(config.samples // s.batch_size)} for s in settings]
        return [
            Run(setting, outcome.member.seed, to_scores(outcome.results), *_signals(outcome))
            for setting, trial in zip(settings, sweep.run(points).trials)
            for outcome in trial.outcomes
        ]

    @functools.cache  # noqa: B019 (a lab lives as long as its run)
    def population(self, batch_size: int) -> Any:
        """Fine-tuning of all kinds at once in batches of a size."""
        from jaxlm.data.resident import join_rows
        from jaxlm.training import Population, init_state

        rows = join_rows(list(self.rows.values()))
        step, tx = self.recipe(batch_size)
        return Population(
            init=lambda key, hparams, start: init_state(start, tx, key, hparams=hparams),
            step=step,
            sample=lambda key, step: rows.sample(key, step, batch_size),
            num_steps=self.config.samples // batch_size,
            evaluate=self.evaluate,
            how=self._how,
            tokens_per_step=batch_size * self.config.length,
        )

    @functools.cache  # noqa: B019
    def recipe(self, batch_size: int) -> tuple[Any, Any]:
        """`make_recipe`, once for each batch size."""
        return make_recipe(self.config, self.model, batch_size)

    @functools.cached_property
    def phases(self) -> list[Any]:
        """A phase for each kind, with equal shares of the samples."""
        from jaxlm.training import Phase

        config = self.config
        step, tx = self.recipe(config.compare_batch)
        return [
            Phase(
                kind,
                step,
                tx,
                self.rows[kind],
                samples=config.samples // len(KINDS),
                batch_size=config.compare_batch,
                evaluate=self._tuning_function,
                evaluate_every=config.evaluate_every,
                metric=kind,
                how=self._how,
            )
            for kind in KINDS
        ]

    @functools.cached_property
    def stacked(self) -> Any:
        from jaxlm.training import stack_phases

        return stack_phases(self.phases, metric="mean")

    def in_phases(self, name: str, phases: Sequence[Any], rate: float, seed: int) -> PhaseRun:
        """A run in these phases with a constant rate and no warm-up."""
        from jaxlm.training import Member, run_phased

        hparams = {"rate": rate, "warmup": 0.0, "end_fraction": CONSTANT}
        member = Member(f"{name} {rate:g} seed {seed}", seed, hparams)
        course = run_phased(phases, member, self.base, folder=self.folder / "phases", report=_say_done)
        marks = tuple(course.samples[i] for i in course.best)
        return PhaseRun(
            seed, self.judge(course.params), course.samples, tuple(course.evaluations["mean"].tolist()), marks
        )

    @functools.cached_property
    def _tuning_function(self) -> Any:
        return self.evaluate_tuning  # one object, so that phases can be stacked

    @property
    def _how(self) -> str:
        return "loop" if self.config.base else "auto"  # large models are trained one at a time

    def _load(self) -> None:
        from jaxlm.data.chat import Plain
        from jaxlm.data.tokenizers import ByteTokenizer

        config = self.config
        self.base: Any = None
        if not config.base:
            self.model_config, self.tokenizer, self.template = config.model, ByteTokenizer(), Plain()
            if self.tokenizer.vocab_size > config.model.vocab_size:
                raise ConfigError(f"model.vocab_size is {config.model.vocab_size}, expected 259 or more, for bytes")
            return
        from jaxlm.data.chat_jinja import model_template
        from jaxlm.interop.load import load

        found = load(config.base)
        if found.tokenizer is None:
            raise ConfigError(f"{config.base} comes without a tokenizer")
        self.model_config, self.tokenizer, self.base = found.config, found.tokenizer, found.params
        self.template = model_template("auto", found.chat_template)

    def _chat_rows(self, examples: Sequence[Example]) -> Any:
        from jaxlm.data.chat_examples import chat_examples
        from jaxlm.data.resident import resident_examples

        length = self.config.length
        found, counts = chat_examples(map(as_record, examples), self.tokenizer, self.template, length=length)
        if counts.dropped:
            raise ConfigError(f"length is {length}, but examples have up to {counts.longest} pairs of tokens")
        return resident_examples(found, length)

    def _text_rows(self, examples: Sequence[Example], *, answers_only: bool = False, pack: bool = False) -> Any:
        from jaxlm.data.resident import resident_examples

        pairs = [text_pairs(example, self.tokenizer, answers_only=answers_only) for example in examples]
        return resident_examples(pairs, self.config.length, pack=pack)

    def _train_base(self, texts: Sequence[Example]) -> Any:
        """Parameters trained on plain forms."""
        from jaxlm.objectives import CausalLM
        from jaxlm.optim import adamw, rewarm
        from jaxlm.training import Member, Population, init_state, make_step

        config = self.config
        rows = self._text_rows(texts, pack=True)
        schedule = rewarm(config.base_rate, config.base_steps, max(1, config.base_steps // 20))
        tx = adamw(schedule, axes=self.model.axes(), b2=config.b2, weight_decay=0.1, clip_norm=1.0)
        population = Population(
            init=lambda key, hparams: init_state(self.model.init(key)["params"], tx, key, hparams=hparams),
            step=make_step(CausalLM(self.model), tx),
            sample=lambda key, step: rows.sample(key, step, config.base_batch),
            num_steps=config.base_steps,
        )
        member = Member("base", config.base_seed)
        (outcome,) = population.train([member], folder=self.folder / "base", keep_params=True, report=_say_done)
        return outcome.params


def make_recipe(config: "Config", model: Any, batch_size: int) -> tuple[Any, Any]:
    """The step and the optimizer of a batch size. The schedule is in `hparams`: `rate` at its peak, `steps`, and
    `warmup` and `end_fraction` as in `Setting`."""
    import jax.numpy as jnp

    from jaxlm.objectives import CausalLM
    from jaxlm.optim import ScheduleFromHparams, adamw, rewarm
    from jaxlm.training import accumulate, make_step

    def schedule(h: Mapping[str, Any]) -> Any:
        return rewarm(h["rate"], h["steps"], jnp.ceil(h["warmup"] * h["steps"]), end_fraction=h["end_fraction"])

    rate = ScheduleFromHparams(schedule)
    tx = adamw(rate, axes=model.axes(), b2=config.b2, weight_decay=0.0, clip_norm=1.0)
    gradients = functools.partial(accumulate, micro_batches=max(1, batch_size // config.micro_batch))
    return make_step(CausalLM(model), tx, gradients=gradients), tx


class Data(NamedTuple):
    """Examples by kind: to fine-tune on, held out to tune and to judge by, to test what the base knew; and what the
    base is trained on."""

    train: Mapping[str, list[Example]]
    tuning: Mapping[str, list[Example]]
    judge: Mapping[str, list[Example]]
    plain: Mapping[str, list[Example]]
    base: list[Example]


def draw_data(config: "Config") -> Data:
    """All examples, each kind apart. The base has facts of another world, and is tested on those it has seen."""
    new, old = World(config.persons, seed=1), World(config.persons, seed=2)
    train, tuning, judge, plain, base = {}, {}, {}, {}, []
    n = config.held_out
    for kind in KINDS:
        train[kind] = draw_examples(kind, config.examples, seed=1, world=new)
        held_out = draw_examples(kind, 2 * n, seed=2, exclude=train[kind], world=new)
        tuning[kind], judge[kind] = held_out[:n], held_out[n:]
        plain[kind] = draw_examples(kind, n, seed=3, exclude=[*train[kind], *held_out], world=old)
        if config.base:
            continue
        # A fact has one plain form and many questions: some two dozen for a person repeat each fact six times.
        count = min(config.base_examples, 24 * config.persons) if kind == "facts" else config.base_examples
        known = [] if kind == "facts" else [*train[kind], *held_out, *plain[kind]]
        base += draw_examples(kind, count, seed=4, exclude=known, world=old)
    return Data(train, tuning, judge, plain, base)


def to_scores(results: Mapping[str, float]) -> Scores:
    """The scores among the results of `Lab.evaluate`."""
    return Scores(*({kind: results[f"{part} {kind}"] for kind in KINDS} for part in Scores._fields))


def _signals(outcome: Any) -> tuple[np.ndarray, np.ndarray]:
    return outcome.history["grad_norm"], outcome.history["loss"]


def _say_done(outcome: Any) -> None:
    print(f"{outcome.member.name}: done ({outcome.seconds:.0f} s)", flush=True)
