"""From a configuration to stores: the split, the cache, several sources, and what is refused."""

import json
import sys
import types

import numpy as np
import pytest

from jaxlm.core.configs import from_dict, to_dict
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data import prepare
from jaxlm.data.corpora import hash_fraction
from jaxlm.data.prepare import DataConfig, mixture_weights, prepare_data, prepare_evaluation, source_names
from jaxlm.data.tokenizers import ByteTokenizer


def write_corpus(folder, count, words="the cat sat\n"):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text(f"{folder.name} {i} " + words * (1 + i % 5))
    return folder


def texts(store, source=0):
    documents = range(*store.document_starts[source : source + 2])
    return sorted(ByteTokenizer().decode(store.document(d)) for d in documents)


def prepared(config, cache, **options):
    return prepare_data(config, cache, progress=False, **options)


def test_documents_are_split_by_name(tmp_path):
    corpus = write_corpus(tmp_path / "text", 300)
    config = DataConfig(path=(str(corpus),), tokenizer="byte", validation_fraction=0.1)
    data = prepared(config, tmp_path / "cache")
    assert data.source_names == data.validation.source_names == ("text",)
    names = [f"{i:03d}.txt" for i in range(300)]
    held_out = [n for n in names if hash_fraction(n, "validation") < 0.1]
    assert texts(data.validation) == sorted((corpus / n).read_text() for n in held_out)
    assert texts(data.train) == sorted((corpus / n).read_text() for n in set(names) - set(held_out))
    # The run's seed orders the documents, and never moves one to the other side.
    again = prepared(config, tmp_path / "cache", seed=1)
    assert texts(again.validation) == texts(data.validation)
    assert not np.array_equal(again.train.tokens, data.train.tokens)


@pytest.mark.parametrize("count", [10, 12, 20, 60])
def test_both_sides_get_documents_however_few_there_are(tmp_path, count):
    corpus = write_corpus(tmp_path / "text", count)
    data = prepared(
        DataConfig(path=(str(corpus),), tokenizer="byte", validation_fraction=0.1), tmp_path / "c"
    )
    assert len(texts(data.validation)) >= 1
    assert len(texts(data.train)) >= count // 2
    assert sorted(texts(data.train) + texts(data.validation)) == sorted(
        f.read_text() for f in corpus.iterdir()
    )


def test_a_single_file_is_cut_at_a_line(tmp_path):
    lines = [f"line {i}\n" for i in range(200)]
    (tmp_path / "book.txt").write_text("".join(lines))
    config = DataConfig(path=(str(tmp_path / "book.txt"),), tokenizer="byte", validation_fraction=0.25)
    data = prepared(config, tmp_path / "cache")
    (train,), (held_out,) = texts(data.train), texts(data.validation)
    assert train + held_out == "".join(lines)
    assert train.endswith("\n")
    assert 0.23 < len(held_out) / len(train + held_out) < 0.28
    assert data.source_names == ("book",)
    # Without lines it is cut where the fraction says, not at a heading far before.
    (tmp_path / "long.txt").write_text("Heading\n" + "x" * 992)
    data = prepared(DataConfig(path=(str(tmp_path / "long.txt"),), tokenizer="byte"), tmp_path / "cache")
    assert len(texts(data.validation)[0]) == 50
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match="source 'short' has too little text to hold out"):
        prepared(DataConfig(path=(str(tmp_path / "short.txt"),), tokenizer="byte"), tmp_path / "cache")


def test_a_second_start_reads_no_document(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "text", 60, "def f(x):\n    return x + 1\n" * 20)
    config = DataConfig(path=(str(corpus),), vocab_size=300)
    first = prepared(config, tmp_path / "cache")
    assert first.tokenizer.vocab_size == 300
    monkeypatch.setattr(prepare, "read_documents", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(prepare, "train_sentencepiece", lambda *_, **__: pytest.fail("trained again"))
    second = prepared(config, tmp_path / "cache")
    assert second.train.fingerprint == first.train.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    # Settings that do not change the stores find them; those that do, and changed files, do not.
    prepared(
        DataConfig(path=(str(corpus),), vocab_size=300, sequence_length=8, weights=(1,)), tmp_path / "cache"
    )
    for change in (
        {"vocab_size": 301},
        {"tokenizer": "byte"},
        {"validation_fraction": 0.06},
        {"text_field": "body"},
    ):
        with pytest.raises(pytest.fail.Exception, match="read again"):
            prepared(DataConfig(**{"path": (str(corpus),), "vocab_size": 300, **change}), tmp_path / "cache")
    (corpus / "000.txt").write_text("changed")
    with pytest.raises(pytest.fail.Exception, match="read again"):
        prepared(config, tmp_path / "cache")


def test_an_interrupted_start_keeps_what_was_finished(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "text", 60)
    config = DataConfig(path=(str(corpus),), vocab_size=285)
    build = prepare.build_store

    def killed_before_validation(folder, *arguments, **options):
        if folder.name == "validation":
            raise KeyboardInterrupt
        return build(folder, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(prepare, "build_store", killed_before_validation)
        with pytest.raises(KeyboardInterrupt):
            prepared(config, tmp_path / "cache")
    built = []
    monkeypatch.setattr(
        prepare, "build_store", lambda f, *a, **o: (built.append(f.name), build(f, *a, **o))[1]
    )
    data = prepared(config, tmp_path / "cache")
    assert built == ["validation"]
    whole = prepared(config, tmp_path / "other")
    assert data.train.fingerprint == whole.train.fingerprint
    assert data.validation.fingerprint == whole.validation.fingerprint


def test_several_sources_of_several_kinds(tmp_path):
    write_corpus(tmp_path / "text", 30)
    rows = [json.dumps({"body": f"code {i}"}) for i in range(40)]
    (tmp_path / "code.v2.jsonl").write_text("\n".join(rows))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(rows[:25]))
    config = DataConfig(
        path=(str(tmp_path / "code.v2.jsonl"), str(tmp_path / "*.jsonl")),
        hf=str(tmp_path / "hub"),
        text_field="body",
        tokenizer="byte",
        validation_fraction=0.1,
    )
    data = prepared(config, tmp_path / "cache")
    assert data.source_names == ("code", tmp_path.name.split(".")[0], "hub")
    for source, count in enumerate((40, 40, 25)):
        both = texts(data.train, source) + texts(data.validation, source)
        assert sorted(both) == sorted(f"code {i}" for i in range(count))


def test_names_are_unique():
    paths = ("a/x.txt", "b/x.txt", "x-2.txt", "data/x/*.txt", "c/x.jsonl.gz")
    assert source_names(DataConfig(path=paths)) == ("x", "x-2", "x-2-2", "x-3", "x-4")
    assert source_names(DataConfig()) == ("standard_library",)
    assert source_names(DataConfig(hf="owner/name")) == ("name",)


def test_hub_data_sets_are_fetched_once_and_limited(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append(arguments)
        return ({"text": f"row {i}"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    config = DataConfig(hf="owner/name", hf_documents=50, tokenizer="byte", validation_fraction=0.1)
    for cache in ("cache", "cache"):
        data = prepared(config, tmp_path / cache)
    assert calls == [("owner/name", None)]
    assert sorted(texts(data.train) + texts(data.validation)) == sorted(f"row {i}" for i in range(50))


def test_given_tokenizers(tmp_path):
    corpus = write_corpus(tmp_path / "text", 60)
    first = prepared(DataConfig(path=(str(corpus),), vocab_size=285), tmp_path / "cache")
    first.tokenizer.save(tmp_path)
    second = prepared(DataConfig(path=(str(corpus),), tokenizer=str(tmp_path)), tmp_path / "cache")
    assert second.train.fingerprint == first.train.fingerprint
    with pytest.raises(
        ConfigError, match="tokenizer is 'bite', expected 'sentencepiece', 'byte' or the path"
    ):
        prepared(DataConfig(path=(str(corpus),), tokenizer="bite"), tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"vocabulary size 4096 is too large .* largest possible is \d+"):
        prepared(DataConfig(path=(str(corpus),)), tmp_path / "cache")


def test_evaluation_holds_nothing_out(tmp_path):
    corpus = write_corpus(tmp_path / "text", 30)
    config = DataConfig(path=(str(corpus),))
    for _ in range(2):
        store = prepare_evaluation(config, ByteTokenizer(), tmp_path / "cache", progress=False)
        assert texts(store) == sorted(f.read_text() for f in corpus.iterdir())


def test_mixture_weights(tmp_path):
    short, long = (
        write_corpus(tmp_path / "short", 60, "ab "),
        write_corpus(tmp_path / "long", 30, "abcdef\n" * 40),
    )

    def config(**options):
        return DataConfig(path=(str(short), str(long)), tokenizer="byte", **options)

    store = prepared(config(), tmp_path / "cache").train
    pairs, documents = store.source_pairs, store.source_documents
    np.testing.assert_allclose(mixture_weights(config(), store), pairs / pairs.sum())
    by_document = mixture_weights(config(unit="documents"), store)
    np.testing.assert_allclose(by_document, documents / documents.sum())
    np.testing.assert_allclose(mixture_weights(config(weights=(1, 3)), store), [0.25, 0.75])
    flat = mixture_weights(config(weights=(1, 4), temperature=2), store)
    np.testing.assert_allclose(flat, [1 / 3, 2 / 3])
    # Two epochs of the short source at most, whichever unit the weights are in.
    budget = pairs.sum()
    capped = mixture_weights(config(weights=(1, 1), max_epochs=2), store, budget)
    np.testing.assert_allclose(np.array(capped) * budget, [2 * pairs[0], budget - 2 * pairs[0]])
    capped = mixture_weights(config(weights=(1, 1), max_epochs=2, unit="documents"), store, budget)
    tokens = np.array(capped) * pairs / documents
    limited = min(2 * pairs[0], budget * (pairs / documents)[0] / (pairs / documents).sum())
    np.testing.assert_allclose(tokens / tokens.sum() * budget, [limited, budget - limited])
    with pytest.raises(ConfigError, match="fewer than the budget"):
        mixture_weights(config(max_epochs=2), store, 10 * budget)
    with pytest.raises(ConfigError, match="max_epochs needs the number of tokens"):
        mixture_weights(config(max_epochs=2), store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ("code.txt",), "weights": (-0.1,)}, "mixture weight of 'code' is -0.1, expected >= 0"),
        ({"path": ("a.txt", "b.txt"), "weights": (0, 0)}, "all mixture weights are zero"),
        ({"path": ("a.txt", "b.txt"), "weights": (1,)}, "1 mixture weights for 2 sources"),
        ({"validation_fraction": 0}, "validation_fraction is 0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"hf_documents": 0}, "hf_documents is 0"),
        ({"max_epochs": 0.0}, "max_epochs is 0.0"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**options)


def test_configurations_survive_json():
    config = DataConfig(path=("a", "b"), weights=(1.0, 2.0), max_epochs=3.0, unit="documents")
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(config)))) == config
