"""What runs read of earlier ones: configurations, logs, checkpoints, stores; and the command line."""

import contextlib
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.mutations import JUNK, as_json, damaged, damaged_json, damaged_value
from tests.fuzz.target import Target, home, put


def _configs() -> st.SearchStrategy[Any]:
    from experiments import finetune, pretrain
    from experiments.optimization import scale
    from jaxlm.core.configs import to_dict
    from jaxlm.models import DecoderConfig
    from jaxlm.reporting import Claim, Figure, Report, Series, Table
    from jaxlm.testing import tiny_config

    figure = Figure("f", (Series("s", (1, 2), (1.0, float("nan"))),), x_scale="log")
    table = Table("t", ("a", "b"), ((1, None),))
    report = Report("t", claims=(Claim("c", 1.0, "x", True),), tables=(table,), figures=(figure,))
    kinds = [
        (DecoderConfig, tiny_config("gemma3")),
        (Report, report),
        (pretrain.Config, pretrain.PRESETS["smoke"]),
        (finetune.Config, finetune.PRESETS["smoke"]),
        (scale.Config, scale.PRESETS["smoke"]),
    ]
    return st.one_of([st.tuples(st.just(kind), damaged_value(to_dict(value))) for kind, value in kinds])


def read_config(case: tuple[type, Any], folder: Path) -> None:
    from jaxlm.core.configs import from_dict, to_dict
    from jaxlm.core.json_files import read_json, write_json

    kind, value = case
    config = from_dict(kind, read_json(put(folder, "config.json", as_json(value))), "config.json")
    write_json(folder / "again.json", to_dict(config))


def _metrics() -> st.SearchStrategy[bytes]:
    rows = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": "NaN", "resumed_at": 2}]
    rows.append({"step": 3, "eval/a/b": 1})
    return damaged_value(rows).map(
        lambda value: b"".join(as_json(row) + b"\n" for row in (value if isinstance(value, list) else [value]))
    ) | damaged(b"".join(as_json(row) + b"\n" for row in rows))


def read_metrics(data: bytes, folder: Path) -> None:
    from jaxlm.reporting import figures, run_folder

    put(folder, "metrics.jsonl", data)
    figures.loss_curves(run_folder.read_metrics(folder))


def _checkpoint_meta() -> st.SearchStrategy[bytes]:
    from jaxlm.core.configs import to_dict
    from jaxlm.testing import tiny_config

    return damaged_json({"model": to_dict(tiny_config("llama")), "data": {"next_step": 3}, "config": {}})


def read_checkpoint_meta(data: bytes, folder: Path) -> None:
    from jaxlm.training.runs import model_of_run

    put(folder, "checkpoints/5/meta/metadata", data)
    model_of_run(folder)


@functools.cache
def _store() -> Path:
    from jaxlm.data.sources import Document
    from jaxlm.data.store import build_store
    from jaxlm.data.tokenizers import ByteTokenizer

    sources = {name: [Document(f"{name} text {i}" * 3, f"{i}") for i in range(4)] for name in ("a", "b")}
    build_store(home() / "store", sources, ByteTokenizer(), seed=0, progress=False)
    return home() / "store"


def _stores() -> st.SearchStrategy[tuple[str, bytes]]:
    whole = _store()
    parts = [st.tuples(st.just("manifest.json"), damaged_json(json.loads((whole / "manifest.json").read_text())))]
    for name in ("offsets.bin", "sources.bin", "bytes.bin"):
        raw = (whole / name).read_bytes()
        parts.append(st.tuples(st.just(name), damaged(raw)))
        parts.append(st.tuples(st.just(name), damaged(raw).map(functools.partial(_of_length, len(raw)))))
    return st.one_of(parts)


def _of_length(count: int, data: bytes) -> bytes:
    return data[:count].ljust(count, b"\0")


def read_store(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.data.packing import count_rows, read_rows
    from jaxlm.data.store import open_store

    shutil.rmtree(folder)
    shutil.copytree(_store(), folder)
    put(folder, *case)
    store = open_store(folder)
    for source in range(len(store.source_names)):
        if int(count_rows(store, 8)[source]):
            read_rows(store, source, np.arange(1), 8)


@functools.cache
def _iterator() -> tuple[Any, Any]:
    from jaxlm.data.pipeline import make_train_iterator
    from jaxlm.data.store import open_store

    made = make_train_iterator(open_store(_store()), batch_size=2, length=8, seed=0, buffer=0)
    return made, json.loads(json.dumps(made.get_state()))


def read_data_state(data: bytes, folder: Path) -> None:
    from jaxlm.core.json_files import read_object

    _iterator()[0].set_state(read_object(put(folder, "metadata", data)))


@functools.cache
def _outcome() -> tuple[Any, Path]:
    from jaxlm.training.populations import Member, Outcome

    member = Member("slow", 0, {"learning_rate": 0.5})
    params = {"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    folder = home() / "members"
    kept_folder(folder).save(Outcome(member, {"loss": np.ones(3, np.float32)}, {"loss": 1.0}, 0.5, params))
    return member, folder


def kept_folder(folder: Path) -> Any:
    """What is kept of members with two arrays and three steps."""
    import jax

    from jaxlm.training import TrainState, kept_members

    params = {"a": jax.ShapeDtypeStruct((2, 3), np.float32), "b": jax.ShapeDtypeStruct((2,), np.float32)}
    return kept_members.Folder(folder, {"num_steps": 3}, TrainState(None, params, None, None, None, None))


def _outcomes() -> st.SearchStrategy[tuple[str, bytes]]:
    _, folder = _outcome()
    kept = json.loads((folder / "slow.json").read_text())
    return st.tuples(st.just("slow.json"), damaged_json(kept)) | st.tuples(
        st.just("slow.npz"), damaged((folder / "slow.npz").read_bytes())
    )


def read_outcome(case: tuple[str, bytes], folder: Path) -> None:
    member, whole = _outcome()
    for name in ("slow.json", "slow.npz"):
        put(folder, name, (whole / name).read_bytes())
    put(folder, *case)
    kept_folder(folder).load(member, params=True, state=False)


def _command_lines() -> st.SearchStrategy[list[str]]:
    options = (
        "--model.num_layers", "--model.norm", "--model.window_pattern", "--optimizer.learning_rate", "--optimizer.name",
        "--data.path", "--data.weights", "--steps", "--seed", "--mesh.fsdp", "--batch_size", "--prsteps", "--",
        "--model.rope_scaling.factor", "--evaluate_every", "--data.sequence_length", "--out", "--preset=", "-x",
    )  # fmt: skip
    values = st.sampled_from([str(junk) for junk in JUNK if "\0" not in str(junk)] + ["1", "2", "a b", "None", "True"])
    return st.lists(st.one_of(st.sampled_from(options), values), max_size=5)


def parse_command_line(words: list[str], folder: Path) -> None:
    from experiments import pretrain, runner

    quiet = io.TextIOWrapper(io.BytesIO(), "utf-8", "replace")
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet), contextlib.suppress(SystemExit):
        runner.parse(
            pretrain.Config,
            words,
            module="experiments.pretrain",
            description="",
            default=pretrain.PRESETS["smoke"],
            extra={"out": (Path, folder, "")},
        )


TARGETS: dict[str, Target] = {
    "config": Target(_configs, read_config, cost=2),
    "metrics": Target(_metrics, read_metrics),
    "checkpoint_meta": Target(_checkpoint_meta, read_checkpoint_meta, cost=2),
    "data_state": Target(lambda: damaged_json(_iterator()[1]), read_data_state),
    "store": Target(_stores, read_store, cost=3),
    "kept_members": Target(_outcomes, read_outcome),
    "command_line": Target(_command_lines, parse_command_line, cost=100),
}
