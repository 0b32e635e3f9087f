"""Tiny runs on forked ranks that may die in any way: what each start ended with, what its log says, what it left.

Every start goes the way a command goes (`started`, `run`, exit codes), only the model and its rows are tiny.
"""

import faulthandler
import json
import logging
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.schema import CheckpointConfig, HangAction, HealthConfig
from janus_mega.observe.log import setup_logging
from janus_mega.observe.sinks import read_metrics
from janus_mega.parallel import forked
from janus_mega.parallel.groups import build_groups
from janus_mega.train import watch
from janus_mega.train.exits import exit_code_of
from janus_mega.train.faults import FAULTS_FILE, VARIABLE
from janus_mega.train.run import run
from janus_mega.train.starting import started
from janus_mega.train.watch import Watch
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

SETTLE_S = 4.0  # less than in production, but enough for a rank to say what it met, on a busy machine
LONG_PHASE_FACTOR = 5
HEALTH = HealthConfig(hang_timeout_s=0.0, stop_grace_s=30.0)


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    codes: list[int | None]
    """By rank; None where the parent had to kill it."""
    seconds: float
    logs: list[str]
    """Lines of the log and of stderr, by rank."""


def watched(timeout_s: float) -> HealthConfig:
    """Hangs end the job."""
    return replace(HEALTH, hang_timeout_s=timeout_s, hang_action=HangAction.abort)


def tiny_run(
    run_dir: Path,
    last_step: int,
    *,
    world_size: int = 2,
    faults: str = "",
    health: HealthConfig = HEALTH,
    timeout_s: float = 60.0,
    checkpoint: CheckpointConfig | None = None,
) -> Ended:
    """One start: validates and saves every other step; `timeout_s` is that of collectives."""
    run_dir.mkdir(parents=True, exist_ok=True)
    number = len(list(run_dir.glob("rank-0-*.log")))
    logs = [run_dir / f"rank-{rank}-{number}.log" for rank in range(world_size)]
    checkpoint = checkpoint or CheckpointConfig(save_every=2, keep_last=2)
    begin = time.monotonic()
    settle_s, forked.SETTLE_S = forked.SETTLE_S, SETTLE_S
    factor, watch.LONG_PHASE_FACTOR = watch.LONG_PHASE_FACTOR, LONG_PHASE_FACTOR
    try:
        arguments = (run_dir, last_step, faults, health, checkpoint, logs)
        codes = forked.codes_of_ranks(_rank, world_size, *arguments, timeout_s=timeout_s)
    finally:
        forked.SETTLE_S, watch.LONG_PHASE_FACTOR = settle_s, factor
    return Ended(codes, time.monotonic() - begin, [log.read_text() if log.exists() else "" for log in logs])


def _rank(
    run_dir: Path, last_step: int, faults: str, health: HealthConfig, checkpoint: CheckpointConfig, logs: list[Path]
) -> None:
    rank = int(os.environ["RANK"])
    stream = os.open(logs[rank], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(stream, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.disable()  # pytest's would write into the test's own output
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.NOTSET)
    setup_logging(rank, level=logging.INFO)
    os.environ[VARIABLE] = faults
    parallel = fp32(micro_batch_size=2)
    recipe = replace(tiny_recipe(run_dir, parallel, last_step), checkpoint=checkpoint, health=health, validate_every=2)
    try:
        with started(run_dir, health.stop_grace_s) as start:
            with Watch(start.pulse, health, run_dir, None):
                start.strike("init")
                groups = build_groups(1, 1)
            run(TinyWorkload(STAGE3, parallel), recipe, groups, start)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        logging.getLogger("janus_mega").error("%s", error)
        sys.exit(code)


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a run has come to, to be compared exactly: the tensors of its newest checkpoint, and the loss of each step.

    Steps that were made twice must have been made alike.
    """
    reader = open_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1].path)
    losses: dict[int, set[float]] = {}
    for line in read_metrics(run_dir):
        if "loss" in line:
            losses.setdefault(line["step"], set()).add(line["loss"])
    return {
        "step": reader.step,
        "tensors": {name: reader.read(name).numpy().tobytes() for name in reader.names},
        "losses": {step: sorted(found) for step, found in losses.items()},
    }


def struck(run_dir: Path) -> list[dict[str, Any]]:
    """The faults that have happened."""
    path = run_dir / FAULTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
