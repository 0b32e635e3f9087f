"""Phases bring back what every rank returned, or the one-line complaint of a rank."""

import logging

import pytest

from data_pipeline.errors import UserError
from janus_mega.demo.phases import Phases, in_forked_ranks, rank_and_size


def number(base: int) -> dict[str, int]:
    rank, size = rank_and_size()
    return {"value": base + rank, "size": size}


def speak() -> None:
    logging.getLogger("janus_mega.demo").info("saved")
    logging.getLogger("janus_mega.demo").warning("odd")


def complain() -> None:
    if rank_and_size()[0] == 1:
        raise UserError("file x holds y; write z")


def break_down() -> None:
    raise RuntimeError("a defect")


def test_every_rank_returns_its_value():
    phases = Phases(1)
    assert phases.run("count", 2, number, 10) == [{"value": 10, "size": 2}, {"value": 11, "size": 2}]
    assert list(phases.seconds) == ["count"] and phases.seconds["count"] > 0


def test_bad_input_in_a_rank_is_told_in_one_line():
    with pytest.raises(UserError, match="^file x holds y; write z$"):
        in_forked_ranks(2, complain)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(Exception, match="a defect") as caught:
        in_forked_ranks(1, break_down)
    assert not isinstance(caught.value, UserError)


def test_every_rank_speaks_in_its_own_name(capfd):
    in_forked_ranks(2, speak)
    told = capfd.readouterr().err
    assert told.count("saved") == told.count("rank 0 INFO") == 1
    assert told.count("rank 0 WARNING") == told.count("rank 1 WARNING") == 1
