"""The progress display on a terminal and in a file, by what is printed."""

import io

import pytest
from rich.console import Console

from jaxlm.training import progress
from jaxlm.training.progress import Progress, time_left


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_in_a_file_there_is_a_line_now_and_then_and_one_at_the_end(clock):
    console = plain()
    with Progress(100, start_step=20, every_seconds=10, console=console) as bar:
        for step in range(21, 101):
            clock.now += 1.0
            bar.update(step, loss=5.0 - step / 100, tokens_per_second=1234.5)
            if step == 25:
                bar.note("eval/code/bits_per_byte [2.0]")
        clock.now += 1.0
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "eval/code/bits_per_byte [2.0]"
    assert lines[1] == "train 30/100  loss 4.7000  1,234 tokens/s  1:10 left"
    assert lines[-1] == "train 100/100  loss 4.0000  1,234 tokens/s  0:00 left"
    assert len(lines) == 9


def test_a_run_that_is_cut_short_still_says_where_it_was(clock):
    console = plain()

    def run():
        with Progress(100, console=console) as bar:
            clock.now += 1
            bar.update(1, loss=3.0)
            clock.now += 1
            bar.update(2, loss=2.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert console.file.getvalue() == "train 2/100  loss 2.0000  1:38 left\n"


def test_the_time_left_leaves_out_the_first_step_which_compiles(clock):
    bar = Progress(11, console=plain())
    assert bar.seconds_left() is None
    clock.now += 60  # compiling
    bar.update(1)
    assert bar.seconds_left() is None
    clock.now += 2
    bar.update(2)
    assert bar.seconds_left() == pytest.approx(2 * 9)


def test_a_terminal_gets_a_bar(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(4, console=console) as bar:
        for step in range(1, 5):
            clock.now += 1
            bar.update(step, loss=2.5, tokens_per_second=5000)
        bar.note("done [bold]")
    text = console.file.getvalue()
    for part in ("train", "━", "4/4", "loss 2.5000", "5,000 tokens/s", "0:00 left", "done [bold]"):
        assert part in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-:--"), (0.4, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (360000, "100:00:00")],
)
def test_time_left(seconds, words):
    assert time_left(seconds) == words
