"""Natural GaLore: gradients in a low-rank subspace, divided by their empirical Fisher matrix before Adam.

Das, "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning", 2024, arXiv 2410.16029.
The paper: validation loss 0.01 to 0.1 below GaLore's in pretraining, near full rank's; in fine-tuning for function
calls more right plans than LoRA.

    python -m experiments.optimization.natural_galore                 # small
    python -m experiments.optimization.natural_galore --preset llama_60m --data.path 'c4/*.jsonl.gz'     # on TPU v5e-8

Three parts. A quadratic with ill-conditioned Hessian, with and without noise, shows what the damping decides. A small
language model is pretrained with Adam, GaLore, Natural GaLore (the paper's absolute damping, and damping relative to
the gradients) and in low rank. A toy of function calling is fine-tuned in full, with LoRA, GaLore and Natural GaLore,
and judged by whether the plan's graph is right. Arms are tuned over three learning rates (and more where the best lies
at an edge) with one seed, and judged with others on other data.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11; 24 minutes beside other jobs): held-out loss 3.71 with GaLore,
3.74 and 3.81 with Natural GaLore (absolute, relative), 3.91 with Adam, 4.61 in low rank; right plans 45 % in full, 50 %
with LoRA, 31 % with GaLore, 46 and 43 % with Natural GaLore. So in pretraining the Fisher matrix does not help here, in
fine-tuning it does, though not beyond LoRA; on the quadratic it helps with relative damping only.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import bases, published, runner
from experiments.bases import ArmResult, MeshStudyConfig, StudyConfig
from experiments.checks import check_counts, check_rates
from experiments.optimization.natural_galore_runs import QUADRATIC, pretraining_arms, run_quadratic, run_tools
from jaxlm.data.prepare import DataConfig
from jaxlm.data.synthetic.function_calls import VOCABULARY
from jaxlm.models.config import DecoderConfig
from jaxlm.reporting import Claim, Figure, Report, Series, Table
from jaxlm.reporting.figures import smooth


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

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, "base_steps", "examples", "rank")
        check_rates(self, "rates")


@dataclasses.dataclass(frozen=True)
class Config(MeshStudyConfig):
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
        check_counts(self, "rank", "period", "history", "quadratic_seeds")
        check_rates(self, "rates", "adam_rates")


SMALL = Config(
    **bases.SMALL,
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
        **bases.SMOKE,
        steps=3,
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


def report(
    quadratic: Mapping[tuple[str, float], Sequence[float]],
    pretraining: Mapping[str, ArmResult],
    tools: Mapping[str, tuple[ArmResult | None, Sequence[float]]],
) -> Report:
    """Tables, figures and claims of finished parts."""
    noises = sorted({noise for _, noise in quadratic})
    rows = tuple((name, *(statistics.fmean(quadratic[name, noise]) for noise in noises)) for name in QUADRATIC)
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
