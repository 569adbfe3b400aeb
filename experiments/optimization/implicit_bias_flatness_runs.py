"""The runs of `experiments.optimization.implicit_bias_flatness`: sentences, models trained on them, their measures."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.core.json_files import number, read_json, write_json
from jaxlm.models.config import DecoderConfig

if TYPE_CHECKING:
    from experiments.optimization.implicit_bias_flatness import Config


class Measure(NamedTuple):
    """One model: its loss above the least one (nats a word), trace with its error, accuracies of probes by task."""

    width: int
    seed: int
    step: int
    excess: float
    trace: float
    trace_error: float
    accuracy: Mapping[str, float]
    fine_tuned: float | None = None
    """Accuracy on phrases of four words; of the last model of a run."""


TASKS = {"phrase of 4": 4, "phrase of 2": 2}
"""Downstream tasks by the number of first words whose symbol is asked for; besides, `sentence`: the root."""


class World:
    """The grammar, sentences to train, judge and probe on, exact conditionals and labels."""

    def __init__(self, config: "Config"):
        import jax.numpy as jnp

        from jaxlm.data.synthetic import grammars

        self.config, c = config, config
        g = dataclasses.asdict(c.grammar)
        self.grammar = grammars.layered_grammar(g.pop("seed"), **g)
        self.length = 2**c.grammar.levels
        self.train = self._rows(c.sentences, 1)
        self.judge = self._rows(c.judge_sentences, 2)
        lengths = jnp.sum(self.judge.arrays["segment_ids"], axis=1)
        words = jnp.where(self.judge.arrays["segment_ids"] > 0, self.judge.arrays["inputs"], -1)
        self.conditionals = grammars.word_conditionals(self.grammar, words, lengths)
        self.least_loss = float(grammars.conditional_entropy(self.conditionals, lengths))
        probes = self._rows(c.probe_sentences, 3, min_length=5)
        words = jnp.where(probes.arrays["segment_ids"] > 0, probes.arrays["inputs"], -1)
        labels, known = {}, jnp.ones(len(words), bool)
        for task, width in TASKS.items():
            labels[task], possible = grammars.span_labels(self.grammar, words, 0, width)
            known = known & possible
        labels["sentence"] = grammars.root_labels(self.grammar, words, jnp.sum(words >= 0, axis=1))
        self.probes = probes.take(jnp.flatnonzero(known))
        self.labels = {task: found[known] for task, found in labels.items()}
        self.cut = 2 * int(known.sum()) // 3

    def model(self, width: int) -> Any:
        """The masked language model of a width: a transformer as BERT, norms first."""
        from jaxlm.models import Decoder

        c = self.config
        return Decoder(
            DecoderConfig(
                vocab_size=c.grammar.words + 1, num_layers=c.layers, embed_dim=width, num_heads=width // c.head_dim,
                mlp_dim=4 * width, head_dim=c.head_dim, max_length=self.length, norm="layer", qkv_bias=True,
                out_bias=True, mlp_bias=True, mlp_gated=False, activation="gelu", position="learned", causal=False,
            )
        )  # fmt: skip

    def objective(self, model: Any) -> Any:
        from jaxlm.objectives import MaskedLM

        words = self.config.grammar.words
        return MaskedLM(model, words, words, rate=self.config.mask_rate, masked=1.0, random=0.0)

    @functools.cached_property
    def trace(self) -> Any:
        """Trace of the Hessian, with its error, at parameters of the widest model: one program for all widths."""
        import jax

        from jaxlm.core.keys import fold
        from jaxlm.scoring import hessian_trace, objective_loss

        c = self.config
        loss = objective_loss(self.objective(self.model(c.widths[-1])))

        def draw(key: jax.Array) -> dict[str, jax.Array]:
            rows = jax.random.randint(fold(key, "rows"), (c.trace_batch,), 0, self.train.count)
            return {**self.train.take(rows), "key": fold(key, "mask")}

        return jax.jit(lambda params: hessian_trace(loss, params, draw, jax.random.key(2210), draws=c.trace_draws))

    @functools.cache  # noqa: B019 (a world lives as long as its run)
    def measure(self, width: int) -> Any:
        """`_measure` of a width, the same programs for all seeds."""
        return _measure(self.config, self, width)

    def table_accuracy(self) -> dict[str, float]:
        """Accuracy of probes on the features of a lookup table."""
        from jaxlm.models.lookup_table import LookupTable

        table = LookupTable(self.config.grammar.words, num_features=self.length * self.config.widths[-1])
        return self.probe(table.features(self.probes["inputs"]))

    def majority(self) -> dict[str, float]:
        """Accuracy of the most frequent label."""
        import numpy as np

        found = {}
        for task, labels in self.labels.items():
            train, test = np.asarray(labels[: self.cut]), np.asarray(labels[self.cut :])
            found[task] = float((test == np.bincount(train).argmax()).mean())
        return found

    def probe(self, features: Any) -> dict[str, float]:
        """Accuracy of a linear layer on frozen features, by task."""
        from jaxlm.evals import linear_probe

        cut, classes = self.cut, len(self.grammar.symbols)
        return {
            task: linear_probe(
                features[:cut], labels[:cut], features[cut:], labels[cut:], classes, self.config.probe
            ).accuracy
            for task, labels in self.labels.items()
        }

    def _rows(self, count: int, seed: int, min_length: int = 1) -> Any:
        import jax.numpy as jnp
        import numpy as np

        from jaxlm.data.resident import ResidentRows
        from jaxlm.data.synthetic.grammars import sample_sentences

        words, _ = sample_sentences(self.grammar, count, seed, max_length=self.length, min_length=min_length)
        inputs, segments = np.maximum(words, 0), (words >= 0).astype(np.int32)
        return ResidentRows({"inputs": jnp.asarray(inputs), "segment_ids": jnp.asarray(segments)})


def train_and_measure(config: "Config", world: World, width: int, seed: int, out: Path) -> list[Measure]:
    """Trains one model and measures it at each of the steps."""
    import jax

    from jaxlm.training import init_state, make_step, train_snapshots

    model = world.model(width)
    tx = config.optimizer.make(config.at[-1], model.axes())
    key = jax.random.key(seed)
    name = f"width-{width}-seed-{seed}"
    snapshots = train_snapshots(
        init_state(jax.jit(model.init)(key)["params"], tx, key),
        make_step(world.objective(model), tx),
        lambda key, step: world.train.sample(key, step, config.batch_size),
        config.at,
        folder=out / "runs" / name,
    )
    measure = world.measure(width)
    found = []
    for snapshot in snapshots:
        path = out / "measures" / f"{name}-{snapshot.step}.json"
        if not path.exists():
            values = measure(snapshot.params, fine_tuned=snapshot.step == config.at[-1])
            write_json(path, values)
            print(f"{name}, step {snapshot.step}: {values}", flush=True)
        kept = {key: number(value) for key, value in read_json(path).items()}
        found.append(Measure(width, seed, snapshot.step, **kept))
    return found


def _measure(config: "Config", world: World, width: int) -> Any:
    """A function of parameters that gives the fields of a `Measure` that have to be measured."""
    import jax
    import jax.numpy as jnp

    from jaxlm.data.resident import ResidentRows
    from jaxlm.evals import fine_tune
    from jaxlm.models.decoder import make_norm
    from jaxlm.surgery import widen_by_tiling

    model, factor = world.model(width), config.widths[-1] // width

    def features(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Final embeddings of all tokens, concatenated; zeros for padding."""
        hidden = model.trunk(params, model.embed(params, batch["inputs"]), segment_ids=batch["segment_ids"]).hidden
        normed = make_norm(model.config).apply({"params": params["final_norm"]}, hidden)
        return (normed * batch["segment_ids"][..., None]).reshape(len(hidden), -1)

    @jax.jit
    def numbers(params: Any) -> tuple:
        logp = world.objective(model).conditionals(params, world.judge.arrays)[..., : config.grammar.words]
        p, words = world.conditionals, jnp.sum(world.judge.arrays["segment_ids"])
        excess = jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, 1e-30)) - logp), 0.0)) / words
        return excess, widen_by_tiling(model.config, params, factor)[1], features(params, world.probes)

    task = "phrase of 4"
    rows = {**world.probes, "targets": world.labels[task]}
    train, test = (
        ResidentRows({name: x[part] for name, x in rows.items()})
        for part in (slice(None, world.cut), slice(world.cut, None))
    )

    def measure(params: Any, fine_tuned: bool) -> dict[str, Any]:
        excess, wide, frozen = numbers(params)
        trace, error = world.trace(wide)
        tuned = None
        if fine_tuned:
            classes = len(world.grammar.symbols)
            tuned = fine_tune(features, params, train, test, classes, config.fine_tune).accuracy
        return {
            "excess": float(excess),
            "trace": float(trace),
            "trace_error": float(error),
            "accuracy": world.probe(frozen),
            "fine_tuned": tuned,
        }

    return measure
