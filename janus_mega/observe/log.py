"""Logging, set up once per process: rank 0 speaks, the others only warn, every line names its rank.

Library code takes `logging.getLogger(__name__)` and knows nothing of ranks, handlers or files.
"""

import logging
import sys
from pathlib import Path

ROOT_LOGGERS = ("janus_mega", "data_pipeline")

_FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"


def setup_logging(rank: int = 0, *, level: int = logging.INFO, log_file: Path | None = None) -> None:
    """Sends our loggers to stderr (rank 0 at `level`, others from WARNING) and, where given, to a file at `level`.

    Calling it again replaces the earlier handlers, so a forked rank states its own number.
    """
    formatter = logging.Formatter(_FORMAT.format(rank=rank), datefmt="%H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
    for name in ROOT_LOGGERS:
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
