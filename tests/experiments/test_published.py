"""Studies at published sizes: runs on a mesh, resumed, judged; every size's step compiled for its machine, cut down."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from experiments import bases, plan, published
from experiments.bases import Arm, MeshStudyConfig
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.sharding import MeshConfig
from jaxlm.data.prepare import DataConfig
from jaxlm.models.config import DecoderConfig
from jaxlm.optim.config import OptimizerConfig
from jaxlm.peft.parametrizations import Parametrization

MODULES = ("scale", "natural_galore", "memory_efficient_pretraining")
MESH = MeshConfig(data=2, fsdp=4)
ADAM = OptimizerConfig("adamw", weight_decay=0.0)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(60):
        (folder / f"{i}.txt").write_text("".join(rng.choice(list("abcdef "), 300)))
    return MeshStudyConfig(
        model=DecoderConfig(vocab_size=320, num_layers=1, embed_dim=16, num_heads=4, mlp_dim=16, max_length=16),
        data=DataConfig(path=(str(folder / "*.txt"),), tokenizer="byte", sequence_length=16, validation_fraction=0.4),
        steps=6,
        batch_size=8,
        judge_rows=16,
        seeds=(1,),
        mesh=MESH,
        checkpoint_every=3,
    )


def test_runs_on_a_mesh_are_tuned_judged_and_kept(study, tmp_path, capsys):
    assert bases.load_text(study) is None
    arms = {"adam": Arm(ADAM, (1e-3, 1e-2))}
    found = bases.compare_arms(study, arms, None, tmp_path)["adam"]
    assert found.rate == min(found.tuned, key=found.tuned.get)
    assert len(found.history) == study.steps
    assert found.losses[0] < found.history[0]
    run = tmp_path / "runs" / f"adam_{found.rate:g}_1"
    assert json.loads((run / "outcome.json").read_text())["value"]["results"]["judge"] == found.losses[0]
    capsys.readouterr()
    again = bases.compare_arms(study, arms, None, tmp_path)["adam"]
    assert capsys.readouterr().out == ""
    assert (again.tuned, again.losses) == (found.tuned, found.losses)


def test_a_run_goes_on_from_its_checkpoint_and_refuses_one_of_other_settings(study, tmp_path, capsys):
    arm = Arm(ADAM, (1e-2,))
    whole = bases.compare_arms(study, {"adam": arm}, None, tmp_path)["adam"]
    run = tmp_path / "runs" / "adam_0.01_1"
    (run / "outcome.json").unlink()
    for step in (run / "checkpoints").iterdir():
        if step.name.endswith("6"):
            step.rename(tmp_path / "last")
    capsys.readouterr()
    again = bases.compare_arms(study, {"adam": arm}, None, tmp_path)["adam"]
    assert "resuming after step 3" in capsys.readouterr().out
    assert (again.losses, again.history) == (whole.losses, whole.history)
    (run / "outcome.json").unlink()
    with pytest.raises(CheckpointError, match="other settings"):
        bases.compare_arms(dataclasses.replace(study, judge_rows=8), {"adam": arm}, None, tmp_path)


def test_a_rate_at_which_a_run_diverges_is_not_taken_and_does_not_end_the_study(study, tmp_path):
    arms = {"adam": Arm(dataclasses.replace(ADAM, clip_norm=None), (1e30, 1e-2))}
    for _ in range(2):  # trained, and read
        found = bases.compare_arms(dataclasses.replace(study, steps=3), arms, None, tmp_path)["adam"]
        assert found.rate == 1e-2
        assert np.isnan(found.tuned[1e30])
        assert np.isfinite(found.losses).all()


FORMS = ["sltrain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("low_rank", "relora"))]


@pytest.mark.parametrize("form", FORMS)
def test_parametrizations_restart_on_a_mesh_as_on_one_device(study, form):
    arm = Arm(dataclasses.replace(ADAM, reset_every=2, recovery=2), (1e-2,), Parametrization(form, rank=4, density=0.1))
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 256, (4, 8, 17)).astype(np.int32)
    on_mesh, frozen_there = published.make_program(study, arm, seed=3)
    alone = dataclasses.replace(study, mesh=MeshConfig(data=1))
    on_device, _ = published.make_program(alone, arm, devices=jax.devices()[:1])  # for given devices: shapes alone
    start, frozen_here = jax.device_put(jax.device_get((on_mesh.start, frozen_there)), jax.devices()[0])
    losses = []
    for program, frozen in (
        (on_mesh, frozen_there),
        (dataclasses.replace(on_device, start=start), frozen_here),
    ):
        state, seen = program.init(0), []
        for rows in ids:
            ones = np.ones((8, 16), np.float32)
            batch = program.put({"inputs": rows[:, :-1], "targets": rows[:, 1:], "loss_weights": ones})
            state, metrics = program.step(state, frozen, batch)
            seen.append(float(metrics["loss"][0] / metrics["loss"][1]))
        losses.append(seen)
    np.testing.assert_allclose(*losses, rtol=2e-5)


@pytest.mark.parametrize("module", [MODULES[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MODULES[1:])])
def test_a_study_is_reported(study, module, tmp_path):
    module = importlib.import_module(f"experiments.optimization.{module}")
    small = {f.name: getattr(study, f.name) for f in dataclasses.fields(study)}
    found = {"rank": 4, "period": 2, "cycle": 10, "last_steps": 2, "history": 2, "quadratic_seeds": 1, "rates": (1e-2,)}
    preset = module.PRESETS["llama_60m"]
    found = {name: value for name, value in found.items() if hasattr(preset, name)}
    report = module.run(dataclasses.replace(preset, **small, **found), tmp_path)
    assert {name for name in report.numbers if name.startswith("loss")}
    assert report.claims


def test_a_preset_without_a_mesh_cannot_be_planned(study):
    with pytest.raises(ConfigError, match="has no mesh"):
        published.make_program(dataclasses.replace(study, mesh=None), Arm(ADAM, (1e-3,)))
    with pytest.raises(ConfigError, match="leave --experiment out"):
        planned("scale", "llama_60m", step="rl")


def planned(module: str, name: str, cut: bool = True, **options):
    module, preset, config = plan.resolve(plan.Config(experiment=f"optimization.{module}", preset=name, **options))
    if cut:
        model = dataclasses.replace(preset.model, num_layers=1, vocab_size=2048)
        preset = dataclasses.replace(preset, model=model, batch_size=64)
    return plan.plan_preset(module, preset, config)


# The compiler takes minutes for singular vectors.
@pytest.mark.parametrize("module", ["scale", *(pytest.param(m, marks=pytest.mark.release) for m in MODULES[1:])])
def test_a_cut_down_size_fits_its_chips(module):
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        found = planned(module, "llama_130m", topology="v5e:2x2", mesh="fsdp=4")
    finally:
        jax.config.update("jax_exec_time_optimization_effort", 0.0)
    assert found.fits
    assert sum(found.kinds.values()) == pytest.approx(found.memory.arguments, rel=0.1)


@pytest.mark.release
@pytest.mark.parametrize(
    ("module", "name"),
    [(m, n) for m in MODULES for n in importlib.import_module(f"experiments.optimization.{m}").TOPOLOGIES],
)
def test_a_size_fits_its_chips(module, name):
    assert planned(module, name, cut=False).fits
