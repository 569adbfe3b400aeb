"""The runs of `experiments.optimization.minicpm`: trunks, branches, sweeps over rates and sizes."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from experiments import bases

if TYPE_CHECKING:
    from experiments.optimization.minicpm import Config

HORIZONS = (1, 2, 4)
"""Lengths of the comparison of schedules, in `steps`."""
BRANCHES = (1, 2, 4, 8)
"""Lengths of the branches of the scaling law, in `law_steps`."""
END = 0.1
"""Rate at the end of every decay as a share of the peak."""


class Lab:
    """Trains stretches of runs: from a state, over some steps, to a state. All stretches of one width and text are
    repetitions of one compiled program, which trains `_unit` steps."""

    def __init__(self, config: "Config", text: Mapping[str, bases.Text]):
        self.config, self.text = config, text
        self._unit = math.gcd(config.steps // 10, config.law_steps // 10, config.width_steps, config.sft_steps)
        self._parts: dict[Any, Any] = {}

    def tuning(self, kind: str, rate: float) -> float:
        c, schedule = self.config, self._schedule(rate, self.config.steps, kind)
        state = self.fresh(c.width, c.tuning_seed, schedule)
        return self.loss(c.width, self.train(c.width, state, schedule, c.steps, c.tuning_seed), "tuning")

    def cosine(self, rate: float, seed: int) -> dict[str, float]:
        """The losses of a run of its own for each length."""
        c, found = self.config, {}
        for length in (h * c.steps for h in HORIZONS):
            schedule = self._schedule(rate, length, "cosine")
            state = self.fresh(c.width, seed, schedule)
            state = self.train(c.width, state, schedule, length, seed)
            found[schedule_name("cosine", length)] = self.loss(c.width, state)
        return found

    def branches(self, rate: float, seed: int) -> dict[str, Any]:
        """One run with a constant rate, and all that branches from it."""
        c = self.config
        unit = c.steps // 10
        constant = self._schedule(rate, HORIZONS[-1] * c.steps, "wsd", decay=0)
        state, at, losses = self.fresh(c.width, seed, constant), 0, {}

        def go(state: Any, steps: int, schedule: Mapping[str, float], stream: str = "data") -> Any:
            return self.train(c.width, state, schedule, steps, seed, stream=stream)

        for horizon in HORIZONS:
            state, at = go(state, 9 * horizon * unit - at, constant), 9 * horizon * unit
            whole = horizon * c.steps
            schedule = self._schedule(rate, whole, "wsd")
            decayed = go(state, horizon * unit, schedule)
            losses[schedule_name("wsd 10 %", whole)] = self.loss(c.width, decayed)
        later = go(state, 3 * unit, constant)
        losses[schedule_name("stable", whole)] = self.loss(c.width, go(later, unit, constant))
        short = self._schedule(rate, whole, "wsd", decay=unit)
        losses[schedule_name("wsd 2.5 %", whole)] = self.loss(c.width, go(later, unit, short))

        mixed = go(state, HORIZONS[-1] * unit, schedule, "mixed")
        tuned = self._schedule(END * rate, c.sft_steps, "wsd", warmup=0)
        instructions = {
            kind: self.loss(c.width, go(_restarted(start), c.sft_steps, tuned, "instructions"), stream="instructions")
            for kind, start in (("plain", decayed), ("mixed", mixed))
        }
        probes = {
            "stable": self.probe(state, constant, seed),
            "decayed": self.probe(decayed, schedule, seed),
        }
        return {"losses": losses, "instructions": instructions, "probes": probes}

    def rates(self, width: int, with_rules: bool) -> list[float]:
        """The losses of a model at each of the rates."""
        c, seed = self.config, self.config.seeds[0]
        found = []
        for rate in c.width_rates:
            schedule = self._schedule(rate, c.width_steps, "wsd")
            state = self.fresh(width, seed, schedule, with_rules)
            state = self.train(width, state, schedule, c.width_steps, seed, with_rules=with_rules)
            found.append(self.loss(width, state, with_rules=with_rules))
        return found

    def law(self, width: int, rate: float) -> list[tuple[int, int, float]]:
        """Parameters, tokens and loss of the decayed branches of one run."""
        from jaxlm.core import trees

        c, seed, unit = self.config, self.config.seeds[0], self.config.law_steps // 10
        constant = self._schedule(rate, BRANCHES[-1] * c.law_steps, "wsd", decay=0)
        state, at, points = self.fresh(width, seed, constant), 0, []
        size = trees.count(state.trainable["blocks"])
        for branch in BRANCHES:
            state, at = self.train(width, state, constant, 9 * branch * unit - at, seed), 9 * branch * unit
            schedule = self._schedule(rate, branch * c.law_steps, "wsd")
            tokens = branch * c.law_steps * c.batch_size * c.data.sequence_length
            points.append((size, tokens, self.loss(width, self.train(width, state, schedule, branch * unit, seed))))
        return points

    def fresh(self, width: int, seed: int, schedule: Mapping[str, float], with_rules: bool = True) -> Any:
        """The state before the first step."""
        import jax

        from jaxlm.training import init_state

        model, _, tx = self._setup(width, with_rules)
        make = self._memo(
            ("init", width, with_rules),
            lambda: jax.jit(lambda key, hparams: init_state(model.init(key)["params"], tx, key, hparams=hparams)),
        )
        return make(jax.random.key(seed), schedule)

    def train(
        self, width: int, state: Any, schedule: Mapping[str, float], steps: int, seed: int,
        *, with_rules: bool = True, stream: str = "data",
    ) -> Any:  # fmt: skip
        """The state `steps` later; schedule and order of data follow the state's step."""
        from jaxlm.data.resident import mix_rows
        from jaxlm.training import Member, Population, continue_state, make_step

        c = self.config
        _, objective, tx = self._setup(width, with_rules)
        counts = {"data": (c.batch_size, 0), "instructions": (0, c.batch_size),
                  "mixed": (c.batch_size - c.instruction_rows, c.instruction_rows)}[stream]  # fmt: skip
        stretch = self._unit if steps % self._unit == 0 else steps

        def init(key: Any, hparams: Any, start: Any) -> Any:
            return continue_state(start, tx, keep_optimizer=True, restart=False, hparams=hparams, key=key)

        population = self._memo(
            (width, with_rules, stream, stretch),
            lambda: Population(
                init, make_step(objective, tx), mix_rows([t.train for t in self.text.values()], counts), stretch
            ),
        )
        for _ in range(steps // stretch):
            (outcome,) = population.train([Member("stretch", seed, schedule)], start=state, keep_state=True)
            state = outcome.state
        return state

    def loss(
        self, width: int, state: Any, part: str = "judge", *, stream: str = "data", with_rules: bool = True
    ) -> float:
        """Held-out loss; infinite for a run that diverged."""
        import jax

        from jaxlm.evals import resident_loss

        _, objective, _ = self._setup(width, with_rules)
        rows = getattr(self.text[stream], part)
        evaluate = self._memo(
            ("loss", width, part, stream, with_rules),
            lambda: jax.jit(resident_loss(objective, rows, min(64, rows.count))),
        )
        loss = float(evaluate(state.trainable))
        return loss if math.isfinite(loss) else math.inf

    def probe(self, state: Any, schedule: Mapping[str, float], seed: int) -> dict[str, float]:
        """The shape of the loss along the next updates, at the rate that has been reached."""
        import jax

        from jaxlm.training.probes import trajectory_curvature

        width = self.config.width
        _, objective, _ = self._setup(width, True)
        batch = self.text["data"].judge.take(jax.numpy.arange(min(64, self.text["data"].judge.count)))
        measure = self._memo("probe", lambda: jax.jit(lambda a, b: trajectory_curvature(objective, a, b, batch)))
        found = []
        for _ in range(self.config.probes):
            after = self.train(width, state, schedule, 1, seed)
            found.append({name: float(x) for name, x in measure(state.trainable, after.trainable).items()})
            state = after
        return {name: statistics.median(f[name] for f in found) for name in found[0]}

    def _setup(self, width: int, with_rules: bool) -> tuple[Any, Any, Any]:
        return self._memo(("setup", width, with_rules), lambda: self._make(width, with_rules))

    def _make(self, width: int, with_rules: bool) -> tuple[Any, Any, Any]:
        import jax.numpy as jnp

        from jaxlm.models import Decoder
        from jaxlm.objectives import CausalLM
        from jaxlm.optim import ScheduleFromHparams, adamw, warmup_stable_decay

        def schedule(h: Mapping[str, Any]) -> Any:
            cosine, exponential = (
                warmup_stable_decay(h["peak"], h["total"], h["warmup"], h["decay"], shape, END)
                for shape in ("cosine", "exponential")
            )
            return lambda step: jnp.where(h["cosine"] > 0, cosine(step), exponential(step))

        model = Decoder(self.config.model(width, with_rules=with_rules))
        factor = self.config.rules.rate_factor(model.config) if with_rules else None
        tx = adamw(
            ScheduleFromHparams(schedule),
            axes=model.axes(), b2=0.95, weight_decay=0.1, clip_norm=1.0, rate_factor=factor,
        )  # fmt: skip
        return model, CausalLM(model), tx

    def _schedule(
        self, rate: float, length: int, kind: str, *, decay: int | None = None, warmup: int | None = None
    ) -> dict[str, float]:
        warmup = max(1, round(0.05 * min(self.config.steps, length))) if warmup is None else warmup
        if decay is None:
            decay = length - warmup if kind == "cosine" else max(1, length // 10)
        return {"peak": rate, "total": length, "warmup": warmup, "decay": decay, "cosine": kind == "cosine"}

    def _memo(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._parts:
            self._parts[key] = make()
        return self._parts[key]


def read_stream(config: "Config", name: str) -> bases.Text:
    """The rows of `config.data` or `config.instructions`."""
    most = config.batch_size * max(HORIZONS[-1] * config.steps, BRANCHES[-1] * config.law_steps)
    return bases.read_text(getattr(config, name), config.model(config.width).vocab_size, most, config.judge_rows)


def schedule_name(kind: str, length: int) -> str:
    return f"{kind}, {length} steps"


def _restarted(state: Any) -> Any:
    import jax.numpy as jnp

    return dataclasses.replace(state, step=jnp.zeros((), jnp.int32))
