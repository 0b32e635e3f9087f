"""Rank 0 speaks, others warn, setting up again replaces."""

import logging

import pytest

from janus_mega.observe.log import ROOT_LOGGERS, setup_logging


@pytest.fixture(autouse=True)
def loggers_as_before():
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in ROOT_LOGGERS}
    yield
    for name, (handlers, propagate) in before.items():
        logger = logging.getLogger(name)
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate


def test_ranks_and_files(tmp_path, capfd):
    file = tmp_path / "logs" / "rank3.log"
    setup_logging(0)
    setup_logging(3, log_file=file)
    logging.getLogger("janus_mega.train").info("quiet")
    logging.getLogger("data_pipeline.stream").warning("loud")
    shown = capfd.readouterr().err
    assert "quiet" not in shown
    assert shown.count("rank 3 WARNING data_pipeline.stream: loud") == 1
    assert "quiet" in file.read_text()
    assert "loud" in file.read_text()
