"""The networks of `experiments.optimization.rich_lazy_rank`: trained from each rank, and measured before and after."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import bases
from jaxlm.data.synthetic.cognitive_tasks import CognitiveTask
from jaxlm.optim.config import OptimizerConfig

if TYPE_CHECKING:
    from experiments.optimization.rich_lazy_rank import Config


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


def train_linear(config: "Config", norm: float, rank: int | None) -> list[Measure]:
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


def train_recurrent(config: "Config", name: str, match: str, out: Path) -> Measures:
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
    outcomes = population.train(members, folder=out / "members", keep_params=True, report=bases.say)

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


def train_decoder(config: "Config", out: Path) -> Measures:
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
    outcomes = population.train(members, folder=out / "members", keep_params=True, report=bases.say)
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
