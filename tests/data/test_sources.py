"""Every kind of file gives its documents, and every kind of damage is named with its place."""

import gzip
import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.corpora import hash_fraction, split_by_hash, standard_library
from jaxlm.data.sources import Document, huggingface_documents, list_files, read_documents

TEXTS = ["one\r\n", "zwei é\n\n", "", "\ufefftrois"]


def json_lines(texts=TEXTS, field="text"):
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts))


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_all_kinds(folder):
    (folder / "a.txt").write_bytes(TEXTS[0].encode())
    (folder / "b.md").write_bytes(TEXTS[1].encode())
    (folder / "c.py").write_bytes(b"x = 1\n")
    (folder / "d.txt.gz").write_bytes(gzip.compress(TEXTS[3].encode()))
    (folder / "e.jsonl").write_text(json_lines())
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(json_lines().encode()))
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(600), "text": [f"row {i}" for i in range(600)]}), folder / "g.parquet"
    )
    write_array_record(folder / "h.array_record", [b"plain", b'{"text": "in json"}', b"{not json"])
    write_array_record(folder / "i.arecord", [b"r%d" % i for i in range(300)])


def test_a_folder_of_every_kind(tmp_path):
    write_all_kinds(tmp_path)
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_bytes(b"\xff")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "A.TXT").write_text("upper case extension")
    found = list(read_documents(tmp_path))
    assert found == [
        Document(TEXTS[0], "a.txt"),
        Document(TEXTS[1], "b.md"),
        Document("x = 1\n", "c.py"),
        Document(TEXTS[3], "d.txt.gz"),
        *(Document(t, f"e.jsonl:{i}") for i, t in enumerate(TEXTS, 1)),
        *(Document(t, f"f.jsonl.gz:{i}") for i, t in enumerate(TEXTS, 1)),
        *(Document(f"row {i}", f"g.parquet:{i + 1}") for i in range(600)),
        Document("plain", "h.array_record:1"),
        Document("in json", "h.array_record:2"),
        Document("{not json", "h.array_record:3"),
        *(Document(f"r{i}", f"i.arecord:{i + 1}") for i in range(300)),
        Document("upper case extension", "sub/A.TXT"),
    ]
    assert found == list(read_documents(str(tmp_path)))


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path):
    for place in ("here", "there/deeper"):
        (tmp_path / place / "part").mkdir(parents=True)
        (tmp_path / place / "part" / "x.txt").write_text("x")
    for pattern in ("{}", "{}/**/*.txt", "{}/*/x.txt"):
        here, there = ([d.name for d in read_documents(tmp_path / pattern.format(p))] for p in ("here", "there/deeper"))
        assert here == there == ["part/x.txt"]
    assert [d.name for d in read_documents(tmp_path / "here/part/x.txt")] == ["x.txt"]


def test_json_lines_of_any_shape(tmp_path):
    long = "x" * 200_000  # longer than the blocks that are read
    lines = [
        "\ufeff" + json.dumps({"text": long}),
        "",
        "  ",
        json.dumps({"text": "a\nb\u2028c"}, ensure_ascii=False),
    ]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    assert list(read_documents(tmp_path / "a.jsonl")) == [
        Document(long, "a.jsonl:1"),
        Document("a\nb\u2028c", "a.jsonl:4"),
    ]
    (tmp_path / "b.jsonl").write_text(json_lines(field="content"))
    assert [d.text for d in read_documents(tmp_path / "b.jsonl", text_field="content")] == TEXTS


DAMAGED = {
    "a.txt": (b"good\n" * 3 + b"\xff\n", r"a\.txt: not UTF-8: byte 0xFF at offset 15"),
    "b.jsonl": (b'{"text": "\xc3\xa9"}\n{"text": "\xe9"}\n', r"b\.jsonl: not UTF-8: byte 0xE9 at offset 25"),
    "c.jsonl": (b'{"text": "a"}\n{"text": \n', r"c\.jsonl line 2: malformed JSON at column \d+"),
    "d.jsonl": (b'{"text": "a"}\n\n{"body": 1, "id": 2}\n', r"d\.jsonl line 3: no field 'text' .*body, id\)"),
    "e.jsonl": (b'["text"]\n', r"e\.jsonl line 1: expected an object .* got list"),
    "f.jsonl": (b'{"text": null}\n', r"f\.jsonl line 1: field 'text' holds NoneType, expected text"),
    "g.txt.gz": (gzip.compress(b"text " * 50_000)[:150], r"g\.txt\.gz: truncated .* of 150 bytes, after \d+"),
    "h.jsonl.gz": (gzip.compress(json_lines().encode())[:-9], r"h\.jsonl\.gz: truncated .* after \d+"),
    "i.txt.gz": (b"no gzip at all", r"i\.txt\.gz: truncated or damaged gzip"),
    "j.parquet": (b"PAR1 and no more", r"j\.parquet: not a Parquet file"),
    "k.array_record": (b"garbage" * 99, r"k\.array_record: not an ArrayRecord file"),
    "l.csv": (b"a,b\n", r"l\.csv: unknown kind of file, .* \.txt, .*\.jsonl\.gz, \.parquet"),
    "m.gz": (b"", r"m\.gz: unknown kind of file"),
    "n.txt": (b"", r"n\.txt is empty"),
    "o.jsonl": (b"\n\n", r"o\.jsonl is empty"),
    "p.jsonl": (b'{"text": ""}\n', r"p\.jsonl is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_with_its_place(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / name))


def test_missing_fields_and_damage_in_binary_kinds(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no field 'text' \(fields present: body, id\)"):
        list(read_documents(tmp_path / "a.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet row 2: field 'text' holds NoneType"):
        list(read_documents(tmp_path / "b.parquet"))
    write_array_record(tmp_path / "c.arecord", [b"fine", b"\xff"])
    with pytest.raises(DataError, match=r"c\.arecord record 2: not UTF-8: byte 0xFF at offset 0"):
        list(read_documents(tmp_path / "c.arecord"))
    write_array_record(tmp_path / "d.arecord", [b'{"body": "x"}'])
    with pytest.raises(DataError, match=r"d\.arecord record 1: no field 'text' \(fields present: body\)"):
        list(read_documents(tmp_path / "d.arecord"))
    write_array_record(tmp_path / "e.arecord", [b"fine"])
    raw = bytearray((tmp_path / "e.arecord").read_bytes())
    raw[100:104] = b"zzzz"
    (tmp_path / "e.arecord").write_bytes(raw)
    with pytest.raises(DataError, match=r"e\.arecord: damaged in records 1"):
        list(read_documents(tmp_path / "e.arecord"))


def test_paths_without_documents(tmp_path):
    with pytest.raises(DataError, match="no such file or folder: .*absent"):
        list_files(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no file matches .*\*\.txt"):
        list_files(tmp_path / "*.txt")
    (tmp_path / "x.bin").touch()
    with pytest.raises(DataError, match=r"no text in the folder .*\.txt, \.md"):
        list_files(tmp_path)


def test_packages_that_are_not_there_are_named(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"a\.parquet needs the package 'pyarrow': pip install 'jaxlm\[parquet\]'"):
        list(read_documents(tmp_path / "a.parquet"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"'some/name' needs the package 'datasets': pip install 'jaxlm\[hf\]'"):
        next(huggingface_documents("some/name"))


# Hugging Face data sets


def test_local_folder_with_files_per_split(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [split]}), tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    assert [d.text for d in huggingface_documents(str(tmp_path))] == ["train"]
    assert [d.text for d in huggingface_documents(str(tmp_path), split="test")] == ["test"]


def write_saved_split(folder, texts):
    """What `Dataset.save_to_disk` writes, as far as a reader needs it."""
    folder.mkdir()
    table = pyarrow.table({"text": texts})
    file = str(folder / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))


def test_local_folder_that_save_to_disk_wrote(tmp_path):
    write_saved_split(tmp_path / "train", ["a", "b"])
    write_saved_split(tmp_path / "test", ["c"])
    assert [d.text for d in huggingface_documents(str(tmp_path / "train"))] == ["a", "b"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [d.text for d in huggingface_documents(str(tmp_path), split="test")] == ["c"]
    with pytest.raises(DataError, match=r"no split 'dev' \(splits: train, test\)"):
        next(huggingface_documents(str(tmp_path), split="dev"))
    with pytest.raises(DataError, match=r"no field 'body' \(fields present: text\)"):
        next(huggingface_documents(str(tmp_path), text_field="body"))


def test_hub_data_sets_are_streamed(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "a"}, {"text": "b"}, {"body": "c"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = huggingface_documents("some/name", split="validation", subset="en")
    assert next(rows) == Document("a", "some/name/validation:1")
    assert next(rows) == Document("b", "some/name/validation:2")
    with pytest.raises(DataError, match=r"some/name \[validation\] row 3: no field 'text'"):
        next(rows)
    assert calls == [(("some/name", "en"), {"split": "validation", "data_files": None, "streaming": True})]


@pytest.mark.release
def test_with_the_datasets_package(tmp_path):
    """Needs the extra [hf]; the release tier has it."""
    import datasets

    (tmp_path / "x.jsonl").write_text(json_lines())
    rows = huggingface_documents("json", data_files=str(tmp_path / "x.jsonl"))
    assert [d.text for d in rows] == TEXTS
    split = datasets.Dataset.from_dict({"text": TEXTS})
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "all")
    for folder in ("one", "all"):
        assert [d.text for d in huggingface_documents(str(tmp_path / folder))] == TEXTS


# Corpora


def test_standard_library_is_this_interpreter_s_own():
    documents = {d.name: d.text for d in standard_library()}
    with open(json.__file__, "rb") as file:
        assert documents["json/__init__.py"] == file.read().decode()
    assert list(documents) == sorted(documents)
    assert sum(map(len, documents.values())) > 5_000_000
    assert not any("site-packages" in n or "/tests/" in n or n.startswith("test/") for n in documents)


def test_splits_are_stable_and_of_the_right_size():
    documents = [Document("", f"doc {i}") for i in range(4000)]
    train, validation = split_by_hash(documents, 0.1)
    assert sorted(train + validation) == sorted(documents)
    assert 300 < len(validation) < 500
    fewer = split_by_hash(documents[::2], 0.1)
    assert set(fewer[1]) == set(validation) & set(documents[::2])
    assert split_by_hash(documents, 0.1, salt=1)[1] != validation
    assert split_by_hash(documents, 0.0) == (documents, [])
    # A name's side must never move between versions of this code: runs compare validation losses.
    assert [hash_fraction(n) < 0.5 for n in "abcdef"] == [True, True, True, False, True, False]
    with pytest.raises(ConfigError, match="validation fraction is 1.5"):
        split_by_hash(documents, 1.5)
