"""Natural GaLore: gradients in a low-rank subspace, divided by their empirical Fisher matrix before Adam.

Das, "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning", 2024, arXiv 2410.16029.
The paper: validation loss 0.01 to 0.1 below GaLore's in pretraining, near full rank's; in fine-tuning for function
calls more right plans than LoRA.

    python -m experiments.optimization.natural_galore                 # small
    python -m experiments.optimization.natural_galore --preset llama_60m --data.path 'c4/*.json.gz'     # on TPU v5e-8

Three parts. A quadratic with ill-conditioned Hessian, with and without noise, shows what the damping decides. A small
language model is pretrained with Adam, GaLore, Natural GaLore (the paper's absolute damping, and damping relative to
the gradients) and in low rank. A toy of function calling is fine-tuned in full, with LoRA, GaLore and Natural GaLore,
and judged by whether the plan's graph is right. Arms are tuned over three learning rates (and more where the best lies
at an edge) with one seed, and judged with others on other data.
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import bases, published, runner
from experiments.bases import Arm, ArmResult, StudyConfig
from jaxlm.core.errors import ConfigError
from jaxlm.data.prepare import DataConfig
from jaxlm.data.synthetic.function_calls import VOCABULARY
from jaxlm.models.config import DecoderConfig
from jaxlm.optim.config import LowRankOptions, OptimizerConfig
from jaxlm.peft.parametrizations import Parametrization
from jaxlm.reporting import Claim, Figure, Report, Series, Table
from jaxlm.reporting.figures import smooth

_SCHEDULE: dict[str, Any] = {
    "warmup": 0.1, "decay": 0.9, "decay_shape": "cosine", "end_fraction": 0.1, "weight_decay": 0.0, "clip_norm": None,
    "b2": 0.999, "eps": 1e-6,
}  # fmt: skip
_DAMPINGS = {"absolute": 1e-3, "relative": 1.0}
_QUADRATIC = ("galore", "natural, 0.001", "natural, 1", "natural, relative")


@dataclasses.dataclass(frozen=True)
class ToolConfig(StudyConfig):
    """Fine-tuning for function calls, from a model that knows requests without nested texts."""

    base_steps: int = 400
    base_rate: float = 4e-3
    examples: int = 512
    """To fine-tune on; `judge_rows` others to tune by, and as many to judge by."""
    depth: int = 2
    """How deep texts are nested."""
    rank: int = 4
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """All three parts; `steps`, `seeds` and `model` are those of pretraining."""

    rank: int = 24
    """Of subspaces and factors: a quarter of the width."""
    period: int = 50
    """Steps between two subspaces."""
    history: int = 10
    """Gradients in the Fisher matrix."""
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    """Of GaLore and Natural GaLore, whose kernels move at a quarter of it."""
    adam_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Of Adam and low rank."""
    quadratic_seeds: int = 3
    tools: ToolConfig | None = None
    """`None` leaves this part out."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "period", "history", "quadratic_seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")


SMALL = Config(
    model=DecoderConfig(vocab_size=1024, num_layers=2, embed_dim=96, num_heads=4, mlp_dim=256, max_length=128),
    data=DataConfig(vocab_size=1024, sequence_length=128),
    steps=400,
    batch_size=8,
    tools=ToolConfig(
        model=DecoderConfig(
            vocab_size=len(VOCABULARY), num_layers=2, embed_dim=64, num_heads=4, mlp_dim=176, max_length=128
        ),
        data=DataConfig(sequence_length=96),
        steps=200,
        batch_size=16,
        judge_rows=128,
    ),
)

# Steps and ranks in the paper. `--adam_rates` tunes full rank.
_PUBLISHED: Mapping[str, tuple[int, int]] = {
    "llama_60m": (10_000, 128), "llama_130m": (20_000, 256), "llama_350m": (60_000, 256), "llama_1b": (100_000, 512),
}  # fmt: skip

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        model=DecoderConfig(vocab_size=512, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, max_length=32),
        data=DataConfig(tokenizer="byte", sequence_length=32),
        steps=3,
        batch_size=4,
        judge_rows=8,
        seeds=(1,),
        rank=4,
        period=2,
        history=2,
        rates=(1e-2,),
        adam_rates=(4e-3,),
        quadratic_seeds=1,
        tools=None,
    ),
    "small": SMALL,
    **{
        name: published.at_size(
            SMALL, name, steps=steps, rank=rank, period=200, history=20, rates=(1e-2,), adam_rates=(1e-3,), tools=None
        )
        for name, (steps, rank) in _PUBLISHED.items()
    },
}
TOPOLOGIES = {name: published.TOPOLOGIES[name] for name in _PUBLISHED}


def run(config: Config, out: Path) -> Report:
    """Runs the parts; what is finished in `out` is not repeated."""
    quadratic = run_quadratic(config.quadratic_seeds)
    text = bases.load_text(config)
    pretraining = bases.compare_arms(config, pretraining_arms(config), text, out / "pretraining")
    tools = {} if config.tools is None else run_tools(config.tools, out / "tools")
    return report(quadratic, pretraining, tools)


def make_program(config: Config, devices: Any = None) -> tuple[Any, Any]:
    """Natural GaLore's training program of a preset with a mesh, for `experiments.plan`."""
    return published.make_program(config, pretraining_arms(config)["natural, absolute"], devices=devices)


def pretraining_arms(config: Config) -> dict[str, Arm]:
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
    for name in _QUADRATIC:
        compiled = jax.jit(functools.partial(best, transform(name)))
        for noise in (0.0, 0.02):
            found[name, noise] = [float(compiled(jax.random.key(seed), noise)) for seed in range(seeds)]
    return found


def run_tools(config: ToolConfig, out: Path) -> dict[str, tuple[ArmResult | None, list[float]]]:
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


def tool_arms(config: ToolConfig) -> dict[str, Arm]:
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


def plan_accuracy(config: ToolConfig, params: Any, examples: Sequence[Any]) -> float:
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


def report(
    quadratic: Mapping[tuple[str, float], Sequence[float]],
    pretraining: Mapping[str, ArmResult],
    tools: Mapping[str, tuple[ArmResult | None, Sequence[float]]],
) -> Report:
    """Tables, figures and claims of finished parts."""
    noises = sorted({noise for _, noise in quadratic})
    rows = tuple((name, *(statistics.fmean(quadratic[name, noise]) for noise in noises)) for name in _QUADRATIC)
    tables = [
        Table("Quadratic: final over initial loss", ("method", *(f"noise {noise:g}" for noise in noises)), rows),
        Table(
            "Pretraining: held-out loss, nats a token",
            ("method", "learning rate", "loss", "seeds apart", "milliseconds a step", "at an edge"),
            tuple(
                (name, r.rate, r.loss, r.spread, 1000 * r.seconds_a_step, r.is_at_an_edge)
                for name, r in pretraining.items()
            ),
            f"Natural GaLore keeps {_memory_note()}.",
        ),
    ]
    if tools:
        tables.append(
            Table(
                "Function calls: right plans",
                ("method", "learning rate", "loss", "right plans", "seeds apart"),
                tuple(
                    (name, r and r.rate, r and r.loss, statistics.fmean(shares), max(shares) - min(shares))
                    for name, (r, shares) in tools.items()
                ),
            )
        )
    curves = tuple(Series(name, range(1, len(r.history) + 1), smooth(r.history)) for name, r in pretraining.items())
    return Report(
        title="Natural GaLore",
        summary="Low-rank gradients divided by their empirical Fisher matrix, beside GaLore, Adam and low rank.",
        numbers={f"loss, {name}": r.loss for name, r in pretraining.items()},
        claims=tuple(claims(quadratic, pretraining, tools)),
        tables=tuple(tables),
        figures=(Figure("Training loss", curves, "step", "nats a token (smoothed)"),),
    )


def claims(
    quadratic: Mapping[tuple[str, float], Sequence[float]],
    pretraining: Mapping[str, ArmResult],
    tools: Mapping[str, tuple[ArmResult | None, Sequence[float]]],
) -> list[Claim]:
    """The paper's claims, and what the damping decides."""
    found = []

    def on_quadratic(statement: str, method: str, noise: float, better: bool) -> None:
        pairs = list(zip(quadratic[method, noise], quadratic["galore", noise], strict=True))
        measured = ", ".join(f"{mine:.4f} and {galore:.4f}" for mine, galore in pairs)
        found.append(Claim(statement, None, measured, all((mine < galore) == better for mine, galore in pairs)))

    on_quadratic("Quadratic, every seed: with relative damping better than GaLore.", "natural, relative", 0.0, True)
    on_quadratic("Quadratic with noise, every seed: the same.", "natural, relative", 0.02, True)
    statement = "Quadratic, every seed: with the paper's damping of 0.001 worse than GaLore (gradients are large here)."
    on_quadratic(statement, "natural, 0.001", 0.0, False)

    def compare(statement: str, paper: str | None, first: str, second: str) -> None:
        a, b = pretraining[first].loss, pretraining[second].loss
        found.append(Claim(statement, paper, f"loss {a:.4f} and {b:.4f}", a < b))

    paper = "60M log-perplexity 3.53 and 3.56"
    compare("Natural GaLore (absolute damping) beats GaLore.", paper, "natural, absolute", "galore")
    compare("Natural GaLore (relative damping) beats GaLore.", None, "natural, relative", "galore")
    compare("Natural GaLore (absolute damping) beats low rank.", "3.53 and 4.35", "natural, absolute", "low_rank")
    a, b = pretraining["natural, absolute"].loss, pretraining["adam"].loss
    statement = "Natural GaLore (absolute damping) is within 1 % of full rank."
    found.append(Claim(statement, "3.53 and 3.52", f"loss {a:.4f} and {b:.4f}", a <= 1.01 * b))
    if tools:
        shares = {name: statistics.fmean(values) for name, (_, values) in tools.items()}
        measured = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        statement = "Function calls: Natural GaLore (absolute damping) makes more right plans than LoRA."
        holds = shares["natural, absolute"] > shares["lora"]
        found.append(Claim(statement, "83.09 % and 80.06 %", measured, holds))
    return found


def _memory_note() -> str:
    """What the history takes beside GaLore's state, for the 1B model at the paper's rank."""
    import jax
    import jax.numpy as jnp

    from jaxlm.models import Decoder
    from jaxlm.models.presets import preset
    from jaxlm.optim.memory import state_bytes

    model = Decoder(preset("llama-1b"))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.abstract_params())
    natural, galore = (state_bytes(name, params, model.axes(), rank=512) / 1e9 for name in ("natural_galore", "galore"))
    return f"a history too: at 1B, rank 512, state of {natural:.1f} GB against GaLore's {galore:.1f} in bfloat16"


if __name__ == "__main__":
    runner.main(__name__)
