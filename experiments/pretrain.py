"""Pretrains a decoder on text: tokenizer, packing, training, evaluation, checkpoints, samples.

With no options it trains a 7M-parameter Llama on the source code of the running Python's own standard library:

    python -m experiments.pretrain                      # preset small: about 5 minutes on two CPU cores
    python -m experiments.pretrain --data.path notes/ --out runs/notes
    python -m experiments.pretrain --data.path code.jsonl.gz books/ --data.weights 0.7 0.3

The same command again resumes from the last checkpoint, after any kind of stop, and goes on with exactly the losses
of a run that was never stopped. Sample from a run with `python -m experiments.generate --checkpoint RUN`.

Expect of `small`: bits per byte of held-out files from 3.31 before to 1.87 after (two x86 cores, jax 0.10.2, 2026-11).
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import runner
from experiments.checks import check_counts
from jaxlm.core.configs import to_dict
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.policies import STORED, PrecisionConfig
from jaxlm.core.precision import BFLOAT16
from jaxlm.core.sharding import MeshConfig
from jaxlm.data.prepare import DataConfig, Prepared, mixture_weights, prepare_data
from jaxlm.models.config import DecoderConfig
from jaxlm.models.presets import preset as model_preset
from jaxlm.optim.config import OptimizerConfig
from jaxlm.reporting import Report, Sample, Table


@dataclasses.dataclass(frozen=True)
class Config:
    """A pretraining run."""

    model: DecoderConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 200
    batch_size: int = 16
    """Rows in the global batch, each of `data.sequence_length` tokens."""
    micro_batches: int = 1
    """Pieces that a batch is cut into to save memory; the gradient is exactly that of the whole."""
    z_loss: float = 0.0
    seed: int = 0
    evaluate_every: int = 0
    """Steps between evaluations; 0: only before and after."""
    evaluate_batches: int = 16
    """Batches of validation text in an evaluation, of each source."""
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    non_finite: str = "stop"
    """What a loss or gradient that is not finite does: `stop` the run, or `skip` the step and count it."""
    max_skipped: int = 10
    """With `skip`: steps skipped in a row after which the run stops all the same."""
    spike_threshold: float = 6.0
    """A loss so many robust standard deviations above the median of the last 64 is written down in `incidents`, with
    where its batch comes from; 0: none. (`optimizer.skip_spikes` leaves the updates of such gradients out.)"""
    profile_steps: int = 0
    """Steps to trace for TensorBoard, from the tenth on."""
    prompts: tuple[str, ...] = ("def ", "import ", "class ")
    """What the samples at the end continue."""
    sample_tokens: int = 64

    def __post_init__(self):
        check_counts(
            self, "steps", "batch_size", "micro_batches", "checkpoint_every", "keep_checkpoints", "max_skipped"
        )
        if not self.spike_threshold >= 0:
            raise ConfigError(f"spike_threshold is {self.spike_threshold}, expected 0 or more")
        if self.non_finite not in ("stop", "skip"):
            raise ConfigError(f"non_finite is '{self.non_finite}' (valid: skip, stop)")


SMALL = Config(
    model=DecoderConfig(vocab_size=4096, num_layers=6, embed_dim=256, num_heads=4, mlp_dim=688, max_length=256),
    data=DataConfig(vocab_size=4096, sequence_length=256),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    steps=200,
    evaluate_every=100,
)

SMOKE = dataclasses.replace(
    SMALL,
    model=DecoderConfig(vocab_size=512, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64, max_length=64),
    data=DataConfig(tokenizer="byte", sequence_length=64),
    steps=4,
    batch_size=8,
    evaluate_every=0,
    evaluate_batches=2,
    checkpoint_every=2,
    prompts=("def ",),
    sample_tokens=8,
)


def _accelerator(name: str, mesh: MeshConfig, *, batch: int, length: int, steps: int, rate: float, **more) -> Config:
    """A published model in bfloat16 activations on an accelerator mesh; `more` replaces fields."""
    remat, micro, precision = more.pop("remat", "full"), more.pop("micro_batches", 1), more.pop("precision", "float32")
    model = model_preset(name, precision=BFLOAT16, remat=remat, max_length=length)
    return Config(
        model=model,
        data=DataConfig(vocab_size=model.vocab_size, sequence_length=length),
        optimizer=OptimizerConfig(learning_rate=rate, warmup=0.01, decay=0.1, end_fraction=0.0),
        precision=PrecisionConfig(precision),
        mesh=mesh,
        steps=steps,
        batch_size=batch,
        micro_batches=micro,
        z_loss=1e-4,
        evaluate_every=1000,
        evaluate_batches=8,
        checkpoint_every=1000,
    )


PRESETS: Mapping[str, Config] = {
    "smoke": SMOKE,
    "small": SMALL,
    # TPU v5e-8 (one host): 1M tokens a step, 8 rows a chip at a time; compiled for it: 10 of 17 GB.
    "smollm2_135m": _accelerator(
        "smollm2-135m",
        MeshConfig(data=8),
        batch=512,
        length=2048,
        steps=20_000,
        rate=3e-3,
        micro_batches=8,
        remat="dots",
    ),
    # TPU v5p-64 (32 chips, 8 hosts), 16 rows a chip; compiled for it: 40 of 102 GB.
    "llama_1b": _accelerator(
        "llama-1b", MeshConfig(data=1, fsdp=32), batch=512, length=2048, steps=100_000, rate=1e-3, remat="dots"
    ),
    # TPU v5e-256: everything sharded over all chips, two rows of 4,096 tokens a chip at a time; compiled: 6 of 17 GB.
    "llama_7b": _accelerator(
        "llama-2-7b", MeshConfig(data=1, fsdp=256), batch=1024, length=4096, steps=250_000, rate=3e-4, micro_batches=2
    ),
    # One H200; compiled for it: 7 and 33 of 141 GB.
    "smollm2_135m_h200": _accelerator(
        "smollm2-135m", MeshConfig(), batch=512, length=2048, steps=20_000, rate=3e-3, micro_batches=16
    ),
    "llama_1b_h200": _accelerator(
        "llama-1b", MeshConfig(), batch=512, length=2048, steps=100_000, rate=1e-3, micro_batches=32
    ),
    # The same in 8 bits: projections in FP8 on an H200 (delayed scaling), in int8 on TPU v5e-64 (SwitchBack).
    "llama_1b_fp8_h200": _accelerator(
        "llama-1b", MeshConfig(), batch=512, length=2048, steps=100_000, rate=1e-3, micro_batches=32,
        precision="fp8_delayed",
    ),
    "llama_1b_int8": _accelerator(
        "llama-1b", MeshConfig(data=1, fsdp=64), batch=512, length=2048, steps=100_000, rate=1e-3, micro_batches=2,
        precision="int8_switchback",
    ),
}  # fmt: skip


TOPOLOGIES: Mapping[str, str] = {
    "smollm2_135m": "v5e:2x4",
    "llama_1b": "v5p:2x4x4",
    "llama_7b": "v5e:16x16",
    "smollm2_135m_h200": "h200",
    "llama_1b_h200": "h200",
    "llama_1b_fp8_h200": "h200",
    "llama_1b_int8": "v5e:8x8",
}
"""The machine that each accelerator preset is for: `python -m experiments.plan --preset NAME` compiles it for that."""


def make_program(config: Config, devices: Any = None) -> Any:
    """The `jaxlm.training.Program` of a configuration, on its mesh over `devices` (by default all)."""
    from jaxlm.core.sharding import make_mesh
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training import Program

    policy, model_config = config.precision.policy(), config.model
    if policy.master in STORED:  # Parameters are in that format from the start, and so in checkpoints.
        params = model_config.precision.params if policy.master == "float32" else policy.master
        precision = dataclasses.replace(model_config.precision, params=params)
        model_config = dataclasses.replace(model_config, precision=precision)
    model = Decoder(model_config)
    tx = config.optimizer.make(config.steps, model.axes())
    objective = CausalLM(model, z_loss=config.z_loss)
    mesh = make_mesh(config.mesh, devices)
    program = Program(model, objective, tx, mesh, config.micro_batches, policy=policy)
    program.check_batch(config.batch_size)
    model.config.sharding_rules(program.mesh)
    _ = program.recipe  # a policy that the devices cannot follow is refused here
    return program


def run(config: Config, out: Path) -> Report:
    """Trains from the last checkpoint in `out`, or from the start, and reports."""
    from jaxlm.core import distributed
    from jaxlm.training import exclusive

    distributed.initialize()
    with exclusive(out):
        return _train(config, out)


def _train(config: Config, out: Path) -> Report:
    from jaxlm.core import distributed, trees
    from jaxlm.models.flops import train_flops_per_token
    from jaxlm.training import keep_tokenizer, train_in_folder

    program = make_program(config)
    data = distributed.main_first(lambda: prepare_data(config.data, seed=config.seed))
    distributed.check_equal("the training data", data.train.fingerprint)
    check_vocabulary(config, data)
    keep_tokenizer(data.tokenizer, out / "tokenizer")
    process_index, process_count = program.data_share
    batches = make_batches(config, data, process_index=process_index, process_count=process_count)
    with contextlib.closing(batches):
        state = train_in_folder(
            out,
            program,
            batches,
            steps=config.steps,
            seed=config.seed,
            meta=meta(config, program, data),
            learning_rate=config.optimizer.schedule(config.steps),
            evaluate=make_evaluation(config, program, data),
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            non_finite=config.non_finite,
            max_skipped=config.max_skipped,
            spike_threshold=config.spike_threshold,
            flops_per_token=train_flops_per_token(config.model, config.data.sequence_length),
            profile_steps=config.profile_steps,
        )
    samples = write_samples(config, program, state.trainable, data)
    return report(config, out, trees.count(state.trainable), samples)


def make_batches(config: Config, data: Prepared, **processes: int) -> Any:
    """The training batches; `process_index` and `process_count` say which part of each."""
    from jaxlm.data.pipeline import make_train_iterator

    tokens = config.steps * config.batch_size * config.data.sequence_length
    return make_train_iterator(
        data.train,
        batch_size=config.batch_size,
        length=config.data.sequence_length,
        seed=config.seed,
        weights=mixture_weights(config.data, data.train, tokens),
        unit=config.data.unit,
        timeout=config.data.timeout,
        **processes,
    )


def recorded_batches(config: Config, out: Path) -> tuple[Any, Any, int]:
    """The batches of the run in `out` (whole ones, from the first on), its tokenizer, and how many steps it has."""
    from jaxlm.training import keep_tokenizer

    if not (out / "tokenizer").is_dir():
        raise CheckpointError(f"{out} has no tokenizer: the run ended before its data were ready")
    data = prepare_data(config.data, seed=config.seed)
    keep_tokenizer(data.tokenizer, out / "tokenizer")  # refuses another one
    return make_batches(config, data), data.tokenizer, config.steps


def check_vocabulary(config: Config, data: Prepared) -> None:
    """Raises `ConfigError` if the tokenizer has ids that the model does not."""
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {data.tokenizer.vocab_size} ids but model.vocab_size is {config.model.vocab_size}: "
            f"set --model.vocab_size {data.tokenizer.vocab_size} or more, or a smaller --data.vocab_size"
        )


def meta(config: Config, program: Any, data: Prepared) -> dict[str, Any]:
    """What a checkpoint holds beside the state and the place in the data, to use the model without this module."""
    return {
        "model": to_dict(program.model.config),
        "precision": to_dict(config.precision),
        "config": to_dict(config),
        "tokenizer": data.tokenizer.fingerprint,
    }


def make_evaluation(config: Config, program: Any, data: Prepared) -> Any:
    """`evaluate(params) -> {"eval/<source>/bits_per_byte": ...}` on the validation text of each source."""
    import numpy as np

    from jaxlm.data.pipeline import eval_batches
    from jaxlm.data.tokenizers import token_byte_lengths
    from jaxlm.evals import likelihood, make_sums

    lengths = token_byte_lengths(data.tokenizer)
    lengths = np.pad(lengths, (0, config.model.vocab_size - len(lengths)))
    sums = program.jit(make_sums(program.recipe.objective, lengths))
    process_index, process_count = program.data_share

    def evaluate(params: Any) -> dict[str, float]:
        results = {}
        for source in data.validation.source_names:
            batches = eval_batches(
                data.validation,
                source,
                batch_size=config.batch_size,
                length=config.data.sequence_length,
                max_batches=config.evaluate_batches,
                process_index=process_index,
                process_count=process_count,
            )
            found = likelihood(sums, params, batches, program.put)
            for name in ("loss", "perplexity", "bits_per_byte"):
                results[f"eval/{source}/{name}"] = getattr(found, name)
        return results

    return evaluate


def write_samples(config: Config, program: Any, params: Any, data: Prepared) -> tuple[Sample, ...]:
    """Continues the configured prompts."""
    from jaxlm.core import sharding
    from jaxlm.decoding import DecoderStepper, GenerationConfig, generate_text

    if not config.prompts or not config.sample_tokens:
        return ()
    settings = GenerationConfig(max_new_tokens=config.sample_tokens, temperature=0.8, top_p=0.95, seed=config.seed)
    with sharding.use_mesh(program.mesh, program.rules):
        params = program.recipe.served(params)
        completions = generate_text(
            DecoderStepper(program.model), params, data.tokenizer, list(config.prompts), settings
        )
    return tuple(Sample(prompt, found[0].text) for prompt, found in zip(config.prompts, completions, strict=True))


def report(config: Config, out: Path, parameters: int, samples: tuple[Sample, ...]) -> Report:
    """The report of a finished run, from its log."""
    from jaxlm.reporting.run_folder import evaluations, read_metrics, series

    rows = read_metrics(out)
    table, numbers = [], {"parameters": parameters, "steps": config.steps}
    losses = evaluations(rows, "loss")
    for source, (_, bits) in evaluations(rows, "bits_per_byte").items():
        _, loss = losses[source]
        table.append((source, bits[0], bits[-1], loss[0], loss[-1]))
        numbers[f"bits per byte, {source}"] = bits[-1]
    _, speeds = series(rows, "tokens_per_second")
    numbers["tokens per second, median"] = sorted(speeds)[len(speeds) // 2] if speeds else None
    columns = ("source", "bits per byte before", "after", "loss before", "after")
    return Report(
        title="Pretraining",
        summary="A decoder trained from scratch; bits per byte on text that it was not trained on.",
        numbers=numbers,
        tables=(Table("Validation", columns, tuple(table)),),
        samples=samples,
    )


if __name__ == "__main__":
    runner.main(__name__)
