"""Reads that hang: the error comes in time, names the source, and nothing else changes."""

import threading
import time

import pytest

from jaxlm.core.errors import DataError
from jaxlm.data import prepare, watch
from jaxlm.data.prepare import DataConfig, prepare_data
from jaxlm.data.sources import Document
from jaxlm.data.watch import Reader, watched

SHORT = 0.2


@pytest.fixture
def stuck(monkeypatch):
    """Waits in a read until the test is over."""
    monkeypatch.setattr(watch, "_stalled", False)
    over = threading.Event()
    yield lambda: over.wait(60)
    over.set()


def test_items_come_as_they_are(monkeypatch):
    assert list(watched(iter(range(10_000)), "numbers")) == list(range(10_000))
    assert list(watched([], "nothing")) == []
    assert list(watched(range(5), "no limit", timeout=0)) == [0, 1, 2, 3, 4]


def test_threads_end_with_the_reading():
    before = threading.active_count()
    items = watched(iter(range(10**9)), "numbers")
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before


def test_errors_of_the_source_pass_through():
    def broken():
        yield 1
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        list(watched(broken(), "remote"))


def test_a_hanging_source_is_named(stuck):
    def hangs():
        yield from range(3)
        stuck()

    found = []
    with pytest.raises(DataError, match=r"source 'remote': nothing came within 0.2 s \(data.timeout\): it hangs"):
        found.extend(watched(hangs(), "remote", SHORT))
    assert watch.stalled()


def test_the_clock_of_the_wall_does_not_matter(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: -1e9)
    assert Reader(10.0)(lambda: 3, lambda: "three") == 3


def test_a_hanging_corpus_is_named_before_it_is_tokenized(tmp_path, stuck, monkeypatch):
    (tmp_path / "book.txt").write_text("some words\n" * 100)

    def hangs(path, field):
        yield Document("one\n" * 40, "one")
        stuck()

    monkeypatch.setattr(prepare, "read_documents", hangs)
    config = DataConfig(path=(str(tmp_path / "book.txt"),), tokenizer="byte", timeout=SHORT)
    with pytest.raises(DataError, match="source 'book': nothing came within 0.2 s"):
        prepare_data(config, tmp_path / "cache", progress=False)
