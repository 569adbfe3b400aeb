import json
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core import sharding
from jaxlm.core.errors import CheckpointError
from jaxlm.training import Checkpoints, load_meta, load_params
from jaxlm.training.state import TrainState


def make_state(value=0.0):
    return TrainState(
        step=jnp.asarray(3, jnp.int32),
        trainable={"w": jnp.full((8, 4), value), "half": jnp.ones((4,), jnp.bfloat16), "absent": None},
        opt_state=(jnp.zeros((8, 4)), (), {"count": jnp.asarray(1, jnp.int32)}),
        extra=None,
        key=jax.random.key(7),
        hparams={},
    )


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def data(tree):
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), tree
    )


def save_and_wait(checkpoints, step, state):
    checkpoints.save(step, state, {})
    checkpoints.wait()


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        assert checkpoints.save(step, make_state(float(step)), {"data": {"next_step": step}, "name": "a run"})
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def test_what_is_restored_is_what_was_saved(saved):
    restored = saved.restore(abstract(make_state()))
    chex.assert_trees_all_equal(data(restored.state), data(make_state(3.0)))
    assert restored.step == 3
    assert restored.meta == {"data": {"next_step": 3}, "name": "a run"}


def test_only_the_newest_are_kept(saved):
    assert saved.steps() == [2, 3]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore(abstract(make_state())) is None


def test_restores_onto_another_mesh(saved):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    state = make_state()
    whole = NamedSharding(mesh, PartitionSpec())
    target = abstract(state, whole)
    target.trainable["w"] = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    )
    restored = saved.restore(target)
    assert len(restored.state.trainable["w"].addressable_shards) == 8
    chex.assert_trees_all_equal(np.asarray(restored.state.trainable["w"]), np.full((8, 4), 3.0, np.float32))


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(saved, harm):
    files = [p for p in (saved.folder / "3" / "state").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if harm == "remove":
        victim.unlink()
    elif harm == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        victim.write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be used .*; trying an older one"):
        restored = saved.restore(abstract(make_state()))
    assert restored.step == 2
    chex.assert_trees_all_equal(np.asarray(restored.state.trainable["w"]), np.full((8, 4), 2.0, np.float32))
    # The run goes on from step 2 and saves step 3 again; the damaged one is kept aside.
    saved.discard_after(2)
    assert saved.save(3, make_state(5.0), {})
    saved.wait()
    assert float(saved.restore(abstract(make_state())).state.trainable["w"][0, 0]) == 5.0
    assert (saved.folder / "damaged-3").is_dir()


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_damage_to_any_file_in_turn_is_found(saved):
    """A flipped bit, and the last byte missing, in each file of a real checkpoint and in its check sums."""
    files = [p for p in (saved.folder / "3").rglob("*") if p.is_file()]
    names = {p.relative_to(saved.folder / "3").parts[0] for p in files}
    assert {"state", "meta"} <= names
    assert len(files) > 8
    for victim in [*files, saved.folder / "sums" / "3.json"]:
        content = victim.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0x04
        for harmed in (bytes(flipped), content[:-1]):
            victim.write_bytes(harmed)
            assert saved.restore(abstract(make_state())).step == 2, victim
            if victim.parent.name == "meta":
                assert load_meta(saved.folder)[1]["data"] == {"next_step": 2}
            victim.write_bytes(content)
    assert saved.restore(abstract(make_state())).step == 3


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_when_all_are_damaged_it_is_an_error_and_nothing_is_deleted(saved):
    for step in (2, 3):
        (saved.folder / str(step) / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint.*step 3.*step 2"):
        saved.restore(abstract(make_state()))
    assert saved.steps() == [2, 3]


def test_a_full_disk_is_a_warning_and_the_last_good_checkpoint_stays(saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved._manager, "save", full)
    with pytest.warns(UserWarning, match="step 4 could not be saved.*No space left.*that of step 3"):
        assert not saved.save(4, make_state(4.0), {})
    monkeypatch.undo()
    assert saved.failures == 1
    assert saved.restore(abstract(make_state())).step == 3
    assert saved.save(5, make_state(5.0), {})
    saved.wait()
    assert saved.steps() == [3, 5]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_really_full_disk_costs_only_the_saves_that_do_not_fit(small_disk):
    def state(value):
        return {"w": jnp.asarray(np.random.default_rng(value).normal(size=(128, 1024)), jnp.float32)}

    checkpoints = Checkpoints(small_disk / "run", keep=2)
    for step in (1, 2):
        assert checkpoints.save(step, state(step), {})
    checkpoints.wait()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
    for step in (3, 4):
        with pytest.warns(UserWarning, match=f"step {step} could not be saved: .*No space left.*that of step 2"):
            save_and_wait(checkpoints, step, state(step))
    assert checkpoints.failures == 2
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["1", "2", "sums"]  # nothing half written
    restored = checkpoints.restore(abstract(state(0)))
    assert restored.step == 2
    chex.assert_trees_all_equal(restored.state, state(2))
    filler.unlink()
    assert checkpoints.save(5, state(5), {})
    checkpoints.close()
    chex.assert_trees_all_equal(Checkpoints(checkpoints.folder).restore(abstract(state(0))).state, state(5))


def test_an_error_in_the_background_does_not_spoil_the_next_save(saved, monkeypatch):
    """As above for machines where nothing can be mounted: the error comes where the arrays are written."""
    from orbax.checkpoint._src.serialization import jax_array_handlers

    async def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jax_array_handlers, "_async_serialize_replica_slices", full)
        with pytest.warns(UserWarning, match="step 4 could not be saved.*No space left.*that of step 3"):
            save_and_wait(saved, 4, make_state(4.0))
    assert saved.steps() == [2, 3]
    assert saved.save(5, make_state(5.0), {})
    saved.wait()
    assert saved.steps() == [3, 5]


def test_leftovers_of_killed_saves_go_when_a_run_begins(saved):
    for name in ("4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"):
        (saved.folder / name / "state").mkdir(parents=True)
    (saved.folder / "sums" / ".4.json.x1y2.partial").touch()
    saved.tidy()
    assert sorted(p.name for p in (saved.folder / "sums").iterdir()) == ["2.json", "3.json"]
    assert sorted(p.name for p in saved.folder.iterdir()) == ["2", "3", "sums"]
    assert saved.restore(abstract(make_state())).step == 3


def test_a_slow_save_that_is_cut_off_leaves_the_one_before(tmp_path):
    """The deadline after SIGTERM: the process is killed while the arrays are being written."""
    program = """
import asyncio, os, sys, threading, time
import jax.numpy as jnp
from jaxlm.training import Checkpoints
from orbax.checkpoint._src.serialization import jax_array_handlers as handlers
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": jnp.ones((64, 64))}, {"step": 1})
checkpoints.wait()
write = handlers._async_serialize_replica_slices
async def slow(*args, **kwargs):
    result = await write(*args, **kwargs)
    print("written", flush=True)
    await asyncio.sleep(60)
    return result
handlers._async_serialize_replica_slices = slow
checkpoints.save(2, {"w": jnp.zeros((64, 64))}, {"step": 2})
checkpoints.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate(timeout=60)
    assert len(list(tmp_path.glob("*orbax-checkpoint-tmp*"))) == 1
    checkpoints = Checkpoints(tmp_path)
    checkpoints.tidy()
    found = checkpoints.restore({"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jnp.ones(1).sharding)})
    assert (found.step, float(found.state["w"].sum())) == (1, 4096.0)


def test_a_save_that_was_killed_is_not_a_checkpoint(saved):
    partial = saved.folder / "4.orbax-checkpoint-tmp-0"
    (partial / "state").mkdir(parents=True)
    assert Checkpoints(saved.folder).restore(abstract(make_state())).step == 3


def test_parameters_alone_can_be_loaded(saved):
    params = abstract(make_state().trainable)
    step, loaded = load_params(saved.folder, params)
    assert step == 3
    chex.assert_trees_all_equal(data(loaded), data(make_state(3.0).trainable))
    assert load_meta(saved.folder) == (3, {"data": {"next_step": 3}, "name": "a run"})
    with pytest.raises(CheckpointError, match=r"of step 9.*found \[2, 3\]"):
        load_meta(saved.folder, 9)
    with pytest.raises(CheckpointError, match=r"of step 9.*found \[2, 3\]"):
        load_params(saved.folder, params, 9)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*elsewhere: found \[\]"):
        load_params(saved.folder / "elsewhere", params)
    assert not (saved.folder / "elsewhere").exists()  # looking leaves nothing


def test_check_sums_cover_every_file(saved):
    sums = json.loads((saved.folder / "sums" / "3.json").read_text())
    files = {str(p.relative_to(saved.folder / "3")) for p in (saved.folder / "3").rglob("*") if p.is_file()}
    assert sums.keys() == files
