"""Eight small language models as a population and as single runs: time, and whether the results are the same bits.

    python -m experiments.benchmarks.population                    # two minutes on two CPU cores

Single runs are one compiled program called once for each member; the population is one program over all of them, by
`lax.map` (what CPUs should take) and by `vmap`. Compilation is left out on all sides. Sides take turns; the fastest of
three rounds counts.
"""

import dataclasses
import time
from typing import Any

from experiments import runner
from experiments.checks import check_counts


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    members: int = 8
    steps: int = 20
    rounds: int = 3

    def __post_init__(self):
        check_counts(self, "members", "steps", "rounds")


def run(config: Config) -> None:
    """Measures and prints."""
    found = measure(config)
    alone = found["single runs"]
    for how, (seconds, cpu_seconds) in found.items():
        ratios = f"{seconds / alone[0]:.2f} and {cpu_seconds / alone[1]:.2f} of single runs"
        print(f"{how}: {seconds:.2f} s, {cpu_seconds:.2f} s of CPU time, {ratios}")


def measure(config: Config) -> dict[str, tuple[float, float]]:
    """Seconds, and seconds of CPU time (which other work on the machine disturbs less), by how members are trained."""
    import jax
    import numpy as np

    populations = {how: _population(config, how) for how in ("loop", "map", "vmap")}
    members = _members(config)
    times: dict[str, list[tuple[float, float]]] = {how: [] for how in populations}
    outcomes: dict[str, Any] = {}
    for turn in range(config.rounds + 1):
        for how, population in populations.items():
            started = time.perf_counter(), time.process_time()
            outcomes[how] = population.train(members, keep_params=True)
            if turn:  # the first compiles
                times[how].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    for how in ("map", "vmap"):
        same = [
            np.array_equal(a, b)
            for one, other in zip(outcomes["loop"], outcomes[how])
            for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params))
        ]
        print(f"{how}: {sum(same)} of {len(same)} trained arrays are those of single runs to the bit")
    named = {"loop": "single runs", "map": "lax.map", "vmap": "vmap"}
    return {named[how]: tuple(map(min, zip(*found))) for how, found in times.items()}


def _members(config: Config) -> list[Any]:
    from jaxlm.training import Member

    return [Member(f"{i}", i, {"learning_rate": 1e-3 * (i + 1)}) for i in range(config.members)]


def _population(config: Config, how: str) -> Any:
    import jax
    import jax.numpy as jnp

    from jaxlm.models import Decoder, DecoderConfig
    from jaxlm.objectives import CausalLM
    from jaxlm.optim import FromHparams, adamw
    from jaxlm.training import Population, init_state, make_step

    model = Decoder(DecoderConfig(1024, num_layers=2, embed_dim=96, num_heads=4, mlp_dim=256, max_length=128))
    tx = adamw(FromHparams(), axes=model.axes())

    def sample(key: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        tokens = jax.random.randint(jax.random.fold_in(key, step), (16, 129), 0, 1024)
        weights = jnp.ones((16, 128))
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights}

    return Population(
        lambda key, hparams: init_state(model.init(key)["params"], tx, key, hparams=hparams),
        make_step(CausalLM(model), tx),
        sample,
        config.steps,
        how=how,
    )


if __name__ == "__main__":
    runner.tool(__name__)
