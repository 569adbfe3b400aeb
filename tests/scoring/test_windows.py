import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.scoring import rolling_windows


def test_the_worked_example():
    windows = rolling_windows(list(range(10)), prefix=99, max_length=4)
    inputs = [list(w.tokens[:-1]) for w in windows]
    targets = [list(w.tokens[-w.count :]) for w in windows]
    assert inputs == [[99, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert targets == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("size", range(0, 30, 3))
def test_every_token_once(size, length):
    tokens = list(range(size))
    windows = rolling_windows(tokens, prefix=-1, max_length=length)
    assert [t for w in windows for t in w.tokens[-w.count :]] == tokens
    assert all(w.count < len(w.tokens) <= length + 1 for w in windows)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 8, 11])
def test_equals_the_harness(size):
    utils = pytest.importorskip("lm_eval.utils")
    theirs = utils.get_rolling_token_windows(list(range(size)), prefix_token=99, max_seq_len=4, context_len=1)
    ours = rolling_windows(list(range(size)), prefix=99, max_length=4)
    assert [(list(w.tokens[:-1]), list(w.tokens[-w.count :])) for w in ours] == list(theirs)


def test_bad_length():
    with pytest.raises(ConfigError, match="max_length is 0"):
        rolling_windows([1], prefix=0, max_length=0)
