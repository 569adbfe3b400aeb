"""What a run of `experiments.finetune` is made of: batches, program, evaluation, and what it leaves."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.core.errors import ConfigError
from jaxlm.reporting import Sample

if TYPE_CHECKING:
    from experiments.finetune import Config


def make_batches(config: "Config", found: Any, template: Any, mesh: Any) -> tuple[Any, Any, list[str]]:
    """Training and held-out batches (or `None`), and what became of the records in words."""
    import numpy as np

    from jaxlm.core.sharding import BATCH_AXES, data_share
    from jaxlm.data import chat_batches, chat_examples, chat_records
    from jaxlm.testing import toy_records

    data = config.data
    if data.sequence_length > found.config.max_length:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but the model's context is {found.config.max_length}"
        )
    kind = "chat" if config.objective == "sft" else "labeled" if config.objective == "kto" else "pair"
    read, examples, batches = {
        "chat": (chat_records.read_chats, chat_examples.chat_examples, chat_batches.ChatBatches),
        "pair": (chat_records.read_preferences, chat_examples.preference_examples, chat_batches.PairBatches),
        "labeled": (chat_records.read_labeled, chat_examples.labeled_examples, chat_batches.LabeledBatches),
    }[kind]
    records = [record for path in data.path for record in read(path)] if data.path else toy_records(kind)
    options: dict[str, Any] = {"length": data.sequence_length, "too_long": data.too_long}
    if kind == "chat":
        options["train_on"] = data.train_on
    held_out = round(data.validation * len(records)) if len(records) > 1 else 0
    order = np.random.default_rng(config.seed).permutation(len(records))
    chosen = {"training": sorted(order[held_out:]), "held out": sorted(order[:held_out])}
    process_index, process_count = data_share(mesh)
    place = {"seed": config.seed, "process_index": process_index, "process_count": process_count}
    notes, made, batch_size = [], {}, config.batch_size
    for name, rows in chosen.items():
        if not rows:
            made[name] = None
            continue
        found_examples, counts = examples([records[i] for i in rows], found.tokenizer, template, **options)
        notes.append(f"{name}: {counts.describe(data.sequence_length)}")
        if config.batch_samples and name == "training":
            pieces = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * config.micro_batches
            steps = config.steps or max(1, round(config.epochs * len(found_examples) / config.batch_samples))
            made[name] = chat_batches.SampleBatches(
                found_examples,
                samples=config.batch_samples,
                steps=steps,
                length=data.sequence_length,
                row_multiple=pieces,
                **place,
            )
            batch_size = made[name].batch_size // config.micro_batches
            notes.append(f"{config.batch_samples} samples a batch, in {made[name].batch_size} rows")
            continue
        made[name] = batches(found_examples, batch_size=batch_size, length=data.sequence_length, **place)
    return made["training"], made["held out"], notes


def make_program(config: "Config", found: Any, mesh: Any, steps: int) -> tuple[Any, dict[str, Any]]:
    """The training program, and what it leaves alone: the base, and the reference of preference objectives."""
    import jax

    from jaxlm.core import sharding, trees
    from jaxlm.interop.peft import check_adaptable
    from jaxlm.optim.roles import label
    from jaxlm.peft.lora import adapted_axes, add_lora, is_lora
    from jaxlm.training import Program

    params, model = found.params, found.model
    if config.method == "lora":
        if not config.merge:
            check_adaptable(found.config)
        params = add_lora(jax.random.key(config.seed), params, config.lora)
        axes = adapted_axes(params, model.axes())
        places = sharding.shardings(mesh, axes, params, model.config.sharding_rules(mesh))
        start, frozen = trees.partition(jax.device_put(params, places), is_lora, label(params, axes))
    else:
        axes, start, frozen = adapted_axes(params, model.axes()), params, None
    objective = make_objective(config, model)
    tx = config.optimizer.make(steps, axes)
    needs_copy = config.method == "full" and config.objective in ("dpo", "ipo", "kto")
    program = Program(model, objective, tx, mesh, config.micro_batches, start=start, build=build)
    return program, {"base": frozen, "reference": params if needs_copy else None}


def make_objective(config: "Config", model: Any) -> Any:
    """The objective that a configuration names."""
    from jaxlm.objectives import CPO, DPO, KTO, ORPO, CausalLM, SimPO

    beta = {} if config.beta is None else {"beta": config.beta}
    reference = {"reference": without_adapters if config.method == "lora" else kept_reference}
    match config.objective:
        case "sft":
            return CausalLM(model)
        case "dpo":
            return DPO(model, **beta, **reference)
        case "ipo":
            return DPO(model, loss_kind="ipo", **beta, **reference)
        case "kto":
            return KTO(model, **beta, **reference)
        case "cpo":
            return CPO(model, **beta)
        case "simpo":
            return SimPO(model, **beta)
    return ORPO(model, **beta)


def build(trainable: Any, frozen: Mapping[str, Any], step: Any) -> Any:
    """The parameters of what is trained and the base."""
    from jaxlm.core import trees

    return trees.merge(trainable, frozen["base"], step)


def without_adapters(params: Any, frozen: Any) -> Any:
    """The reference policy below the adapters."""
    from jaxlm.peft.lora import remove_lora

    return remove_lora(params)


def kept_reference(params: Any, frozen: Mapping[str, Any]) -> Any:
    """The reference policy as a copy from before training."""
    return frozen["reference"]


def make_evaluation(program: Any, frozen: Any, validation: Any) -> Any:
    """`evaluate(trainable) -> {"eval/held out/loss": ...}`: the objective's metrics on the held-out records."""
    import jax
    import jax.numpy as jnp

    from jaxlm.objectives.base import StepContext

    objective = program.objective

    def metrics(trainable: Any, frozen: Any, batch: Any) -> Any:
        ctx = StepContext(frozen, None, jnp.zeros((), jnp.int32), jax.random.key(0), {})
        params = program.build(trainable, frozen, ctx.step)
        return objective.loss(params, batch, ctx, objective.totals(params, batch, ctx))[1].metrics

    compiled = program.jit(metrics)

    def evaluate(trainable: Any) -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for batch in validation.one_pass() if validation is not None else ():
            for name, pair in jax.device_get(compiled(trainable, frozen, program.put(batch))).items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0], total[1] = total[0] + float(pair[0]), total[1] + float(pair[1])
        return {f"eval/held out/{name}": s / w if w else 0.0 for name, (s, w) in sums.items() if name != "tokens"}

    return evaluate


def export(config: "Config", found: Any, params: Any, base: str, out: Path) -> Path:
    """Saves the result as an adapter or a whole model; returns where."""
    from jaxlm.data.tokenizers import HuggingFaceTokenizer
    from jaxlm.interop import huggingface
    from jaxlm.interop.peft import save_adapter
    from jaxlm.training import keep_tokenizer

    if config.method == "lora" and not config.merge:
        save_adapter(out / "adapter", found.config, params, str(Path(base).resolve()) if Path(base).exists() else base)
        return out / "adapter"
    tokenizer = found.tokenizer if isinstance(found.tokenizer, HuggingFaceTokenizer) else None
    if tokenizer is None:
        keep_tokenizer(found.tokenizer, out / "tokenizer")
    huggingface.save(
        out / "model",
        found.config,
        params,
        tokenizer,
        chat_template=found.chat_template,
        stop_ids=found.stop_ids,
        dense=True,
    )
    return out / "model"


def reply(config: "Config", found: Any, template: Any, params: Any, when: str) -> tuple[Sample, ...]:
    """Greedy replies to the configured prompts."""
    from jaxlm.data.chat import stop_ids
    from jaxlm.decoding import DecoderStepper, GenerationConfig, generate_text

    if not config.prompts:
        return ()
    ids = [
        template.encode(found.tokenizer, [{"role": "user", "content": p}], add_generation_prompt=True).ids.tolist()
        for p in config.prompts
    ]
    settings = GenerationConfig(max_new_tokens=config.sample_tokens, temperature=0.0)
    stops = tuple({*found.stop_ids, *stop_ids(template, found.tokenizer)})
    texts = generate_text(DecoderStepper(found.model), params, found.tokenizer, ids, settings, stop_ids=stops)
    return tuple(Sample(f"{p} ({when})", t[0].text) for p, t in zip(config.prompts, texts, strict=True))
