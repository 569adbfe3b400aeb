"""The store holds every document once, refuses what it was not built from, and is whole or absent."""

import json
import pickle

import numpy as np
import pytest
import rich.progress

from jaxlm.core.errors import DataError
from jaxlm.data import store as store_module
from jaxlm.data.sources import Document
from jaxlm.data.store import build_store, open_store
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.testing.tokenizers import DigitGroupTokenizer, GreedyTokenizer


def corpus(name, count, words=7):
    return [Document(f"{name} {i} " * (1 + i % words), f"{name}{i}") for i in range(count)]


def sources(count=40):
    return {"text": corpus("the", count), "code": corpus("ab é", count // 2)}


def build(folder, data=None, tokenizer=None, **options):
    options = {"seed": 3, "progress": False, **options}
    return build_store(folder, sources() if data is None else data, tokenizer or GreedyTokenizer(), **options)


def test_every_document_is_there_once_in_a_seeded_order(tmp_path):
    tokenizer = GreedyTokenizer()
    store = build(tmp_path / "s")
    bos, eos = tokenizer.special_ids["bos"], tokenizer.special_ids["eos"]
    for index, (name, documents) in enumerate(sources().items()):
        first, last = store.document_starts[index : index + 2]
        held = [store.document(d) for d in range(first, last)]
        assert all(ids[0] == bos and ids[-1] == eos for ids in held)
        texts = [tokenizer.decode(ids) for ids in held]
        assert sorted(texts) == sorted(d.text for d in documents)
        assert texts != [d.text for d in documents]
        assert store.byte_counts[first:last].tolist() == [len(t.encode()) for t in texts]
        assert (store.source_ids[first:last] == index).all()
        assert store.source_index(name) == store.source_index(index) == index
    assert store.source_documents.tolist() == [40, 20]
    assert store.source_pairs.sum() == len(store.tokens) - 60
    again, other = build(tmp_path / "again"), build(tmp_path / "other", seed=4)
    assert again.fingerprint == store.fingerprint != other.fingerprint
    assert np.array_equal(again.tokens, store.tokens)
    assert not np.array_equal(other.tokens, store.tokens)


def test_ids_need_no_more_than_their_width(tmp_path):
    class Wide(DigitGroupTokenizer):
        vocab_size = 70_000

    assert build(tmp_path / "narrow", tokenizer=DigitGroupTokenizer()).tokens.dtype == np.uint16
    assert build(tmp_path / "wide", tokenizer=Wide()).tokens.dtype == np.uint32


def test_without_special_tokens_short_documents_are_left_out(tmp_path):
    data = {"a": [Document("", "0"), Document("x", "1"), Document("xy", "2")]}
    plain = build(tmp_path / "plain", data, ByteTokenizer(), add_bos=False, add_eos=False)
    assert bytes(plain.tokens.tolist()) == b"xy"
    assert plain.byte_counts.tolist() == [2]
    assert sorted(len(build(tmp_path / "both", data, ByteTokenizer()).document(i)) for i in range(3)) == [
        2,
        3,
        4,
    ]


def test_long_documents_and_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_STRETCH", 50)
    monkeypatch.setattr(store_module, "_BATCH_BYTES", 100)
    tokenizer = GreedyTokenizer()
    data = {"a": [*corpus("the\nend", 30), Document("x" * 333, "x"), Document("\n" * 120, "n")]}
    store = build(tmp_path / "s", data)
    texts = [tokenizer.decode(store.document(d)) for d in range(32)]
    assert sorted(texts) == sorted(d.text for d in data["a"])


def test_the_same_inputs_are_not_encoded_again(tmp_path, monkeypatch):
    store = build(tmp_path / "s")
    monkeypatch.setattr(GreedyTokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    assert build(tmp_path / "s").fingerprint == store.fingerprint
    assert open_store(tmp_path / "s", GreedyTokenizer()).fingerprint == store.fingerprint


def changed_text():
    data = sources()
    data["code"][3] = Document("other", data["code"][3].name)
    return data


def renamed():
    data = sources()
    data["code"][3] = Document(data["code"][3].text, "other")
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data=sources(42)), r"text\.bytes: \d+ -> \d+; text\.digest: .*; text\.read: 40 -> 42"),
        (dict(data=changed_text()), r"code\.bytes: \d+ -> \d+; code\.digest"),
        (dict(data=renamed()), r"\(code\.digest: '\w+' -> '\w+'\)"),
        (dict(data={"text": corpus("the", 40)}), r"sources: \['text', 'code'\] -> \['text'\]"),
        (dict(seed=4), r"\(seed: 3 -> 4\)"),
        (dict(add_eos=False), r"add_eos: True -> False"),
        (dict(tokenizer=ByteTokenizer()), r"tokenizer: '\w+' -> '\w+'; vocab_size: \d+ -> 259"),
    ],
)
def test_other_data_or_settings_are_refused_by_name(tmp_path, change, message):
    build(tmp_path / "s")
    with pytest.raises(DataError, match=message):
        build(tmp_path / "s", **change)


def test_damaged_stores_are_refused(tmp_path):
    build(tmp_path / "s")
    with pytest.raises(DataError, match="encoded with the tokenizer"):
        open_store(tmp_path / "s", ByteTokenizer())
    with pytest.raises(DataError, match=r"no tokenized store at .*absent"):
        open_store(tmp_path / "absent")
    for name in ("tokens.bin", "offsets.bin", "sources.bin", "bytes.bin"):
        whole = (tmp_path / "s" / name).read_bytes()
        (tmp_path / "s" / name).write_bytes(whole[:-4])
        with pytest.raises(DataError, match=rf"{name} holds {len(whole) - 4} bytes, expected {len(whole)}"):
            open_store(tmp_path / "s")
        (tmp_path / "s" / name).unlink()
        with pytest.raises(DataError, match=rf"{name} holds 0 bytes"):
            build(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(whole)
    manifest = tmp_path / "s" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:100])
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_store(tmp_path / "s")
    for change in (
        {"files": {"../../etc/passwd": 3}}, {"dtype": "object"}, {"dtype": "float64"}, {"sources": []}, {"settings": 3},
        {"sources": [{"name": "a", "documents": 1 << 60, "tokens": 1, "read": 1, "bytes": 1, "digest": ""}]},
        {"fingerprint": None},
    ):  # fmt: skip
        manifest.write_text(json.dumps({**json.loads(text), **change}))
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            open_store(tmp_path / "s")
    manifest.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(DataError, match="has format 99, expected 1"):
        open_store(tmp_path / "s")


def test_flipped_offsets_and_sources_are_refused(tmp_path):
    build(tmp_path / "s")
    for name, dtype in (("offsets.bin", np.int64), ("sources.bin", np.int32)):
        values = np.fromfile(tmp_path / "s" / name, dtype)
        for at, value in ((3, -1), (5, 1 << 30), (-1, 0)):
            changed = values.copy()
            changed[at] = value
            changed.tofile(tmp_path / "s" / name)
            with pytest.raises(DataError, match="is damaged .offsets or sources"):
                open_store(tmp_path / "s")
        values.tofile(tmp_path / "s" / name)


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupted():
        yield from corpus("the", 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", {"a": interrupted()})
    assert list(tmp_path.iterdir()) == []
    build(tmp_path / "s")


def test_empty_and_unencodable_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="no sources"):
        build(tmp_path / "s", {})
    with pytest.raises(DataError, match="source 'b' is empty"):
        build(tmp_path / "s", {"a": corpus("x", 3), "b": []})
    with pytest.raises(DataError, match="'page 7': character 1 is the lone surrogate"):
        build(tmp_path / "s", {"a": [Document("a\ud800", "page 7")]})
    store = build(tmp_path / "s")
    with pytest.raises(DataError, match="no source 'tex' .* did you mean 'text'"):
        store.source_index("tex")
    with pytest.raises(DataError, match="no source 2"):
        store.source_index(2)


def test_copies_map_the_same_files(tmp_path):
    store = build(tmp_path / "s")
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert np.array_equal(pickle.loads(sent).tokens, store.tokens)


def test_progress_counts_bytes(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(rich.progress.Progress, "advance", lambda self, task, size: steps.append(size))
    total = sum(len(d.text.encode()) for documents in sources().values() for d in documents)
    build(tmp_path / "s", progress=True, total_bytes=total)
    assert sum(steps) == total
