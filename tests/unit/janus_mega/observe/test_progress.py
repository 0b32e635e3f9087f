"""Plain lines in a log, a bar on a terminal, silence for short work and other ranks."""

import io

from janus_mega.observe import progress as module
from janus_mega.observe.progress import Progress, clock, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands in for the time module; the test moves it."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s


def test_a_log_gets_lines_with_time_left(monkeypatch):
    time, stream = Clock(), io.StringIO()
    monkeypatch.setattr(module, "time", time)
    with Progress("tokenizer", total=10, stream=stream) as progress:
        for _ in range(10):
            time.now_s += 6
            progress.advance(note="loss 0.5")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tokenizer: 2/10 (20 %), 0:48 left, loss 0.5"
    assert lines[-1] == "tokenizer: 10/10 (100 %), took 1:00, loss 0.5"
    assert "\x1b" not in stream.getvalue()


def test_a_total_may_be_learned_on_the_way(monkeypatch):
    time, stream = Clock(), io.StringIO()
    monkeypatch.setattr(module, "time", time)
    with Progress("shards", total=0, stream=stream) as progress:
        time.now_s += 10
        progress.reach(5, 20)
        time.now_s += 5
        progress.reach(20, 20)
    assert stream.getvalue().splitlines() == [
        "shards: 5/20 (25 %), 0:30 left",
        "shards: 20/20 (100 %), took 0:15",
    ]


def test_the_last_line_is_written_once(monkeypatch):
    time, stream = Clock(), io.StringIO()
    monkeypatch.setattr(module, "time", time)
    with Progress("layouts", total=1, stream=stream) as progress:
        time.now_s += 20
        progress.advance()
    assert stream.getvalue() == "layouts: 1/1 (100 %), took 0:20\n"


def test_short_work_is_silent_in_a_log():
    stream = io.StringIO()
    with Progress("blink", total=3, stream=stream) as progress:
        progress.advance(3)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress("drawing", total=2, stream=stream) as progress:
        progress.advance()
        progress.advance(note="done")
    assert "drawing" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_other_ranks_are_silent():
    stream = Terminal()
    with Progress("drawing", total=1, enabled=False, stream=stream) as progress:
        progress.advance()
    assert stream.getvalue() == ""


def test_tracking_passes_everything_on():
    assert list(track([1, 2, 3], "items", enabled=False)) == [1, 2, 3]
    assert list(track(iter("ab"), "letters", enabled=False)) == ["a", "b"]


def test_clock():
    assert (clock(5), clock(65.4), clock(3725)) == ("0:05", "1:05", "1:02:05")


def test_what_was_done_before_does_not_count_for_the_time_left(monkeypatch):
    clock_, stream = Clock(), io.StringIO()
    monkeypatch.setattr(module, "time", clock_)
    with Progress("shards", 0, stream=stream) as bar:
        bar.resume(900, 1000)
        clock_.now_s = 20.0
        bar.reach(950, 1000, "quick")
        assert stream.getvalue() == "shards: 950/1000 (95 %), 0:20 left, quick\n"


def test_a_bar_shows_what_was_done_before():
    stream = Terminal()
    with Progress("shards", 0, stream=stream) as bar:
        bar.resume(900, 1000)
    assert "900/1000" in stream.getvalue()
