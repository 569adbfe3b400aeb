"""Rank of the initial weights decides how richly a network learns: low rank changes much, high rank little.

Liu, Baratin, Cornford, Mihalas, Shea-Brown and Lajoie, "How connectivity structure shapes rich and lazy learning in
neural circuits", ICLR 2024, arXiv 2310.08513. At equal Frobenius norm, recurrent networks that start with low-rank
weights move further in weights, representations and tangent kernel (rich) than those of high rank (lazy). In a
two-layer linear network it is a theorem, in expectation over tasks; low-rank weights aligned with the task stay lazy.

    python -m experiments.optimization.rich_lazy_rank                    # small
    python -m experiments.optimization.rich_lazy_rank --preset llama     # a small Llama as well
    python -m experiments.optimization.rich_lazy_rank --preset paper     # 300 units, three tasks, 10,000 iterations

Three testbeds: linear networks trained to zero loss; recurrent networks on cognitive tasks, each stopped at the same
loss; and, beyond the paper, a small Llama whose kernels start at low rank. Settings and the loss to stop at were chosen
with seed 0, which is not judged.

Expect of `small` (two x86 cores, about 3 minutes; its kept result reused finished networks, so its seconds are less):
at equal Frobenius norm kernel alignment rises with rank in linear networks of norm 1 (0.14 to 0.71) and on all tasks
(0.36 to 0.50, 0.32 to 0.53, 0.18 to 0.40).
Rank 1 changes its weights most, but ranks 8 and 64 are about equal on two of three tasks, so that
order does not hold in full; nor does it for representations of linear networks at norm 3. At equal spectral norm
kernel alignments have no order, and rank 1 does not learn to match in these steps.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import bases, runner
from experiments.bases import StudyConfig
from experiments.checks import check_counts, check_seeds
from jaxlm.core.errors import ConfigError
from jaxlm.data.prepare import DataConfig
from jaxlm.data.synthetic.cognitive_tasks import CognitiveTask
from jaxlm.models.config import DecoderConfig
from jaxlm.optim.config import OptimizerConfig
from jaxlm.reporting import Claim, Figure, Report, Series, Table


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """Two-layer linear networks of `width` inputs and units; full-batch gradient descent on whitened inputs."""

    width: int = 40
    ranks: tuple[int, ...] = (1, 4, 10, 40)
    norms: tuple[float, ...] = (1.0, 3.0)
    """Frobenius norms of the first layer."""
    learning_rate: float = 0.02
    max_steps: int = 20_000
    """Steps at most; training ends at a loss of 1e-6."""

    def __post_init__(self):
        check_counts(self, "width", "max_steps")
        if not self.ranks or max(self.ranks) > self.width or min(self.ranks) < 1:
            raise ConfigError(f"ranks are {self.ranks}, expected 1 to {self.width}")
        if not self.norms or not min(self.norms) > 0:
            raise ConfigError(f"norms are {self.norms}, expected positive ones")


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Recurrent networks on cognitive tasks, trained by SGD with momentum."""

    tasks: tuple[str, ...] = ("choice", "match", "context")
    hidden: int = 64
    ranks: tuple[int, ...] = (1, 8, 64)
    gain: float = 1.25
    iterations: int = 3000
    batch_size: int = 32
    learning_rate: float = 0.01
    momentum: float = 0.9
    stop_at: tuple[float, ...] = (0.042, 0.01, 0.045)
    """Training loss (a running mean over about 50 batches) at which a run of each task ends; 0: it runs through."""
    spectral: bool = True
    """Also compares ranks at equal spectral norm: scaling to equal Frobenius norm raises it at low rank."""

    def __post_init__(self):
        if len(self.stop_at) != len(self.tasks):
            raise ConfigError(f"stop_at has {len(self.stop_at)} losses for {len(self.tasks)} tasks")
        for name in self.tasks:
            CognitiveTask(name)
        check_counts(self, "hidden", "iterations", "batch_size")
        if not self.ranks or max(self.ranks) > self.hidden or min(self.ranks) < 1:
            raise ConfigError(f"ranks are {self.ranks}, expected 1 to {self.hidden}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Three testbeds; every network is trained once a seed and rank."""

    linear: LinearConfig = LinearConfig()
    recurrent: RecurrentConfig = RecurrentConfig()
    decoder: StudyConfig | None = None
    """Text, model and steps of the small Llama; None leaves it out."""
    decoder_ranks: tuple[int, ...] = (2, 8, 64)
    decoder_rate: float = 1e-3
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self):
        check_seeds(self.seeds)


SMALL = Config()

LLAMA = Config(
    decoder=StudyConfig(
        model=DecoderConfig(vocab_size=1024, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=192, max_length=48),
        data=DataConfig(vocab_size=1024, sequence_length=48),
        steps=150,
        judge_rows=64,
    ),
)

PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        linear=LinearConfig(width=6, ranks=(1, 6), norms=(3.0,), max_steps=2000),
        recurrent=RecurrentConfig(("match",), hidden=8, ranks=(1, 8), iterations=5, stop_at=(0.0,), spectral=False),
        decoder=StudyConfig(
            model=DecoderConfig(vocab_size=512, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_length=32),
            data=DataConfig(tokenizer="byte", sequence_length=32),
            steps=2,
            batch_size=4,
            judge_rows=8,
        ),
        decoder_ranks=(1, 16),
        seeds=(1,),
    ),
    "small": SMALL,
    "llama": LLAMA,
    "paper": Config(
        recurrent=RecurrentConfig(
            ("choice", "match", "context"), 300, (1, 30, 100, 300), iterations=10_000, learning_rate=0.003,
            stop_at=(0.0, 0.0, 0.0), spectral=False,
        ),
        seeds=tuple(range(1, 11)),
    ),
}  # fmt: skip


class Measure(NamedTuple):
    """How far one network moved: `weights` is `|W_f - W_0|`, others are alignments of after with before."""

    kernel: float
    representation: float
    weights: float
    signs: float = math.nan
    loss: float = math.nan
    steps: int = 0
    reached: bool = True


Measures = Mapping[int, Sequence[Measure]]
"""By rank, a measure a seed."""


def run(config: Config, out: Path) -> Report:
    """Trains and measures every network; recurrent ones and decoders that are finished in `out` are not repeated."""
    linear, aligned = {}, {}
    for norm in config.linear.norms:
        linear[norm] = {rank: _linear(config, norm, rank) for rank in config.linear.ranks}
        aligned[norm] = _linear(config, norm, None)
    recurrent = {(task, "frobenius"): _recurrent(config, task, "frobenius", out) for task in config.recurrent.tasks}
    if config.recurrent.spectral:
        recurrent |= {(task, "spectral"): _recurrent(config, task, "spectral", out) for task in config.recurrent.tasks}
    decoder = {} if config.decoder is None else _decoder(config, out)
    return report(linear, aligned, recurrent, decoder)


def report(
    linear: Mapping[float, Measures],
    aligned: Mapping[float, Sequence[Measure]],
    recurrent: Mapping[tuple[str, str], Measures],
    decoder: Measures,
) -> Report:
    """Tables, figures and claims of what was measured."""
    rows = []
    for norm, measures in linear.items():
        rows += [("linear", f"norm {norm:g}", str(rank), *_means(found)) for rank, found in measures.items()]
        rows.append(("linear", f"norm {norm:g}", "1, aligned", *_means(aligned[norm])))
    for (task, match), measures in recurrent.items():
        rows += [(task, f"equal {match} norm", str(rank), *_means(found)) for rank, found in measures.items()]
    rows += [("decoder", "equal frobenius norm", str(rank), *_means(found)) for rank, found in decoder.items()]
    columns = (
        "network", "initial weights", "rank", "kernel alignment", "representation alignment", "weight change",
        "sign similarity", "loss", "steps",
    )  # fmt: skip
    lines = {f"linear, norm {norm:g}": measures for norm, measures in linear.items()}
    lines |= {task: measures for (task, match), measures in recurrent.items() if match == "frobenius"}
    lines |= {"decoder": decoder} if decoder else {}
    figures = [
        _figure("Kernel alignment", lines, "kernel", "cosine of kernels after and before"),
        _figure("Representation alignment", lines, "representation", "cosine of similarities after and before"),
        _figure("Weight change", lines, "weights", "Frobenius norm of the change"),
    ]
    return Report(
        title="Rich and lazy learning by initial rank",
        summary="Linear networks, recurrent networks on cognitive tasks and a small Llama from weights of low and "
        "high rank and equal norm: how far training moves weights, representations and tangent kernel.",
        numbers={f"networks, {name}": sum(len(found) for found in m.values()) for name, m in lines.items()},
        claims=tuple(claims(linear, aligned, recurrent, decoder)),
        tables=(Table("Before and after training, means over seeds", columns, tuple(rows)),),
        figures=tuple(figures),
    )


def claims(
    linear: Mapping[float, Measures],
    aligned: Mapping[float, Sequence[Measure]],
    recurrent: Mapping[tuple[str, str], Measures],
    decoder: Measures,
) -> list[Claim]:
    """What the paper says that these networks can judge. An order holds if it does between the means of all ranks."""
    found = []

    def order(statement: str, measures: Measures, name: str, paper: str | None, rising: bool) -> None:
        common, note = _comparable(measures)
        means = [_mean(common[rank], name) for rank in sorted(common)]
        ordered = all((a < b) if rising else (a > b) for a, b in zip(means, means[1:]))
        shown = ", ".join(f"{mean:.3g} (rank {rank})" for rank, mean in zip(sorted(common), means))
        found.append(Claim(statement, paper, shown, bool(means) and ordered and not math.isnan(sum(means)), note))

    smallest, largest = min(linear), max(linear)
    theorem = "theorem, in expectation over tasks"
    at = f"Linear networks of norm {smallest:g}"
    order(f"{at}: kernel alignment rises with rank.", linear[smallest], "kernel", theorem, True)
    order(f"{at}: weights change less at higher rank.", linear[smallest], "weights", theorem, False)
    order(
        f"Linear networks of norm {largest:g}: representation alignment rises with rank.",
        linear[largest], "representation", None, True,
    )  # fmt: skip
    stays, random = _mean(aligned[largest], "kernel"), _mean(linear[largest][min(linear[largest])], "kernel")
    found.append(
        Claim(
            "Low-rank weights aligned with the task stay lazy (kernel alignment above 0.95).",
            "exception named by the paper",
            f"{stays:.3g} aligned, {random:.3g} random",
            stays > 0.95 > random,
        )
    )
    for (task, match), measures in recurrent.items():
        where = f"Recurrent, {task}" + ("" if match == "frobenius" else ", equal spectral norms")
        paper = "as stated (figure 2)" if match == "frobenius" else None
        order(f"{where}: weights change less at higher rank.", measures, "weights", paper, False)
        order(f"{where}: kernel alignment rises with rank.", measures, "kernel", paper, True)
        if match == "frobenius":
            order(f"{where}: representation alignment rises with rank.", measures, "representation", paper, True)
    if decoder:
        order("Small Llama: kernel alignment rises with rank.", decoder, "kernel", None, True)
        order("Small Llama: weights change less at higher rank.", decoder, "weights", None, False)
    return found


def _comparable(measures: Measures) -> tuple[Measures, str]:
    """The seeds with which networks of every rank reached the loss that they are compared at."""
    seeds = range(min(len(found) for found in measures.values()))
    kept = [i for i in seeds if all(found[i].reached for found in measures.values())]
    note = "" if len(kept) == len(seeds) else f"Of {len(seeds)} seeds, {len(kept)} reach the same loss at all ranks."
    return {rank: [found[i] for i in kept] for rank, found in measures.items()}, note


def _linear(config: Config, norm: float, rank: int | None) -> list[Measure]:
    """Linear networks of a rank (None: rank 1, aligned with their teachers), a teacher and a network a seed."""
    import jax
    import jax.numpy as jnp

    from jaxlm.core.keys import fold
    from jaxlm.models import linear_network as model
    from jaxlm.scoring import kernel_alignment, representation_alignment

    c = config.linear
    x = jnp.eye(c.width)

    @jax.jit
    def train(key: jax.Array) -> Measure:
        teacher = jax.random.normal(fold(key, "teacher"), (c.width,))
        teacher = teacher / jnp.linalg.norm(teacher)
        if rank is None:
            start = model.init_aligned_network(fold(key, "init"), teacher, c.width, norm=norm)
        else:
            start = model.init_linear_network(fold(key, "init"), c.width, c.width, rank=rank, norm=norm)

        def loss(params: Any) -> jax.Array:
            return 0.5 * jnp.sum(jnp.square(model.linear_network(params, x) - teacher))

        def descend(carry: tuple) -> tuple:
            params, step, _ = carry
            value, grads = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda w, g: w - c.learning_rate * g, params, grads), step + 1, value

        def goes_on(carry: tuple) -> jax.Array:
            return (carry[2] > 1e-6) & (carry[1] < c.max_steps)

        params, steps, value = jax.lax.while_loop(goes_on, descend, (start, 0, jnp.array(jnp.inf)))
        return Measure(
            kernel_alignment(model.exact_tangent_kernel(start, x), model.exact_tangent_kernel(params, x)),
            representation_alignment(model.hidden_units(start, x), model.hidden_units(params, x)),
            jnp.linalg.norm(params["first"]["kernel"] - start["first"]["kernel"]),
            loss=value,
            steps=steps,
            reached=value <= 1e-6,
        )

    found = [train(jax.random.key(seed)) for seed in config.seeds]
    return [Measure(*(x if isinstance(x, float) else x.item() for x in m)) for m in found]


def _recurrent(config: Config, name: str, match: str, out: Path) -> Measures:
    """Recurrent networks on a task, by rank."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlm.core.keys import fold
    from jaxlm.models.ctrnn import CTRNN
    from jaxlm.objectives import Classification, StepContext
    from jaxlm.scoring import kernel_alignment, representation_alignment, sign_similarity, tangent_kernel
    from jaxlm.training import Member, Population, init_state, make_step

    c, task = config.recurrent, CognitiveTask(name)
    network = CTRNN(task.num_inputs, c.hidden, 3)
    objective = Classification(lambda params, batch: network.run(params, batch["inputs"])[0])
    tx = optax.sgd(c.learning_rate, c.momentum)
    target = c.stop_at[c.tasks.index(name)]
    probe_key = jax.random.key(2310)  # the trials on which networks are measured

    def start(key: jax.Array, rank: Any) -> Any:
        return network.init(key, rank=rank, gain=c.gain, match=match)["params"]

    def evaluate(params: Any) -> dict[str, jax.Array]:
        batch = task.sample(fold(probe_key, "judge"), 32 * c.batch_size)
        ctx = StepContext()
        return {"loss": objective.loss(params, batch, ctx, objective.totals(params, batch, ctx))[0]}

    population = Population(
        init=lambda key, hparams: init_state(
            start(key, hparams["rank"]), tx, key, hparams=hparams, extra=jnp.array(math.inf if target <= 0 else 2.0)
        ),
        step=_until(make_step(objective, tx), target),
        sample=lambda key, step: task.sample(fold(key, step), c.batch_size),
        num_steps=c.iterations,
        evaluate=evaluate,
    )
    members = [
        Member(f"{name} {match} {rank} {seed}", seed, {"rank": rank}) for rank in c.ranks for seed in config.seeds
    ]
    outcomes = population.train(members, folder=out / "members", keep_params=True, report=_say)

    @jax.jit
    def measure(key: jax.Array, rank: jax.Array, after: Any) -> tuple:
        before = start(key, rank)
        trials = task.sample(fold(probe_key, "probe"), 10 * c.batch_size)["inputs"]
        first = trials[: c.batch_size]

        def kernel(params: Any) -> jax.Array:
            return tangent_kernel(lambda p: network.run(p, first)[0], params, lambda path: "recurrent" in path)

        rates = [network.run(params, trials)[1][:, task.decision_steps] for params in (before, after)]
        flat = [h.reshape(-1, c.hidden) for h in rates]
        change = after["recurrent"]["kernel"] - before["recurrent"]["kernel"]
        return (
            kernel_alignment(kernel(before), kernel(after)),
            representation_alignment(*flat),
            jnp.linalg.norm(change),
            sign_similarity(*flat),
        )

    measures: dict[int, list[Measure]] = {rank: [] for rank in c.ranks}
    for outcome in outcomes:
        rank = outcome.member.hparams["rank"]
        numbers = measure(jax.random.key(outcome.member.seed), jnp.float32(rank), outcome.params)
        steps = int(outcome.history["training"].sum())
        reached = target <= 0 or steps < c.iterations
        measures[rank].append(Measure(*map(float, numbers), outcome.results["loss"], steps, reached))
    return measures


def _until(step: Callable, target: float) -> Callable:
    """A step that changes nothing any more once the running mean of the loss, kept in `extra`, is below `target`."""
    import jax
    import jax.numpy as jnp

    def wrapped(state: Any, frozen: Any, batch: Any) -> tuple:
        new, metrics = step(state, frozen, batch)
        loss, weight = metrics["loss"]
        trains = state.extra >= target
        if target > 0:
            new = dataclasses.replace(new, extra=0.98 * state.extra + 0.02 * loss / weight)
        kept = jax.tree.map(
            lambda a, b: jnp.where(trains, a, b),
            (new.trainable, new.opt_state, new.extra),
            (state.trainable, state.opt_state, state.extra),
        )
        trainable, opt_state, extra = kept
        new = dataclasses.replace(new, trainable=trainable, opt_state=opt_state, extra=extra)
        return new, {**metrics, "training": (trains.astype(jnp.float32), jnp.ones(()))}

    return wrapped


def _decoder(config: Config, out: Path) -> Measures:
    """Small Llamas whose block kernels start at low rank."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.core.keys import fold
    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.models.initialization import reduce_kernels
    from jaxlm.objectives import CausalLM
    from jaxlm.scoring import kernel_alignment, representation_alignment, tangent_kernel, weight_change
    from jaxlm.training import Member, Population, init_state, make_step

    study = config.decoder
    text = bases.load_text(study)
    model = Decoder(study.model)
    axes = model.axes()
    objective = CausalLM(model)
    tx = OptimizerConfig(learning_rate=config.decoder_rate, weight_decay=0.0).make(study.steps, axes)
    judge = resident_loss(objective, text.judge, study.batch_size)

    def start(key: jax.Array, rank: Any) -> Any:
        return reduce_kernels(model.init(key)["params"], axes, rank)

    population = Population(
        init=lambda key, hparams: init_state(start(key, hparams["rank"]), tx, key, hparams=hparams),
        step=make_step(objective, tx),
        sample=lambda key, step: text.train.sample(key, step, study.batch_size),
        num_steps=study.steps,
        evaluate=lambda params: {"loss": judge(params)},
    )
    members = [
        Member(f"decoder {rank} {seed}", seed, {"rank": rank}) for rank in config.decoder_ranks for seed in config.seeds
    ]
    outcomes = population.train(members, folder=out / "members", keep_params=True, report=_say)
    rows = text.judge.take(jnp.arange(min(8, text.judge.count)))

    def matrices(path: str) -> bool:
        return path.startswith("blocks") and path.endswith("kernel")

    @jax.jit
    def measure(key: jax.Array, rank: jax.Array, after: Any) -> tuple:
        before = start(key, rank)
        chooser = jax.random.key(2310)
        places = jax.random.randint(fold(chooser, "places"), (64,), 0, rows["inputs"].size)
        directions = jax.random.normal(fold(chooser, "directions"), (64, study.model.vocab_size))

        def hidden(params: Any) -> jax.Array:
            embedded = model.embed(params, rows["inputs"], rows["positions"])
            found = model.trunk(params, embedded, positions=rows["positions"], segment_ids=rows["segment_ids"]).hidden
            return found.reshape(-1, found.shape[-1])[places]

        def outputs(params: Any) -> jax.Array:
            return jnp.sum(model.head(params, hidden(params)[:, None])[:, 0] * directions, axis=-1)

        kernels = [tangent_kernel(outputs, params, matrices, block=16) for params in (before, after)]
        changes = weight_change(before, after, matrices)
        total = jnp.sqrt(sum(jnp.sum(jnp.square(change)) for change in changes.values()))
        return kernel_alignment(*kernels), representation_alignment(hidden(before), hidden(after)), total

    measures: dict[int, list[Measure]] = {rank: [] for rank in config.decoder_ranks}
    for outcome in outcomes:
        rank = outcome.member.hparams["rank"]
        numbers = measure(jax.random.key(outcome.member.seed), jnp.float32(rank), outcome.params)
        loss = outcome.results["loss"]
        measures[rank].append(Measure(*map(float, numbers), loss=loss, steps=study.steps, reached=np.isfinite(loss)))
    return measures


def _mean(found: Sequence[Measure], name: str) -> float:
    return statistics.fmean(getattr(m, name) for m in found) if found else math.nan


def _means(found: Sequence[Measure]) -> tuple[float | None, ...]:
    values = [_mean(found, name) for name in ("kernel", "representation", "weights", "signs", "loss", "steps")]
    return tuple(None if math.isnan(value) else value for value in values)


def _figure(title: str, lines: Mapping[str, Measures], name: str, label: str) -> Figure:
    series = tuple(
        Series(line, tuple(measures), tuple(_mean(found, name) for found in measures.values()), style="points")
        for line, measures in lines.items()
    )
    return Figure(title, series, "rank of the initial weights", label, x_scale="log")


def _say(outcome: Any) -> None:
    print(f"{outcome.member.name}: loss {outcome.results['loss']:.4f} ({outcome.seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    runner.main(__name__)
