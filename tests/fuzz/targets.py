"""What is fuzzed: each reader of files with inputs made from valid ones. A target is a strategy and a function.

The function reads one input as users' code would. It may return, or raise an error of `jaxlm.core.errors`; anything
else is a finding.
"""

import atexit
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.mutations import JUNK, as_json, damaged, damaged_json, damaged_value
from tests.interop.checkpoints import tokenizer_definition


@dataclasses.dataclass(frozen=True)
class Target:
    """`read(input, folder)`: `folder` is the target's own, kept from input to input. `cost`: milliseconds an input."""

    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any, Path], Any]
    cost: int = 1


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@functools.cache
def home() -> Path:
    """A folder with valid files of every kind, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Safetensors.


def _safetensors() -> bytes:
    from jaxlm.interop.tensor_files import Planned, write_tensors

    folder = home() / "safetensors"
    folder.mkdir(exist_ok=True)
    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float16), "c": np.float64(2.0).reshape(())}
    codes = {"a.weight": "F32", "b": "F16", "c": "F64"}
    write_tensors(folder, [Planned(n, x.shape, codes[n]) for n, x in arrays.items()], iter(arrays.values()), 10**9)
    return (folder / "model.safetensors").read_bytes()


def _with_header() -> st.SearchStrategy[bytes]:
    whole = _safetensors()
    length = int.from_bytes(whole[:8], "little")

    def joined(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + whole[8 + length :]

    return damaged_json(json.loads(whole[8 : 8 + length])).map(joined)


def read_tensors(data: bytes, folder: Path) -> None:
    from jaxlm.interop.tensor_files import DTYPES, open_tensors

    put(folder, "model.safetensors", data)
    for entry in open_tensors(folder).values():
        if entry.dtype in DTYPES:
            entry.file.view(entry).sum()


def read_index(data: bytes, folder: Path) -> None:
    from jaxlm.interop.tensor_files import open_tensors

    if not (folder / "one.safetensors").exists():
        put(folder, "one.safetensors", _safetensors())
    put(folder, "model.safetensors.index.json", data)
    open_tensors(folder)


def _index() -> st.SearchStrategy[bytes]:
    return damaged_json({"metadata": {"total_size": 9}, "weight_map": {"a.weight": "one.safetensors"}})


# Hugging Face.


def _hf_configs() -> list[dict[str, Any]]:
    from jaxlm.interop import hf_config
    from jaxlm.layers.rotary import RopeScaling
    from jaxlm.testing import FAMILIES, tiny_config

    scaled = [
        tiny_config("llama", rope_scaling=RopeScaling("llama3", 8.0, 16)),
        tiny_config("llama", rope_scaling=RopeScaling("yarn", 4.0, 32)),
        tiny_config("qwen2", window=4, window_pattern=(False, True, True, True)),
    ]
    return [hf_config.write(config)[1] for config in [*map(tiny_config, FAMILIES), *scaled]]


def read_hf_config(values: Any, folder: Path) -> None:
    from jaxlm.core.json_files import read_object
    from jaxlm.interop import hf_config

    _, config = hf_config.read(read_object(put(folder, "config.json", as_json(values))))
    config.layer_kinds()


@functools.cache
def _checkpoint() -> Path:
    import jax

    from jaxlm.data.tokenizers import HuggingFaceTokenizer
    from jaxlm.interop import huggingface
    from jaxlm.models import Decoder
    from jaxlm.testing import tiny_config

    config = tiny_config("llama", num_layers=1, vocab_size=300)
    params = jax.jit(Decoder(config).init)(jax.random.key(0))["params"]
    tokenizer = HuggingFaceTokenizer(tokenizer_definition(), bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>")
    huggingface.save(home() / "base", config, params, tokenizer, chat_template="{{ messages }}")
    return home() / "base"


_FOLDER_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "jaxlm_tokenizer.json")


def _hf_folder() -> st.SearchStrategy[tuple[str, bytes]]:
    whole = _checkpoint()
    files = [
        st.tuples(st.just(name), damaged_json(json.loads((whole / name).read_text()))) for name in _FOLDER_FILES
    ]
    tensors = st.tuples(st.just("model.safetensors"), damaged((whole / "model.safetensors").read_bytes()))
    return st.one_of(*files, tensors)


def read_hf_folder(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.interop import huggingface

    name, data = case
    shutil.rmtree(folder)
    shutil.copytree(_checkpoint(), folder)
    if name == "tokenizer_config.json":  # is read where ours is not
        (folder / "jaxlm_tokenizer.json").unlink()
    put(folder, name, data)
    huggingface.load(folder)


@functools.cache
def _adapter() -> tuple[Path, Any]:
    import jax

    from jaxlm.interop import huggingface
    from jaxlm.interop.peft import save_adapter
    from jaxlm.peft import LoraConfig, add_lora

    base = huggingface.load(_checkpoint())
    params = add_lora(jax.random.key(1), base.params, LoraConfig(rank=2, alpha=6, targets=("query", "down")))
    save_adapter(home() / "adapter", base.config, params, "base")
    return home() / "adapter", base


def _adapters() -> st.SearchStrategy[tuple[str, bytes]]:
    folder, _ = _adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    return st.tuples(st.just("adapter_config.json"), damaged_json(config)) | st.tuples(
        st.just("adapter_model.safetensors"), damaged(tensors)
    )


def read_adapter(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.interop.peft import load_adapter

    whole, base = _adapter()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        put(folder, name, (whole / name).read_bytes())
    put(folder, *case)
    load_adapter(folder, base)


def read_adapter_alone(case: bytes, folder: Path) -> None:
    """What it names as its base is nothing that is there, so that it never gets to the tensors."""
    from jaxlm.core.json_files import read_object
    from jaxlm.interop import peft

    described = read_object(put(folder, "adapter_config.json", case))
    peft._base(folder, described, None)


# GGUF.


def _gguf_metadata() -> dict[str, Any]:
    from jaxlm.testing import tiny_config
    from tests.interop.gguf_files import metadata_of

    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "a", "b", "ab", "\u2581"]
    types = [3, 3, 2, *[6] * 256, 1, 1, 1, 1]
    return {
        **metadata_of("llama", tiny_config("llama", num_layers=1, vocab_size=len(tokens))),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


@functools.cache
def _gguf(metadata_only: bool = False) -> bytes:
    from jaxlm.testing import tiny_decoder
    from tests.interop import gguf_files

    metadata = _gguf_metadata()
    model, params = tiny_decoder("llama", num_layers=1, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    tensors = gguf_files.tensors_of("llama", model.config, params)
    return gguf_files.write(home() / "model.gguf", "llama", metadata, tensors).read_bytes()


def gguf_bytes(metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int, int]], data: bytes) -> bytes:
    """A GGUF file of any metadata that JSON has, right or wrong."""

    def string(text: str) -> bytes:
        raw = text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw

    def value(x: Any) -> tuple[int, bytes]:
        if isinstance(x, bool):
            return 7, struct.pack("<?", x)
        if isinstance(x, int):
            kind, form = next(((k, f) for k, f, n in ((4, "<I", 32), (10, "<Q", 64)) if 0 <= x < 1 << n), (11, "<q"))
            return kind, struct.pack(form, max(-(1 << 63), min(x, (1 << 63) - 1)) if form == "<q" else x)
        if isinstance(x, float):
            return 6, struct.pack("<f", x if abs(x) < 1e38 else np.float32("inf"))
        if isinstance(x, str):
            return 8, string(x)
        items = [value(item) for item in (x if isinstance(x, list) else [])]
        kind = items[0][0] if items else 4
        body = b"".join(raw for k, raw in items if k == kind)
        return 9, struct.pack("<IQ", kind, sum(k == kind for k, _ in items)) + body

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, x in metadata.items():
        kind, raw = value(x)
        out += string(key) + struct.pack("<I", kind) + raw
    for name, dims, kind, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


def _ggufs() -> st.SearchStrategy[bytes]:
    def full(metadata: Any) -> bytes:
        metadata = metadata if isinstance(metadata, dict) else {}
        known = ("tokenizer", "general", "gemma3")
        named = {k if k.split(".")[0] in known else f"llama.{k}": v for k, v in metadata.items()}
        tensors = [("token_embd.weight", (32, 263), 0, 0), ("rope_freqs.weight", (4,), 0, 0)][: 1 + len(named) % 2]
        return gguf_bytes({"general.architecture": "llama", **named}, tensors, bytes(32 * 263 * 4))

    metadata = _gguf_metadata()
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores")
    small = {**metadata, **{name: metadata[name][-7:] for name in lists}}
    small["tokenizer.ggml.token_type"] = [6, 6, 6, 1, 1, 1, 1]
    byte_level = {**small, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}
    byte_level["tokenizer.ggml.pre"] = "smollm"
    scaled = {**small, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.0}
    gemma = {f"gemma3.{k}" if k.split(".")[0] != "tokenizer" else k: v for k, v in small.items()}
    gemma |= {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 4}
    return damaged_value(small, byte_level, scaled, gemma).map(full) | damaged(_gguf())


def read_gguf(data: bytes, folder: Path) -> None:
    from jaxlm.interop.gguf import architecture, reader, tokenizer

    file = reader.read(put(folder, "model.gguf", data))
    architecture.config(file).layer_kinds()
    tokenizer.stop_ids(file)
    tokenizer.tokenizer(file)


def read_gguf_whole(data: bytes, folder: Path) -> None:
    from jaxlm.interop import gguf

    gguf.load(put(folder, "model.gguf", data))


# Texts and chats.

_CHATS = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "c", "output": "b"},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]},
    {"text": "a\u00e9"},
)


def read_json_lines(data: bytes, folder: Path) -> None:
    from jaxlm.core.errors import JaxlmError
    from jaxlm.data import chat_records, sources

    path, refused = put(folder, "rows.jsonl", data), None
    for read in (
        chat_records.read_chats, chat_records.read_preferences, chat_records.read_labeled, sources.read_documents,
    ):  # fmt: skip
        try:
            list(read(path))
        except JaxlmError as error:
            refused = error
    if refused is not None:
        raise refused


def _documents() -> st.SearchStrategy[tuple[str, bytes]]:
    pyarrow = _pyarrow()
    rows = b"".join(as_json(row) + b"\n" for row in _CHATS)
    kinds = {"a.txt": "t\u00e9xt".encode() * 9, "a.txt.gz": gzip.compress(b"text" * 50)}
    kinds["a.jsonl.gz"] = gzip.compress(rows)
    if pyarrow is not None:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b" * 50, "c"], "n": [1, 2, 3]}), buffer)
        kinds["a.parquet"] = buffer.getvalue()
    return st.one_of([st.tuples(st.just(name), damaged(data)) for name, data in kinds.items()])


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    return pyarrow


def read_documents(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.data import sources

    list(sources.read_documents(put(folder, *case)))


@functools.cache
def _array_record() -> bytes:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(home() / "a.array_record"), "group_size:1")
    for text in (b"first", b'{"text": "second"}', b"third" * 100):
        writer.write(text)
    writer.close()
    return (home() / "a.array_record").read_bytes()


def _benchmarks() -> st.SearchStrategy[tuple[str, bytes]]:
    question = {"question": "q", "choices": ["a", "b"], "answer": 1}
    squad = {
        "data": [{"title": "t", "paragraphs": [{"context": "abc", "qas": [
            {"id": "1", "question": "q", "answers": [{"text": "b", "answer_start": 1}]}]}]}]
    }  # fmt: skip
    code = {n: "x" for n in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}
    files = {
        "gsm8k/test.jsonl": {"question": "q", "answer": "so #### 1,234"},
        "xquad/xquad.en.json": squad,
        "humaneval/HumanEval.jsonl": code,
        "intents/clinc150_small.json": {"test": [["a", "b"]]},
        "questions.jsonl": question,
    }
    return st.one_of([st.tuples(st.just(name), damaged_json(value)) for name, value in files.items()])


def read_benchmark(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.data import benchmarks
    from jaxlm.evals.tasks import read_questions

    path = put(folder, *case)
    readers = {
        "gsm8k": benchmarks.gsm8k, "humaneval": benchmarks.humaneval, "intents": benchmarks.clinc150,
        "xquad": lambda folder: benchmarks.xquad("en", folder=folder),
    }  # fmt: skip
    if path.name == "questions.jsonl":
        read_questions(str(path))
    else:
        readers[path.parent.name](folder=folder)


# Tokenizers.


def _tokenizer_files() -> st.SearchStrategy[tuple[str, bytes]]:
    definition = json.loads(tokenizer_definition())
    small = {**definition, "model": {**definition["model"], "merges": definition["model"]["merges"][:3]}}
    others = [
        {**small, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {**small, "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]}},
        {**small, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(a+)+$|\\s"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}},
        {**small, "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {}}},
        {**small, "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": True,
            "vocab": [["<unk>", 0.0], *([f"<0x{b:02X}>", -1.0] for b in range(256)), ["a", -2.0]]}},
        {**small, "model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 9,
            "continuing_subword_prefix": "##"}},
    ]  # fmt: skip
    settings = {"kind": "hugging_face", "bos": "<|im_start|>", "eos": "<|im_end|>", "pad": None}
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": None}
    return st.one_of(
        st.tuples(st.just("tokenizer.json"), damaged_value(small, *others).map(as_json)),
        st.tuples(st.just("tokenizer.json"), damaged(as_json(small))),
        st.tuples(st.just("jaxlm_tokenizer.json"), damaged_json(settings)),
        st.tuples(st.just("tokenizer_config.json"), damaged_json(config)),
    )


def use_tokenizer(tokenizer: Any) -> None:
    from jaxlm.core.errors import JaxlmError

    for text in ("", "a b\n\u00e9\u2581 <|im_end|> aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", b"\xff\0a"):
        try:
            tokenizer.decode(tokenizer.encode(text))
            if isinstance(text, str):
                tokenizer.encode_with_offsets(text)
        except JaxlmError:
            continue
    tokenizer.encode_batch(["a", "b c"])
    assert tokenizer.fingerprint
    for i in range(0, tokenizer.vocab_size, 17):
        tokenizer.token_bytes(i)


def read_tokenizer(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.data.tokenizers import load_tokenizer

    shutil.rmtree(folder)
    put(folder, "tokenizer.json", tokenizer_definition().encode())
    put(folder, *case)
    use_tokenizer(load_tokenizer(folder))


@functools.cache
def sentence_piece_model() -> bytes:
    """A small lossless model."""
    from jaxlm.data.tokenizers import train_sentencepiece

    tokenizer = train_sentencepiece(["def read(path):\n    return 1\n" * 9], 300, cache=home() / "cache")
    tokenizer.save(home())
    return (home() / "sentencepiece.model").read_bytes()


def _field(number: int, value: Any) -> bytes:
    def varint(n: int) -> bytes:
        out = b""
        while n >= 128:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value % (1 << 64))


def _sentence_pieces() -> st.SearchStrategy[bytes]:
    """Damaged bytes, and models of any pieces and settings in the right form."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)] + [("a", -1.0, 1), ("ab", -2.0, 1), ("b", -3.0, 4)]
    texts = st.sampled_from(("", "a", "ab", "\u2581", "\u2581a", "<unk>", "<0x41>", "<0xZZ>", "a" * 500, "\u00e9"))
    edit = st.tuples(
        st.integers(0, len(pieces) - 1), texts, st.sampled_from((0.0, -1.0, 1e30, float("nan"))), st.integers(0, 7)
    )
    trainer = st.dictionaries(
        st.sampled_from((3, 4, 35, 36, 40, 41, 42, 43, 44, 45, 46, 47, 48)),
        st.sampled_from((0, 1, 2, 3, 4, 300, 1 << 31, -1, b"a", b"\xff", 1.5)),
        max_size=3,
    )
    normalizer = st.dictionaries(st.integers(1, 6), st.sampled_from((0, 1, b"", b"AAAA", b"\xff" * 40)), max_size=3)

    def build(case: Any) -> bytes:
        edits, settings, rules = case
        changed = list(pieces)
        for i, *piece in edits:
            changed[i] = tuple(piece)
        out = b"".join(
            _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind)) for text, score, kind in changed
        )
        out += _field(2, _field(3, 2) + _field(35, 1) + b"".join(_field(n, v) for n, v in settings.items()))
        plain = {3: 0, 4: 0, 5: 1}
        return out + _field(3, b"".join(_field(n, v) for n, v in {**plain, **rules}.items()))

    made = st.tuples(st.lists(edit, max_size=3), trainer, normalizer).map(build)
    return made | damaged(sentence_piece_model())


def read_sentence_piece(data: bytes, folder: Path) -> None:
    from jaxlm.data.tokenizers import load_tokenizer

    use_tokenizer(load_tokenizer(put(folder, "m.model", data)))


# Configurations, run folders, checkpoints, stores.


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


# The command line.


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


# Chat templates.

_EXPRESSIONS = (
    "messages", "messages[0]", "messages[0].content", "messages[-1]['role']", "ns.s", "x", "loop", "bos_token",
    "undefined.a",
    "'ab' * 9999999", "'a' * 3", "ns.s ~ ns.s", "[ns.s, ns.s]", "range(99999)", "2 ** 9999", "9999999 * 9999999",
    "'%9999999999d' % 1", "'{:>9999999999}'.format(1)", "'a'.ljust(99999999999)", "''.__class__", "messages.append(1)",
    "messages | tojson(indent=999999999)", "messages | join('a')", "lipsum(99)", "ns.s | center(999999999)", "x | list",
    "strftime_now('%Y')", "raise_exception('no')", "messages | map(attribute='content') | list", "self", "cycler('a')",
    "(ns.s, ns.s) == (ns.s, ns.s)", "{'a': messages} | items | list", "dict(a=1) | xmlattr", "ns.s | replace('', ns.s)",
    "x | int // 0", "messages | batch(999999999, 'x') | list", "'a' | indent(999999999)", "1e308 * 10", "'a' in ns.s",
    "joiner(', ')()", "ns.s[::-1]", "messages | groupby('role')", "none | length", "ns | pprint", "caller()",
)  # fmt: skip


def _templates() -> st.SearchStrategy[str]:
    expression = st.sampled_from(_EXPRESSIONS)
    leaf = st.one_of(
        expression.map(lambda e: "{{ " + e + " }}"),
        expression.map(lambda e: "{% set ns.s = " + e + " %}"),
        expression.map(lambda e: "{% set x = " + e + " %}"),
        st.sampled_from(("text<|im_end|>", "{% break %}", "{# c #}", "{%", "}}", "{% endfor %}", "{% include 'a' %}")),
        st.just("\ud800"),
        st.text(max_size=5),
    )

    def around(body: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        joined = st.lists(body, max_size=3).map("".join)
        frames = (
            "{% for m in messages %}B{% endfor %}", "{% for i in range(40) %}B{% endfor %}",
            "{% if x is defined %}B{% else %}B{% endif %}", "{% generation %}B{% endgeneration %}",
            "{% macro f() %}B{% endmacro %}{{ f() }}", "{% set x %}B{% endset %}", "{% filter upper %}B{% endfilter %}",
            "{% for i in range(99999) %}B{% endfor %}", "{% call f() %}B{% endcall %}",
        )  # fmt: skip
        return st.tuples(st.sampled_from(frames), joined).map(lambda case: case[0].replace("B", case[1]))

    return st.lists(st.recursive(leaf, around, max_leaves=4), max_size=4).map(
        lambda parts: "{% set ns = namespace(s='ab') %}" + "".join(parts)
    )


def render_template(source: str, folder: Path) -> None:
    from jaxlm.data.chat_jinja import JinjaTemplate
    from jaxlm.data.tokenizers import HuggingFaceTokenizer

    tokenizer = _chat_tokenizer()
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    chat = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]
    JinjaTemplate(source).encode(tokenizer, chat)


@functools.cache
def _chat_tokenizer() -> Any:
    from jaxlm.data.tokenizers import HuggingFaceTokenizer

    return HuggingFaceTokenizer(tokenizer_definition(), bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>")


# What models write.


def _answers() -> st.SearchStrategy[str]:
    pieces = (
        "\\boxed{", "}", "{", "$", "####", "1,234", "-", ".", "\\frac", "\\sqrt", "^", "/", "9" * 400, "answer is",
        "\n",
        "(", ")", "%", "```python", "```", "def f():", "\u0661", "\u00bd", "e999", "**", " " * 50, "<think>", "\\text{",
    )  # fmt: skip
    return st.lists(st.sampled_from(pieces) | st.text(max_size=4), max_size=12).map("".join)


def read_answer(text: str, folder: Path) -> None:
    from jaxlm.verify import _wire, answers, code

    for read in (answers.gsm8k_strict, answers.gsm8k_flexible, answers.last_number, answers.parse_number,
                 answers.last_boxed, answers.math_answer, answers.choice_letter, answers.squad_normalize):  # fmt: skip
        read(text)
    answers.mgsm_answer(text, "en")
    answers.math_equal(text, text[1:])
    answers.numbers_equal(text, "1")
    answers.f1(text, [text[1:]])
    code.extract_code(text)
    with contextlib.suppress(_wire.WireError, ValueError, RecursionError):
        _wire.decode(json.loads(text), lambda number, name: None)


TARGETS: dict[str, Target] = {
    "safetensors": Target(lambda: damaged(_safetensors()), read_tensors),
    "safetensors_header": Target(_with_header, read_tensors),
    "safetensors_index": Target(_index, read_index),
    "hf_config": Target(lambda: damaged_value(*_hf_configs()), read_hf_config),
    "hf_folder": Target(_hf_folder, read_hf_folder, cost=150),
    "adapter": Target(_adapters, read_adapter, cost=8),
    "adapter_base": Target(
        lambda: damaged_json({"base_model_name_or_path": "../base"}, {"base_model_name_or_path": "org/name"}),
        read_adapter_alone,
    ),
    "gguf": Target(_ggufs, read_gguf, cost=3),
    "gguf_model": Target(lambda: damaged(_gguf()), read_gguf_whole, cost=60),
    "json_lines": Target(
        lambda: damaged_json(*_CHATS) | st.lists(damaged_value(*_CHATS).map(as_json), max_size=3).map(b"\n".join),
        read_json_lines,
    ),
    "documents": Target(_documents, read_documents),
    "array_record": Target(
        lambda: damaged(_array_record()).map(lambda data: ("a.array_record", data)), read_documents, cost=2
    ),
    "benchmarks": Target(_benchmarks, read_benchmark),
    "tokenizer_json": Target(_tokenizer_files, read_tokenizer, cost=5),
    "sentencepiece": Target(_sentence_pieces, read_sentence_piece, cost=3),
    "config": Target(_configs, read_config, cost=2),
    "metrics": Target(_metrics, read_metrics),
    "checkpoint_meta": Target(_checkpoint_meta, read_checkpoint_meta, cost=2),
    "data_state": Target(lambda: damaged_json(_iterator()[1]), read_data_state),
    "store": Target(_stores, read_store, cost=3),
    "kept_members": Target(_outcomes, read_outcome),
    "command_line": Target(_command_lines, parse_command_line, cost=100),
    "chat_template": Target(_templates, render_template, cost=40),
    "answers": Target(_answers, read_answer),
}
