"""Studies at published sizes: the runs of an arm on a mesh, each in a run folder, from data that stream.

What `experiments.bases` trains as populations on one device, a preset with a `mesh` trains so: `MeshRuns` stands in for
a `Population`. Runs stop and resume as those of `experiments.pretrain` do, and `python -m experiments.plan --experiment
optimization.scale --preset llama_7b` compiles their step for the machine that `TOPOLOGIES` names. The text is the
user's: `--data.path 'c4/*.jsonl.gz'`.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bases import Arm, Keeper, MeshStudyConfig, arm_parts
from jaxlm.core.configs import fingerprint
from jaxlm.core.errors import CheckpointError, ConfigError, NonFiniteError
from jaxlm.core.json_files import number
from jaxlm.core.precision import BFLOAT16
from jaxlm.core.sharding import MeshConfig
from jaxlm.data.prepare import DataConfig
from jaxlm.models.presets import preset


class Size(NamedTuple):
    """A published model, the machine that it is for here, and how it lies on it."""

    model: str
    topology: str
    mesh: MeshConfig
    micro_batches: int = 1


SIZES: Mapping[str, Size] = {
    "llama_60m": Size("llama-60m", "v5e:2x4", MeshConfig(data=8)),
    "llama_130m": Size("llama-130m", "v5e:2x4", MeshConfig(data=8)),
    "llama_350m": Size("llama-350m", "v5e:2x4", MeshConfig(data=1, fsdp=8), 2),
    "llama_1b": Size("llama-1b", "v5e:4x4", MeshConfig(data=1, fsdp=16)),
    "llama_7b": Size("llama-7b", "v5e:8x8", MeshConfig(data=1, fsdp=64)),
}
"""The LLaMA models of GaLore (Zhao et al. 2024) and after: 512 rows of 256 tokens a step."""

TOPOLOGIES: Mapping[str, str] = {name: size.topology for name, size in SIZES.items()}


def at_size(config: MeshStudyConfig, name: str, **changes: Any) -> Any:
    """A study's configuration at one of `SIZES`; `changes`: fields, `steps` among them."""
    size = SIZES[name]
    model = preset(size.model, precision=BFLOAT16, remat="dots")
    fields = {
        "model": model,
        "data": DataConfig(vocab_size=model.vocab_size, sequence_length=256),
        "batch_size": 512,
        "judge_rows": 8192,
        "seeds": (1,),
        "mesh": size.mesh,
        "micro_batches": size.micro_batches,
    }
    return dataclasses.replace(config, **{**fields, **changes})


class MeshRuns:
    """The runs of an arm on the study's mesh, as a `Population` to `tune_and_judge`.

    A run that diverges ends at that step; its losses are NaN, and others go on. Half of the held-out batches that are
    evaluated are to tune by, half to judge by.
    """

    def __init__(self, config: MeshStudyConfig, arm: Arm):
        from jaxlm.core import distributed

        distributed.initialize()
        self.config, self.arm = config, arm

    def train(self, members: Sequence[Any], *, folder: Path, report: Any = None, **_: Any) -> list[Any]:
        """The members' outcomes, trained one after the other in folders of `folder`; finished ones are read."""
        from jaxlm.training import Outcome

        outcomes = []
        for member in members:
            run = folder / member.name.replace(" ", "_").replace(",", "")
            is_new = not (run / "outcome.json").exists()
            keep = Keeper(run, (self.config, self.arm), says=False)
            kept = keep("outcome", functools.partial(self._train, member, run))
            history = [number(loss) for loss in kept["history"]]
            results = {name: number(loss) for name, loss in kept["results"].items()}
            outcome = Outcome(member, {"loss": history}, results, kept["seconds"])
            if is_new and report is not None:
                report(outcome)
            outcomes.append(outcome)
        return outcomes

    def _train(self, member: Any, folder: Path) -> dict[str, Any]:
        """Trains one run, from its last checkpoint or the start, and gives what is kept of it."""
        from jaxlm.data.pipeline import make_train_iterator
        from jaxlm.data.prepare import mixture_weights
        from jaxlm.models.flops import train_flops_per_token
        from jaxlm.reporting.run_folder import read_metrics, series
        from jaxlm.training import exclusive, keep_tokenizer, train_in_folder

        c, data, rate = self.config, self._data, member.hparams["learning_rate"]
        mark = fingerprint((c, self.arm, rate, member.seed))

        def check_meta(meta: Mapping[str, Any]) -> None:
            if meta.get("run") != mark:
                raise CheckpointError(f"{folder} is of a run with other settings: choose another --out")

        with exclusive(folder):
            program, frozen = make_program(c, self.arm, rate=rate, seed=member.seed)
            keep_tokenizer(data.tokenizer, folder / "tokenizer")
            process_index, process_count = program.data_share
            batches = make_train_iterator(
                data.train,
                batch_size=c.batch_size,
                length=c.data.sequence_length,
                seed=member.seed,
                weights=mixture_weights(c.data, data.train, c.steps * c.batch_size * c.data.sequence_length),
                unit=c.data.unit,
                timeout=c.data.timeout,
                process_index=process_index,
                process_count=process_count,
            )
            # What diverged would diverge again: it is kept as that, and tuning goes on with other rates.
            with contextlib.closing(batches), contextlib.suppress(NonFiniteError):
                train_in_folder(
                    folder,
                    program,
                    batches,
                    steps=c.steps,
                    seed=member.seed,
                    frozen=frozen,
                    meta={"run": mark},
                    check_meta=check_meta,
                    learning_rate=dataclasses.replace(self.arm.optimizer, learning_rate=rate).schedule(c.steps),
                    evaluate=self._evaluation(program, frozen),
                    evaluate_every=c.checkpoint_every,
                    checkpoint_every=c.checkpoint_every,
                    flops_per_token=train_flops_per_token(c.model, c.data.sequence_length),
                )
        rows = read_metrics(folder)
        history = series(rows, "train/loss")[1][: c.steps]
        results = dict.fromkeys(("tuning", "judge"), math.nan)
        if len(history) == c.steps and math.isfinite(history[-1]):
            results = {name: series(rows, f"eval/{name}/loss")[1][-1] for name in results}
        speeds = sorted(series(rows, "tokens_per_second")[1])
        tokens = c.steps * c.batch_size * c.data.sequence_length
        seconds = tokens / speeds[len(speeds) // 2] if speeds else math.nan
        history += [math.nan] * (c.steps - len(history))
        return {"results": results, "history": history, "seconds": seconds}

    @functools.cached_property
    def _data(self) -> Any:
        from jaxlm.core import distributed
        from jaxlm.data.prepare import prepare_data

        data = distributed.main_first(lambda: prepare_data(self.config.data))
        distributed.check_equal("the training data", data.train.fingerprint)
        if data.tokenizer.vocab_size > self.config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {data.tokenizer.vocab_size} ids but model.vocab_size is "
                f"{self.config.model.vocab_size}"
            )
        return data

    def _evaluation(self, program: Any, frozen: Any) -> Any:
        """`evaluate(trainable) -> {"eval/tuning/loss": ..., "eval/judge/loss": ...}`, in nats a token."""
        import numpy as np

        from jaxlm.data.pipeline import eval_batches
        from jaxlm.data.tokenizers import token_byte_lengths
        from jaxlm.evals import likelihood, make_sums

        c, data = self.config, self._data
        lengths = token_byte_lengths(data.tokenizer)
        sums = make_sums(program.recipe.objective, np.pad(lengths, (0, c.model.vocab_size - len(lengths))))
        compiled = program.jit(lambda trainable, frozen, batch: sums(program.build(trainable, frozen, 0), batch))
        count = -(-c.judge_rows // c.batch_size)
        process_index, process_count = program.data_share

        def batches(begin: int) -> Any:
            for source in data.validation.source_names:
                found = eval_batches(
                    data.validation,
                    source,
                    batch_size=c.batch_size,
                    length=c.data.sequence_length,
                    max_batches=begin + count,
                    process_index=process_index,
                    process_count=process_count,
                )
                yield from itertools.islice(found, begin, None)

        def evaluate(trainable: Any) -> dict[str, float]:
            def part(begin: int) -> float:
                return likelihood(lambda p, b: compiled(p, frozen, b), trainable, batches(begin), program.put).loss

            return {"eval/tuning/loss": part(0), "eval/judge/loss": part(count)}

        return evaluate


def make_program(
    config: MeshStudyConfig, arm: Arm, *, rate: float | None = None, seed: int = 0, devices: Any = None
) -> tuple[Any, Any]:
    """The `Program` of an arm on the study's mesh, and the step's frozen argument.

    With `devices`, which may be absent ones, the parameters that a parametrization begins from are shapes.
    """
    import jax

    from jaxlm.core import sharding
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training import Program

    if config.mesh is None:
        raise ConfigError("this preset is for one device and has no mesh: take one of the published sizes")
    mesh = sharding.make_mesh(config.mesh, devices)
    model = Decoder(config.model)
    optimizer = dataclasses.replace(arm.optimizer, learning_rate=arm.rates[0] if rate is None else rate)
    parts = arm_parts(model, dataclasses.replace(arm, optimizer=optimizer), config.steps)
    program = Program(model, CausalLM(model), parts.tx, mesh, config.micro_batches, wrap=parts.wrap)
    program.check_batch(config.batch_size)
    rules = model.config.sharding_rules(mesh)
    if arm.parametrization.name == "dense":
        return program, None
    shapes = jax.eval_shape(parts.draw, jax.random.key(0))
    places = sharding.shardings(mesh, parts.axes, shapes, rules)
    if devices is None:
        with sharding.use_mesh(mesh, rules):
            params = jax.jit(parts.draw, out_shardings=places)(jax.random.key(seed))
    else:
        params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    start, frozen = parts.cut(params)
    return dataclasses.replace(program, start=start, build=parts.build), frozen
