"""Texts to train on and to be judged by: documents, chats, benchmarks."""

import functools
import gzip
import io
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.mutations import as_json, damaged, damaged_json, damaged_value
from tests.fuzz.target import Target, home, put

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


TARGETS: dict[str, Target] = {
    "json_lines": Target(
        lambda: damaged_json(*_CHATS) | st.lists(damaged_value(*_CHATS).map(as_json), max_size=3).map(b"\n".join),
        read_json_lines,
    ),
    "documents": Target(_documents, read_documents),
    "array_record": Target(
        lambda: damaged(_array_record()).map(lambda data: ("a.array_record", data)), read_documents, cost=2
    ),
    "benchmarks": Target(_benchmarks, read_benchmark),
}
