"""The runs of `experiments.optimization.natural_galore`: a quadratic, pretraining, fine-tuning for function calls."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import bases
from experiments.bases import FRAME, Arm, ArmResult
from jaxlm.optim.config import LowRankOptions, OptimizerConfig
from jaxlm.peft.parametrizations import Parametrization

if TYPE_CHECKING:
    from experiments.optimization.natural_galore import Config, ToolConfig

_SCHEDULE: Mapping[str, Any] = {**FRAME, "eps": 1e-6}
_DAMPINGS = {"absolute": 1e-3, "relative": 1.0}
QUADRATIC = ("galore", "natural, 0.001", "natural, 1", "natural, relative")
"""Methods that the quadratic is descended by."""


def pretraining_arms(config: "Config") -> dict[str, Arm]:
    """Adam, GaLore, Natural GaLore with both dampings, and low rank."""

    def arm(name: str, rates: Sequence[float], damping: str = "absolute", form: str = "dense") -> Arm:
        options = LowRankOptions(
            rank=config.rank,
            period=config.period,
            history=config.history,
            damping=_DAMPINGS[damping],
            damping_mode=damping,
        )
        how = Parametrization(form, rank=config.rank)
        return Arm(OptimizerConfig(name, low_rank=options, **_SCHEDULE), tuple(rates), how)

    return {
        "adam": arm("adamw", config.adam_rates),
        "galore": arm("galore", config.rates),
        "natural, absolute": arm("natural_galore", config.rates),
        "natural, relative": arm("natural_galore", config.rates, "relative"),
        "low_rank": arm("adamw", config.adam_rates, form="low_rank"),
    }


def run_quadratic(seeds: int) -> dict[tuple[str, float], list[float]]:
    """Final over initial loss of `0.5 <W - W*, Hc (W - W*) Hd>` by method and noise, a seed each, best of nine rates.

    W is 8 x 40, the eigenvalues of Hd fall from 1 to 0.001, of Hc to 0.1; rank 4, a subspace every 20 steps, the last
    10 gradients, 100 steps with Adam on top.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlm.optim.fisher import scale_by_empirical_fisher
    from jaxlm.optim.galore import scale_by_galore
    from jaxlm.optim.projection import Projection

    rows, columns, steps = 8, 40, 100
    rates = 1e-4 * 3.0 ** jnp.arange(9)
    adam = optax.scale_by_adam(eps=1e-6)

    def hessian(key: Any, size: int, least: float) -> Any:
        basis, _ = jnp.linalg.qr(jax.random.normal(key, (size, size)))
        return (basis * jnp.logspace(0, least, size)[None]) @ basis.T

    def transform(name: str) -> Any:
        inner = adam
        if name != "galore":
            mode = "relative" if name.endswith("relative") else "absolute"
            damping = 1.0 if mode == "relative" else float(name.split(", ")[1])
            inner = optax.chain(scale_by_empirical_fisher(10, damping, mode, period=20), adam)
        return scale_by_galore(Projection(rank=4, period=20), inner, scale=1.0)

    def best(tx: Any, key: Any, noise: Any) -> Any:
        keys = jax.random.split(key, 4)
        left, right = hessian(keys[0], rows, -1), hessian(keys[1], columns, -3)
        target = jax.random.normal(keys[2], (rows, columns))

        def loss(w: Any) -> Any:
            d = w["w"] - target
            return 0.5 * jnp.sum(d * (left @ d @ right))

        def one(rate: Any) -> Any:
            def body(carry: Any, step: Any) -> tuple[Any, None]:
                w, state = carry
                shaken = noise * jax.random.normal(jax.random.fold_in(keys[3], step), (rows, columns))
                g = {"w": jax.grad(loss)(w)["w"] + shaken}
                updates, state = tx.update(g, state, w, step=step)
                return ({"w": w["w"] - rate * updates["w"]}, state), None

            start = {"w": jnp.zeros((rows, columns))}
            (w, _), _ = jax.lax.scan(body, (start, tx.init(start)), jnp.arange(steps))
            return loss(w) / loss(start)

        return jnp.nanmin(jax.lax.map(one, rates))

    found = {}
    for name in QUADRATIC:
        compiled = jax.jit(functools.partial(best, transform(name)))
        for noise in (0.0, 0.02):
            found[name, noise] = [float(compiled(jax.random.key(seed), noise)) for seed in range(seeds)]
    return found


def run_tools(config: "ToolConfig", out: Path) -> dict[str, tuple[ArmResult | None, list[float]]]:
    """Every arm's runs, and the share of right plans of each."""
    import jax.numpy as jnp

    from jaxlm.core import trees
    from jaxlm.data.resident import ResidentRows
    from jaxlm.data.synthetic import function_calls as calls
    from jaxlm.evals import resident_loss
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM

    def rows(examples: Sequence[calls.Example]) -> ResidentRows:
        arrays = calls.example_arrays(examples, config.data.sequence_length)
        return ResidentRows({name: jnp.asarray(x) for name, x in arrays.items()})

    drawn = calls.draw_examples(config.examples + 2 * config.judge_rows, config.depth)
    train, tuning, judge = (
        drawn[: config.examples], drawn[config.examples : -config.judge_rows], drawn[-config.judge_rows :]
    )  # fmt: skip
    simple = rows(calls.draw_examples(256, 0, exclude=drawn))
    objective = CausalLM(Decoder(config.model))
    losses = {name: resident_loss(objective, rows(part), config.batch_size) for name, part in
              (("tuning", tuning), ("judge", judge))}  # fmt: skip

    def evaluate(params: Any) -> dict[str, Any]:
        return {name: loss(params) for name, loss in losses.items()}

    def population(arm: Arm, data: ResidentRows, steps: int, start: Any = None) -> tuple[Any, Any]:
        return bases.arm_population(
            dataclasses.replace(config, steps=steps),
            arm,
            sample=lambda key, step: data.sample(key, step, config.batch_size),
            evaluate=evaluate,
            start=start,
        )

    adam = Arm(OptimizerConfig("adamw", **_SCHEDULE), (config.base_rate,))
    first, frozen = population(adam, simple, config.base_steps)
    once = dataclasses.replace(config, seeds=(config.tuning_seed + 1,))
    base = bases.tune_and_judge(once, "base", first, adam.rates, out, frozen).params

    found: dict[str, tuple[ArmResult | None, list[float]]] = {"before": (None, [plan_accuracy(config, base, judge)])}
    for name, arm in tool_arms(config).items():
        tuned, frozen = population(arm, rows(train), config.steps, base)
        result = bases.tune_and_judge(config, name, tuned, arm.rates, out, frozen, base)
        whole = [trees.merge(outcome.params, frozen) for outcome in result.outcomes]
        found[name] = (result, [plan_accuracy(config, params, judge) for params in whole])
    return found


def tool_arms(config: "ToolConfig") -> dict[str, Arm]:
    """All parameters, LoRA, and GaLore and Natural GaLore in subspaces of LoRA's rank."""
    options = {
        mode: LowRankOptions(config.rank, 50, 1.0, history=10, damping=damping, damping_mode=mode)
        for mode, damping in _DAMPINGS.items()
    }

    def arm(name: str, mode: str = "absolute", form: str = "dense") -> Arm:
        how = Parametrization(form, rank=config.rank, alpha=2.0 * config.rank)
        return Arm(OptimizerConfig(name, low_rank=options[mode], **_SCHEDULE), config.rates, how)

    return {
        "full": arm("adamw"),
        "lora": arm("adamw", form="lora"),
        "galore": arm("galore"),
        "natural, absolute": arm("natural_galore"),
        "natural, relative": arm("natural_galore", "relative"),
    }


def plan_accuracy(config: "ToolConfig", params: Any, examples: Sequence[Any]) -> float:
    """Share of requests for which the greedy continuation is a plan with the right graph."""
    from jaxlm.data.synthetic import function_calls as calls
    from jaxlm.decoding import DecoderStepper, GenerationConfig, generate
    from jaxlm.models import Decoder
    from jaxlm.verify.plans import plans_equal

    prompts = [calls.prompt(example) for example in examples]
    end = calls.VOCABULARY.index(calls.END)
    settings = GenerationConfig(max_new_tokens=72, temperature=0.0)
    found = generate(DecoderStepper(Decoder(config.model)), params, prompts, settings, stop_ids=(end,))
    texts = [calls.decode(ids[:length].tolist()) for ids, length in zip(found.tokens[:, 0], found.lengths[:, 0])]
    return statistics.fmean(plans_equal(text, e.plan) for text, e in zip(texts, examples, strict=True))
