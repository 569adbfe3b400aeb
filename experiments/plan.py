"""Plans a preset for hardware that is not here: compiles it for real, says what it takes of each chip.

    python -m experiments.plan --preset llama_7b                             # for the preset's own machine
    python -m experiments.plan --preset llama_7b --topology v5p:4x4x4 --mesh fsdp=64
    python -m experiments.plan --preset llama_1b --topology v5e:4x4 --search 6
    python -m experiments.plan --topology v6e:2x2 --step decode --mesh tensor=4 --batch_size 32 --length 2048
    python -m experiments.plan --topology v5e:4x4 --step rl --mesh fsdp=16 --batch_size 256 --length 1024 --members 8
    python -m experiments.plan --topology h200 --step qlora --mesh data=1 --batch_size 16 --micro_batches 1

Prints bytes a chip (parameters, optimizer state, batch, the rest) against the chip's memory, operations and bytes
moved, the least time that these and the collectives take, and the compiler's own estimate where it makes one. No
accelerator is needed: TPUs are compiled for by `libtpu` on any Linux machine, the H200 by jax's CUDA plug-in. About a
minute for a 7B model on 256 chips with two cores. Exit code 1: it does not fit (by how much, and what should, is said).
"""

import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from experiments import runner
from jaxlm.core.configs import to_dict
from jaxlm.core.errors import ConfigError, JaxlmError, nearest
from jaxlm.core.json_files import write_json
from jaxlm.core.sharding import MESH_AXES, MeshConfig
from jaxlm.planning.topology import find_topology, num_chips, parse_topology, prepare_environment


@dataclasses.dataclass(frozen=True)
class Config:
    """What is planned, and for what."""

    preset: str = "llama_7b"
    topology: str = ""
    """`v5e:16x16`, `v5p:2x4x4`, `v6e:4x4`, `h200`, `h200:8`; by default the preset's own."""
    experiment: str = "pretrain"
    """A module of `experiments` with `PRESETS`, `TOPOLOGIES` and `make_program` (a `Program`, or that and its step's
    frozen argument): `optimization.scale`."""
    step: Literal["train", "rl", "lora", "qlora", "decode"] = "train"
    """The pretraining step; a GRPO step beside a frozen reference; one of adapters over a base in bfloat16, or packed
    in 4 bits; or the generation of one token for each row of the batch."""
    members: int = 8
    """Samples of a prompt in the batch of `rl`."""
    mesh: str = ""
    """In place of the preset's: `fsdp=64,tensor=4`; axes that are not named are 1."""
    remat: str | None = None
    batch_size: int | None = None
    micro_batches: int | None = None
    length: int | None = None
    """Tokens of a row; of `decode`, those that its cache has room for."""
    search: int = 0
    """Compile so many ways (mesh, rematerialization, micro-batches), the most promising first, and rank what fits."""
    out: Path | None = None
    """Where the plan goes, as JSON."""

    def __post_init__(self):
        for name in ("batch_size", "micro_batches", "length", "members"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if self.search < 0:
            raise ConfigError(f"search is {self.search}, expected 0 or more")
        given = [name for name in ("mesh", "remat", "micro_batches") if getattr(self, name)]
        if self.search and (given or self.step != "train"):
            what = f"leave out --{' --'.join(given)}" if given else f"not of --step {self.step}"
            raise ConfigError(f"--search chooses mesh, remat and micro_batches of the training step: {what}")


class DoesNotFit(JaxlmError):
    """The program needs more memory than a chip has."""


def run(config: Config) -> None:
    """Plans and prints; raises `DoesNotFit` at the end if no plan fits."""
    module, preset, config = resolve(config)
    if config.search:
        rows = search(config, preset)
        _write(config.out, {"config": to_dict(config), "ranked": rows})
        _print_ranking(rows)
        if not any(row["fits"] for row in rows):
            raise DoesNotFit(f"none of {len(rows)} ways to run {config.preset} fits {config.topology}")
        return
    plan = plan_preset(module, preset, config)
    facts = as_json(plan, preset, config)
    _write(config.out, facts)
    _print(facts)
    if not plan.fits:
        raise DoesNotFit(_refusal(plan, preset, config))


def resolve(config: Config) -> tuple[Any, Any, Config]:
    """The experiment's module, its preset with the changes applied, and the config with its topology filled in.

    Raises:
      ConfigError: an unknown experiment, preset, topology or mesh axis; sizes that do not fit together.
    """
    try:
        module = importlib.import_module(f"experiments.{config.experiment}")
    except ModuleNotFoundError as error:
        from experiments import catalog

        raise ConfigError(catalog.unknown(f"experiments.{config.experiment}")) from error
    if not all(hasattr(module, name) for name in ("PRESETS", "TOPOLOGIES", "make_program")):
        raise ConfigError(f"experiments.{config.experiment} cannot be planned: it has no TOPOLOGIES")
    if config.preset not in module.PRESETS:
        raise ConfigError(f"no preset '{config.preset}': {nearest(config.preset, module.PRESETS)}")
    topology = config.topology or module.TOPOLOGIES.get(config.preset)
    if not topology:
        raise ConfigError(f"preset '{config.preset}' names no machine of its own: give --topology")
    parse_topology(topology)
    preset = module.PRESETS[config.preset]
    if preset.mesh is None and not config.mesh:
        raise ConfigError(f"preset '{config.preset}' is for one device and has no mesh: give --mesh")
    model = preset.model
    if config.remat:
        model = dataclasses.replace(model, remat=config.remat)
    length = config.length or preset.data.sequence_length
    preset = dataclasses.replace(
        preset,
        model=dataclasses.replace(model, max_length=max(length, model.max_length)),
        data=dataclasses.replace(preset.data, sequence_length=length),
        mesh=parse_mesh(config.mesh) if config.mesh else preset.mesh,
        batch_size=config.batch_size or preset.batch_size,
        micro_batches=1 if config.step == "decode" else config.micro_batches or preset.micro_batches,
    )
    return module, preset, dataclasses.replace(config, topology=topology)


def parse_mesh(text: str) -> MeshConfig:
    """`fsdp=64,tensor=4` as a mesh; axes that are not named are 1."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes:
            raise ConfigError(f"mesh '{text}': no axis '{name}': {nearest(name, MESH_AXES)}")
        if not size.removeprefix("-").isdigit():
            raise ConfigError(f"mesh '{text}': '{part}' is not an axis and its size, as in fsdp=64,tensor=4")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def plan_preset(module: Any, preset: Any, config: Config) -> Any:
    """The `jaxlm.planning.Plan` of a resolved preset."""
    from jaxlm import planning
    from jaxlm.compression import QuantizeConfig

    topology = find_topology(config.topology)
    try:
        preset.mesh.sizes(len(topology.devices))
    except ConfigError as error:
        hint = f"give a mesh for {config.topology}, for example --mesh fsdp={len(topology.devices)}"
        raise ConfigError(f"{error}; {hint}") from error
    program, frozen = _program(module, preset, config, topology.devices)
    sizes = {"batch_size": preset.batch_size, "length": preset.data.sequence_length}
    parts = (program.model, getattr(preset, "optimizer", None), program.mesh)
    match config.step:
        case "train":
            step = planning.train_step(program, planning.abstract_batch(program.mesh, *sizes.values()), frozen)
        case "rl":
            step = planning.policy_step(*parts, **sizes, members=config.members, micro_batches=preset.micro_batches)
        case "lora":
            step = planning.adapter_step(*parts, **sizes, micro_batches=preset.micro_batches)
        case "qlora":
            packed = QuantizeConfig(bits=4, group=64)
            step = planning.adapter_step(*parts, **sizes, quantize=packed, micro_batches=preset.micro_batches)
        case "decode":
            step = planning.decode_step(program, **sizes)
    return planning.make_plan(
        step.lowered,
        topology,
        step.arguments,
        model_flops=step.model_flops,
        executed_flops=step.executed_flops,
    )


def _program(module: Any, preset: Any, config: Config, devices: Any) -> tuple[Any, Any]:
    """The experiment's program for these devices, and the frozen argument of its step."""
    if config.step in ("rl", "lora", "qlora") and not hasattr(preset, "optimizer"):
        raise ConfigError(f"--step {config.step} takes the optimizer of a preset, and experiments.{config.experiment} "
                          "has several: leave --experiment out")  # fmt: skip
    made = module.make_program(preset, devices)
    return made if isinstance(made, tuple) else (made, None)


def search(config: Config, preset: Any) -> list[dict[str, Any]]:
    """Plans the most promising ways in processes of their own; those that fit first, the fastest at the top."""
    rows = []
    for candidate in _candidates(config, preset)[: config.search]:
        print(f"compiling {candidate} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            command = [sys.executable, "-m", "experiments.plan", "--out", str(path), *str(candidate).split()]
            for name in ("preset", "topology", "experiment", "batch_size", "length"):
                value = getattr(config, name)
                command += [] if value is None else [f"--{name}", str(value)]
            done = subprocess.run(command, capture_output=True, text=True)
            row = {"options": str(candidate), "expected_bytes": candidate.memory, "fits": False}
            if path.exists():
                facts = json.loads(path.read_text())
                row |= {name: facts[name] for name in ("fits", "total_bytes", "needed_bytes", "seconds", "mfu")}
            else:
                row["error"] = done.stderr.strip()[-500:]
            rows.append(row)
    return sorted(rows, key=lambda row: (not row["fits"], row.get("seconds") or 0.0))


def as_json(plan: Any, preset: Any, config: Config) -> dict[str, Any]:
    """The plan as plain values; bytes and operations are those of one chip."""
    memory, times, costs = plan.memory, plan.times, plan.costs
    seconds = times and max(times.roofline, times.compiler or 0.0)
    return {
        "preset": config.preset,
        "step": config.step,
        "topology": plan.topology,
        "chip": plan.chip.name,
        "chips": plan.chips,
        "mesh": to_dict(preset.mesh),
        "remat": preset.model.remat,
        "batch_size": preset.batch_size,
        "micro_batches": preset.micro_batches,
        "length": preset.data.sequence_length,
        "fits": plan.fits,
        "chip_bytes": plan.chip.memory,
        "total_bytes": memory and memory.total,
        "peak_bytes": memory and memory.peak,
        "argument_bytes": memory and memory.arguments,
        "argument_bytes_by_kind": dict(plan.kinds),
        "output_bytes": memory and memory.outputs,
        "temporary_bytes": memory and memory.temporaries,
        "aliased_bytes": memory and memory.aliased,
        "refusal": plan.refusal,
        "needed_bytes": plan.needed,
        "limit_bytes": plan.limit,
        "model_flops": plan.model_flops,
        "executed_flops": plan.executed_flops,
        "bytes_moved": costs and costs.bytes_moved,
        "collectives": [{**dataclasses.asdict(c), "sent": c.sent} for c in costs.collectives] if costs else None,
        "guessed_loops": costs and costs.guessed_loops,
        "roofline_seconds": times and dataclasses.asdict(times),
        "compiler_seconds": times and times.compiler,
        "seconds": seconds,
        "mfu": seconds and plan.mfu(seconds),
        "compile_seconds": plan.compile_seconds,
    }


def _candidates(config: Config, preset: Any) -> list[Any]:
    from jaxlm.core import trees
    from jaxlm.models import Decoder
    from jaxlm.planning import CHIPS, candidates

    kind, _ = parse_topology(config.topology)
    return candidates(
        preset.model,
        trees.count(Decoder(preset.model).abstract_params()),
        CHIPS[kind],
        num_chips(config.topology),
        batch_size=preset.batch_size,
        length=preset.data.sequence_length,
    )


def _refusal(plan: Any, preset: Any, config: Config) -> str:
    limit = plan.limit or plan.chip.memory
    needed = plan.needed or (plan.memory.total if plan.memory else None)
    message = f"{config.preset} does not fit {plan.topology}"
    if needed:
        message += f": it needs at least {_gb(needed)} a chip and there are {_gb(limit)}, {_gb(needed - limit)} too few"
    if plan.refusal:
        message += f"\nthe compiler: {plan.refusal.splitlines()[0]}"
    if config.step == "decode":
        return message + "\nfewer rows (--batch_size), a shorter cache (--length) or --mesh tensor=... need less"
    if config.step != "train":
        return message + "\nmore --micro_batches, --remat full, shorter rows or more fsdp need less"
    expected = [c for c in _candidates(config, preset) if c.memory <= 0.9 * plan.chip.memory][:3]
    if not expected:
        return message + f"\nno mesh or micro-batch should fit {plan.topology} either: take more chips or larger ones"
    ways = "\n".join(f"  {c}   (about {_gb(c.memory)})" for c in expected)
    return f"{message}\nshould fit (--search 4 compiles and ranks them):\n{ways}"


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title: str, rows: list[tuple[str, str]]) -> None:
        grid = Table(title=title, title_justify="left", show_header=False)
        grid.add_column()
        grid.add_column(justify="right")
        for row in rows:
            grid.add_row(*row)
        Console().print(grid)

    mesh = ", ".join(f"{name} {size}" for name, size in facts["mesh"].items() if size != 1)
    print(
        f"{facts['preset']}, {facts['step']} step on {facts['topology']} ({facts['chips']} x {facts['chip']}; "
        f"mesh {mesh or 1}), {facts['batch_size']} x {facts['length']} tokens in {facts['micro_batches']} pieces, "
        f"remat {facts['remat']}"
    )
    rows = [(name, _gb(size)) for name, size in facts["argument_bytes_by_kind"].items()]
    if facts["total_bytes"] is not None:
        rows += [
            ("arguments", _gb(facts["argument_bytes"])),
            ("+ outputs - aliased", _gb(facts["output_bytes"] - facts["aliased_bytes"])),
            ("+ activations and temporaries", _gb(facts["temporary_bytes"])),
            ("= total", _gb(facts["total_bytes"])),
        ]
        rows += [("peak, by the compiler", _gb(facts["peak_bytes"]))] if facts["peak_bytes"] else []
    table("Memory a chip", [*rows, ("the chip has", _gb(facts["chip_bytes"]))])
    if facts["total_bytes"] is None or facts["roofline_seconds"] is None:
        return
    times = facts["roofline_seconds"]
    rows = [
        ("operations of the model", f"{facts['model_flops'] / 1e12:,.1f} T"),
        ("operations with what is computed again", f"{facts['executed_flops'] / 1e12:,.1f} T"),
        ("bytes moved", _gb(facts["bytes_moved"])),
        *(
            (f"{c['kind']} over {c['group']}: {c['count']:,.0f} times", _gb(c["payload"]))
            for c in facts["collectives"]
            if c["payload"] > 1e6
        ),
        ("least time: products", _ms(times["compute"])),
        ("least time: memory", _ms(times["memory"])),
        ("least time: collectives", _ms(times["network"])),
        ("the compiler's estimate", _ms(times["compiler"]) if times["compiler"] else "none"),
        ("model FLOPs utilization, if so", f"{100 * facts['mfu']:.0f} %"),
        ("compile time", f"{facts['compile_seconds']:.0f} s"),
    ]
    table("One step of a chip", rows)


def _print_ranking(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["fits"]:
            speed = f"{_ms(row['seconds'])}, MFU {100 * row['mfu']:.0f} %" if row["seconds"] else "time unknown"
            print(f"fits: {row['options']}: {_gb(row['total_bytes'])}, {speed}")
        else:
            needed = _gb(row["needed_bytes"]) if row.get("needed_bytes") else row.get("error", "too much")
            print(f"does not fit: {row['options']}: {needed}")


def _write(path: Path | None, facts: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, facts)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f} GB" if abs(size) < 10e9 else f"{size / 1e9:,.2f} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


if __name__ == "__main__":
    prepare_environment()
    runner.tool(__name__)
