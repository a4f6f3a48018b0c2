"""What people see of a run, on a terminal and elsewhere."""

import io
import logging
import re

import pytest

from fathom.train.evaluate import Evaluation
from fathom.train.progress import Bar, Lines, Reporter, duration, printable, reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, **more: object) -> dict:
    basics = {"step": step, "tokens": 100 * step, "loss": 2.5, "bpb": 1.25}
    return {**basics, "tokens_per_second": 50.0, **more}


def test_a_line_comes_every_n_steps_and_at_the_end():
    stream = io.StringIO()
    lines = Lines(every=3, stream=stream)
    lines.start(step=0, steps=7, tokens=700)
    for step in range(1, 8):
        lines.step(record(step))
    text = stream.getvalue()
    assert re.findall(r"step (\d)/7", text) == ["3", "6", "7"]
    assert "loss 2.5000  1.250 bits/byte  50 tokens/s  8s left" in text
    assert "\x1b" not in text


def test_the_time_left_follows_the_tokens_left_at_the_last_steps_pace():
    lines = Lines(every=1, stream=io.StringIO())
    lines.start(step=0, steps=100, tokens=10_000)
    for step in range(1, 51):
        speed = 1.0 if step <= 40 else 100.0  # a slow beginning is forgotten
        text = lines.describe(record(step, tokens_per_second=speed))
    assert "100 tokens/s  50s left" in text


def test_routing_mfu_and_skips_are_shown_where_there_are_any():
    lines = Lines(every=1, stream=io.StringIO())
    text = lines.describe(record(1, mfu=0.413, max_violation=0.5, skipped=True))
    assert "MFU 41.3%" in text
    assert "max violation 0.50" in text
    assert "skipped: not finite" in text


def test_evaluations_samples_saves_and_notices_are_lines_too(tmp_path):
    stream = io.StringIO()
    lines = Lines(stream=stream)
    lines.start(step=4, steps=7, tokens=700)
    lines.evaluation(4, Evaluation(1.5, {"prose": 1.0, "code": 2.0}, {"image": 3.0}, {}))
    lines.evaluation(5, Evaluation(None, {}, {"image": 3.0}, {}))
    lines.sample(5, "two\nlines [bold]\x1b[31m")
    lines.notice("no room")
    assert stream.getvalue().splitlines() == [
        "going on after step 4 of 7",
        "step 4  held out: 1.5000 bits per byte  (prose 1.0000  code 2.0000  image 3.0000)",
        "step 5  held out: (image 3.0000)",
        "step 5  sample: two",
        "lines [bold]\N{REPLACEMENT CHARACTER}[31m",
        "no room",
    ]


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines():
    assert isinstance(reporter(5, Terminal()), Bar)
    assert type(reporter(5, io.StringIO())) is Lines


def test_the_bar_shows_the_step_and_closes():
    stream = Terminal()
    bar = Bar(every=1, stream=stream)
    bar.start(step=0, steps=2, tokens=200)
    bar.step(record(1))
    bar.step(record(2))
    bar.notice("something [odd]")
    bar.close()
    text = stream.getvalue()
    assert "2/2" in text
    assert "loss 2.5000" in text
    assert "something [odd]" in text


def test_the_base_reporter_says_nothing(capsys):
    silent = Reporter()
    silent.start(step=0, steps=1, tokens=1)
    silent.step(record(1))
    silent.notice("x")
    silent.close()
    assert capsys.readouterr() == ("", "")


def test_the_root_logger_is_left_alone():
    before = list(logging.getLogger().handlers)
    reporter(1, io.StringIO()).notice("x")
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-3, "0s"), (45.4, "45s"), (200, "3m 20s"), (3600, "1h 00m"), (90061, "25h 01m")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


def test_control_characters_never_reach_a_terminal():
    assert printable("a\x1b[2Jb\rc\u202ed\ne") == "a\ufffd[2Jb\ufffdc\ufffdd\ne"
