"""The runs of `experiments.optimization.infinite_compute`: searches, members, ensembles, budgets, students."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import bases
from jaxlm.core.errors import ConfigError
from jaxlm.optim.config import OptimizerConfig

if TYPE_CHECKING:
    from experiments.optimization.infinite_compute import Config

# Cosine to zero; what the paper leaves open is that of this library. `jaxlm.optim.adamw` decays tables and kernels.
OPTIMIZER = OptimizerConfig(warmup=0.05, decay=0.95, decay_shape="cosine", end_fraction=0.0, b2=0.95, clip_norm=1.0)
SWEPT = ("learning_rate", "weight_decay")

Point = Mapping[str, float]


class Tuned(NamedTuple):
    """A recipe tuned for one size. `point`: epochs, learning rate, weight decay. `trials`: losses on the tuning and the
    judging text of every point tried, with the seed of tuning. `edges`: coordinates whose best value is the least or
    the greatest. `certificate`: neighbors and how much worse they are; empty where a whole grid was tried."""

    point: Point
    trials: Sequence[tuple[Point, float, float]]
    edges: Sequence[str]
    certified: bool
    certificate: Sequence[tuple[Point, float]] = ()


class Results(NamedTuple):
    """Losses in nats a token of the judging text; sizes in the order of the configuration.

    `params`: of each size. `standard` and `regularized`: the tuned recipes. `single`: by both names and size, a loss a
    seed. `ensembles`: of each size, by number of members (mean over orders), of regularized models. `probabilities`:
    as the last of these, at `config.at`, with probabilities averaged. `overfit`: as `ensembles`, at `config.at`, of
    members trained twice as long with half the decay. `budgets`: `(tokens, loss)` of the standard recipe at
    `config.at`. `students`: by teacher, `ensemble` and `single`, a loss a seed. `tokens`: of the corpus.
    """

    params: Sequence[int]
    standard: Sequence[Tuned]
    regularized: Sequence[Tuned]
    single: Mapping[tuple[str, int], Sequence[float]]
    ensembles: Sequence[Sequence[float]]
    probabilities: float
    overfit: Sequence[float]
    budgets: Sequence[tuple[float, float]]
    students: Mapping[str, Sequence[float]]
    tokens: int


def train(config: "Config", folder: Path) -> Results:
    """Every run; what is finished in `folder` is not repeated."""
    from jaxlm.core import trees

    lab = Lab(config, folder)
    at, seeds = config.at, config.seeds
    sizes = range(len(config.models()))
    standard = [lab.tune_standard(i) for i in sizes]
    regularized: list[Tuned] = []
    for i in sizes:
        regularized.append(lab.tune(i, regularized[-1].point if regularized else config.start()))
    members = [lab.members(i, regularized[i].point, seeds) for i in sizes]
    single: dict[tuple[str, int], Sequence[float]] = {}
    for i in sizes:
        single["regularized", i] = [o.results["judge"] for o in members[i]]
        chosen = lab.members(i, standard[i].point, config.standard_seeds)
        single["standard", i] = [o.results["judge"] for o in chosen]
    ensembles = [lab.ensemble(i, members[i]) for i in sizes]
    longer = dict(regularized[at].point)
    longer |= {"epochs": 2 * longer["epochs"], "weight_decay": longer["weight_decay"] / 2}
    overfit = lab.ensemble(at, lab.members(at, longer, seeds))
    budgets = [lab.budget(share, standard[at].point) for share in config.budgets]
    whole = statistics.fmean(single["standard", at])
    budgets = sorted([*budgets, (float(lab.tokens(1.0)), whole)])
    rate = standard[at].point["learning_rate"]
    students = {
        name: lab.students(name, [o.params for o in teachers], rate)
        for name, teachers in (("ensemble", members[at]), ("single", members[at][:1]))
    }
    return Results(
        [trees.count(lab.model(i).abstract_params()) for i in sizes],
        standard,
        regularized,
        single,
        ensembles,
        lab.ensemble(at, members[at], "probabilities")[-1],
        overfit,
        budgets,
        students,
        lab.tokens(1.0),
    )


class Lab:
    """Trains members of one size together, on the corpus, parts of it, or mixtures with what a teacher wrote.

    Rows of all budgets are nested: a larger one adds to a smaller one."""

    def __init__(self, config: "Config", folder: Path):
        self.config, self.folder = config, folder
        self._text, self.start_id = _load(config)
        self._parts: dict[Any, Any] = {}

    def model(self, size: int) -> Any:
        from jaxlm.models import Decoder

        return self._memo(("model", size), lambda: Decoder(self.config.models()[size][1]))

    def tokens(self, share: float) -> int:
        """In a budget."""
        return self.config.rows_of(share) * self.config.data.sequence_length

    def corpus(self, share: float) -> Any:
        """The rows of a budget."""
        from jaxlm.data.resident import ResidentRows

        def make() -> Any:
            return ResidentRows(self._text["train"].take(slice(0, self.config.rows_of(share))))

        return self._memo(("corpus", share), make)

    def tune_standard(self, size: int) -> Tuned:
        """Epochs and learning rate with the usual weight decay: the whole grid."""
        from jaxlm.training import grid

        c = self.config
        axes = {"epochs": c.epochs, "learning_rate": c.rates, "weight_decay": (c.standard_decay,)}
        results = self._sweep(size).run(grid(axes))
        best = results.best().point
        edges = [n for n, values in axes.items() if len(values) > 1 and best[n] in (values[0], values[-1])]
        return Tuned(dict(best), _trials(results), edges, True)

    def tune(self, size: int, start: Point) -> Tuned:
        """Weight decay too, from a start to where no neighbor is better."""
        from jaxlm.training import coordinate_search

        c = self.config
        axes = {"epochs": c.epochs, "learning_rate": c.rates, "weight_decay": c.decays}
        found = coordinate_search(self._sweep(size), axes, start)
        worse = [(dict(point), value - found.value) for point, value in found.certificate]
        return Tuned(dict(found.best), _trials(found.results), found.edges, found.certified, worse)

    def members(self, size: int, point: Point, seeds: Sequence[int]) -> list[Any]:
        """Models that differ in initialization and in the order of data, with their parameters."""
        steps = self._steps(1.0, point["epochs"])
        population = self._population(("corpus", 1.0), size, steps, self._corpus_sample(1.0))
        return self._train(population, f"members {self.config.models()[size][0]} {steps}", point, seeds)

    def ensemble(self, size: int, outcomes: Sequence[Any], combine: str = "logits") -> list[float]:
        """The loss by number of members; each number's is the mean over as many orders as there are members."""
        import jax
        import jax.numpy as jnp

        from jaxlm.evals import growing_ensemble_loss
        from jaxlm.models import stack_members

        rows = self._text["judge"]
        evaluate = self._memo(
            ("ensemble", size, combine),
            lambda: jax.jit(growing_ensemble_loss(self.model(size), rows, self._judge_batch(rows), combine)),
        )
        stacked, count = stack_members([o.params for o in outcomes]), len(outcomes)
        orders = [jax.tree.map(lambda x, r=r: jnp.roll(x, r, axis=0), stacked) for r in range(count)]
        found = [jax.device_get(evaluate(order)).tolist() for order in orders]
        return [statistics.fmean(losses) for losses in zip(*found)]

    def budget(self, share: float, point: Point) -> tuple[float, float]:
        """Tokens and loss of the standard recipe with more or less text: epochs tuned anew, the rate kept."""
        c, at = self.config, self.config.at

        def train(epochs: int, seeds: Sequence[int]) -> list[Any]:
            steps = self._steps(share, epochs)
            population = self._population(("corpus", share), at, steps, self._corpus_sample(share))
            return self._train(population, f"budget {share:g} {steps}", point, seeds)

        tuned = {epochs: train(epochs, [c.tuning_seed])[0].results["tuning"] for epochs in c.epochs}
        finite = {epochs: loss for epochs, loss in tuned.items() if math.isfinite(loss)}
        if not finite:
            raise ConfigError(f"every run on {share:g} of the corpus diverges at the rate {point['learning_rate']:g}")
        judged = train(min(finite, key=finite.__getitem__), c.standard_seeds)
        return float(self.tokens(share)), statistics.fmean(o.results["judge"] for o in judged)

    def students(self, name: str, teachers: Sequence[Any], rate: float) -> list[float]:
        """The losses of fresh models of a mixture of the corpus and of what the teachers, as one, wrote."""
        from jaxlm.data.resident import mix_rows
        from jaxlm.decoding import DecoderStepper, StackedStepper, sample_rows
        from jaxlm.models import stack_members

        c, at = self.config, self.config.at
        synthetic = sample_rows(
            StackedStepper(DecoderStepper(self.model(at))),
            stack_members(teachers),
            c.teacher_rows,
            c.data.sequence_length,
            start_id=self.start_id,
            seed=c.tuning_seed,
            batch_size=min(c.teacher_rows, c.teacher_batch),
            folder=self.folder / f"teacher {name}",
        )
        real = c.real_rows
        sample = mix_rows([self.corpus(1.0), synthetic], (real, c.batch_size - real))
        steps = c.student_epochs * (self.corpus(1.0).count // real)
        population = self._population(("student", name), at, steps, sample)
        point = {"learning_rate": rate, "weight_decay": c.standard_decay}
        return [o.results["judge"] for o in self._train(population, f"student {name}", point, c.standard_seeds)]

    def _sweep(self, size: int) -> Any:
        from jaxlm.training import Sweep

        def make(point: Point) -> Any:
            steps = self._steps(1.0, point["epochs"])
            return self._population(("corpus", 1.0), size, steps, self._corpus_sample(1.0))

        c = self.config
        folder = self.folder / f"tuning {c.models()[size][0]}"
        return Sweep(make, SWEPT, metric="tuning", seeds=(c.tuning_seed,), folder=folder, report=bases.say)

    def _train(self, population: Any, where: str, point: Point, seeds: Sequence[int]) -> list[Any]:
        from jaxlm.training import Member

        hparams = {name: float(point[name]) for name in SWEPT}
        label = " ".join(f"{value:g}" for value in hparams.values())
        members = [Member(f"{where} {label} seed {seed}", seed, hparams) for seed in seeds]
        found = population.train(members, folder=self.folder / where, keep_params=True, report=bases.say)
        for outcome in found:
            if not math.isfinite(outcome.results["judge"]):
                raise ConfigError(f"'{outcome.member.name}' diverges, though its recipe did not with another seed")
        return found

    def _population(self, text: Any, size: int, steps: int, sample: Callable) -> Any:
        return self._memo((text, size, steps), lambda: self._make(size, steps, sample))

    def _make(self, size: int, steps: int, sample: Callable) -> Any:
        from jaxlm.evals import resident_loss
        from jaxlm.objectives import CausalLM
        from jaxlm.training import Population, init_state, make_step

        c, model = self.config, self.model(size)
        objective = CausalLM(model)
        tx = OPTIMIZER.make(steps, model.axes(), sweep=SWEPT)
        losses = {
            name: resident_loss(objective, self._text[name], self._judge_batch(self._text[name]))
            for name in ("tuning", "judge")
        }
        return Population(
            init=lambda key, hparams: init_state(model.init(key)["params"], tx, key, hparams=hparams),
            step=make_step(objective, tx),
            sample=sample,
            num_steps=steps,
            evaluate=lambda params: {name: loss(params) for name, loss in losses.items()},
            how=c.how,
            tokens_per_step=c.batch_size * c.data.sequence_length,
        )

    def _corpus_sample(self, share: float) -> Callable:
        rows = self.corpus(share)
        return lambda key, step: rows.sample(key, step, self.config.batch_size)

    def _steps(self, share: float, epochs: float) -> int:
        return int(epochs) * (self.config.rows_of(share) // self.config.batch_size)

    def _judge_batch(self, rows: Any) -> int:
        return min(self.config.judge_batch, rows.count)

    def _memo(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._parts:
            self._parts[key] = make()
        return self._parts[key]


def _load(config: "Config") -> tuple[dict[str, Any], int]:
    """Rows to train on, in an order of which the first are a sample of all, to tune by and to judge by; the start."""
    import numpy as np

    from jaxlm.data.prepare import prepare_data
    from jaxlm.data.resident import ResidentRows, from_start, resident_rows

    prepared = prepare_data(config.data)
    tokenizer, length = prepared.tokenizer, config.data.sequence_length
    vocab_size = config.models()[0][1].vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids but the models {vocab_size}")
    start_id = tokenizer.special_ids.get("bos")
    if start_id is None:
        raise ConfigError("the tokenizer has no 'bos', which rows begin with so that a teacher can write some")

    def rows(store: Any, count: int) -> Any:
        # Some hold several documents and are left out.
        found = resident_rows(store, length, max_rows=2 * count, columns=("inputs", "segment_ids"), spread=True)
        found = from_start(found, start_id)
        return found.spread(min(count, found.count) if store is prepared.validation else count)

    most = max(config.rows_of(share) for share in (*config.budgets, 1.0))
    train = rows(prepared.train, most)
    order = np.random.default_rng(config.tuning_seed).permutation(train.count)
    tuning, judge = rows(prepared.validation, 2 * config.judge_rows).cut(0.5, 0.5)
    return {"train": ResidentRows(train.take(order)), "tuning": tuning, "judge": judge}, start_id


def _trials(results: Any) -> list[tuple[Point, float, float]]:
    """Every point with its losses on both texts, infinite for a run that diverged."""

    def loss(trial: Any, name: str) -> float:
        (value,) = trial.values(name)
        return value if math.isfinite(value) else math.inf

    return [(dict(t.point), loss(t, "tuning"), loss(t, "judge")) for t in results.trials]
