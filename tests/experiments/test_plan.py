"""Every accelerator preset is compiled for its chips, cut down in the normal run, whole in the slow one."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from experiments import plan, pretrain
from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import MeshConfig
from jaxlm.planning import CHIPS, abstract_batch, find_topology, num_chips, parse_topology

ON_CPU = {"smoke", "small"}
TPU = sorted(name for name, topology in pretrain.TOPOLOGIES.items() if topology.startswith("v"))
GPU = sorted(set(pretrain.TOPOLOGIES) - set(TPU))

LLAMA_2_7B = 6_738_415_616


@pytest.fixture
def least_effort():
    """Half the tests' time is the compiler's search for fast programs, which says nothing about whether they fit."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


def planned(**options):
    module, preset, config = plan.resolve(plan.Config(**options))
    return plan.plan_preset(module, preset, config), preset, config


def test_every_preset_that_is_not_for_a_cpu_names_its_machine():
    assert set(pretrain.TOPOLOGIES) == set(pretrain.PRESETS) - ON_CPU
    for name, topology in pretrain.TOPOLOGIES.items():
        pretrain.PRESETS[name].mesh.sizes(num_chips(topology))


@pytest.mark.parametrize("name", TPU)
def test_a_cut_down_preset_fits_its_chips(name, least_effort):
    kind, _ = parse_topology(pretrain.TOPOLOGIES[name])
    small = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}[kind]
    module, preset, config = plan.resolve(plan.Config(preset=name, topology=small, length=512, micro_batches=2))
    mesh = MeshConfig(data=1, fsdp=4) if preset.mesh.fsdp > 1 else MeshConfig(data=4)
    model = dataclasses.replace(preset.model, num_layers=2)
    preset = dataclasses.replace(preset, mesh=mesh, model=model, batch_size=32)
    found = plan.plan_preset(module, preset, config)
    assert found.fits
    assert sum(found.kinds.values()) == pytest.approx(found.memory.arguments, rel=0.03)
    assert found.memory.aliased >= found.kinds["parameters"] + found.kinds["optimizer state"]
    assert found.executed_flops > found.model_flops


def test_the_int8_preset_multiplies_int8_on_its_chips():
    preset = pretrain.PRESETS["llama_1b_int8"]
    model = dataclasses.replace(preset.model, num_layers=1, embed_dim=256, mlp_dim=512, num_heads=2, num_kv_heads=2)
    data = dataclasses.replace(preset.data, sequence_length=128)
    small = {"mesh": MeshConfig(data=4), "batch_size": 8, "micro_batches": 1, "model": model, "data": data}
    preset = dataclasses.replace(preset, **small)
    program = pretrain.make_program(preset, find_topology("v5e:2x2").devices)
    text = program.step.lower(program.abstract_state, None, abstract_batch(program.mesh, 8, 128)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "xi8>" in line]
    # Seven projections forward, all but the last again under remat, and their dgrad; wgrad stays wide.
    assert len(products) == 7 + 6 + 7
    assert all("xi32>" in line for line in products)


@pytest.mark.slow
@pytest.mark.parametrize("name", TPU)
def test_the_whole_preset_fits_its_machine(name):
    found, _, _ = planned(preset=name)
    assert found.fits
    assert found.memory.total < found.chip.memory


@pytest.mark.gpu_aot
@pytest.mark.parametrize("name", GPU)
def test_the_preset_fits_its_gpu(name):
    found, _, _ = planned(preset=name)
    assert found.fits


@pytest.mark.release
@pytest.mark.parametrize(
    ("topology", "length", "remat", "theirs"),
    [
        ("v5e:16x16", 4096, "full", 10.083e9),
        ("v5e:16x16", 2048, "projections", 12.045e9),
        ("v5p:2x4x4", 4096, "dots", 55.154e9),
    ],
)
def test_llama_2_7b_takes_no_more_than_maxtext(topology, length, remat, theirs):
    # MaxText 0.2.5's own ahead-of-time compile: float32 parameters and AdamW moments, pure FSDP, 4 rows a chip.
    chips = num_chips(topology)
    options = {"length": length, "remat": remat, "batch_size": 4 * chips, "micro_batches": 1}
    found, _, _ = planned(preset="llama_7b", topology=topology, mesh=f"fsdp={chips}", **options)
    assert found.memory.arguments == pytest.approx(LLAMA_2_7B * 12 / chips, rel=0.02)
    assert found.memory.temporaries <= theirs


def test_decode_and_json(tmp_path, least_effort):
    out = tmp_path / "plan.json"
    config = plan.Config(
        preset="smollm2_135m", topology="v6e:2x2", step="decode", mesh="data=4", batch_size=8, length=256, out=out
    )
    plan.run(config)
    facts = json.loads(out.read_text())
    assert facts["fits"]
    assert facts["chip_bytes"] == CHIPS["v6e"].memory
    cache = 2 * 30 * 2 * 3 * 256 * 64 * 2  # keys and values, layers, rows of a chip, heads, tokens, dimensions, bytes
    assert facts["argument_bytes_by_kind"]["cache"] == cache + 2 * 4
    assert facts["argument_bytes_by_kind"]["parameters"] == 134_515_008 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "kind", "size"),
    [("rl", "reference", 134_515_008 * 2 / 4), ("lora", "frozen", 134_515_008 * 2 / 4), ("qlora", "frozen", None)],
)
def test_other_steps_than_pretraining(step, kind, size, least_effort):
    options = {"batch_size": 64, "length": 256, "micro_batches": 2, "mesh": "fsdp=4"}
    found, _, _ = planned(preset="smollm2_135m", topology="v5e:2x2", step=step, **options)
    assert found.fits
    if size:
        assert found.kinds[kind] == pytest.approx(size, rel=0.01)
    else:  # the table stays in bfloat16, kernels take 4 bits and a float16 for 64; 9 blocks cannot lie on 4 chips
        table, kernels = 49_152 * 576, 134_515_008 - 49_152 * 576
        assert found.kinds[kind] == pytest.approx((2 * table + kernels * (1 / 2 + 2 / 64)) / 4, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "llama_8b"}, "no preset 'llama_8b': did you mean 'llama_1b'|'llama_7b'"),
        ({"preset": "small"}, "names no machine of its own: give --topology"),
        ({"topology": "v5e:15x16"}, "does not exist; the nearest are"),
        ({"mesh": "fsdb=4"}, "no axis 'fsdb': did you mean 'fsdp'"),
        ({"mesh": "fsdp"}, "is not an axis and its size"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"remat": "some"}, "model.remat is 'some'"),
        ({"search": 2, "remat": "full"}, "leave out --remat"),
        ({"search": 2, "step": "decode"}, "not of --step decode"),
        ({"experiment": "pretrian"}, "did you mean experiments.pretrain"),
        ({"experiment": "finetune"}, "cannot be planned"),
        ({"experiment": "optimization.scale", "preset": "small", "topology": "v5e:2x2"}, "has no mesh: give --mesh"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        plan.resolve(plan.Config(**options))


def test_a_mesh_for_another_machine_is_refused_with_one_that_works():
    with pytest.raises(ConfigError, match="--mesh fsdp=4"):
        planned(preset="llama_7b", topology="v5e:2x2")


@pytest.mark.slow
def test_search_ranks_what_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1")
    out = tmp_path / "ranked.json"
    options = {"topology": "v5e:2x2", "batch_size": 16, "length": 256, "search": 2, "out": out}
    plan.run(plan.Config(preset="smollm2_135m", **options))
    rows = json.loads(out.read_text())["ranked"]
    assert len(rows) == 2
    assert all(row["fits"] and row["total_bytes"] < CHIPS["v5e"].memory for row in rows)
    assert rows[0]["seconds"] <= rows[1]["seconds"]
    assert "fits: --mesh" in capsys.readouterr().out


def test_what_does_not_fit_says_by_how_much_and_what_should(tmp_path):
    out = tmp_path / "plan.json"
    command = "--preset llama_1b --topology v5e:4x4 --mesh fsdp=16 --micro_batches 1 --batch_size 512 --remat dots"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan", *command.split(), "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=plan.Path(plan.__file__).parents[1],
    )
    assert done.returncode == 1
    assert "llama_1b does not fit v5e:4x4: it needs at least" in done.stderr
    assert "should fit" in done.stderr
    assert "--micro_batches" in done.stderr
    facts = json.loads(out.read_text())
    assert not facts["fits"]
    assert facts["needed_bytes"] > facts["limit_bytes"]
