"""No step before its layout was seen to train as one process does, where the configuration asks for that.

`janus-mega verify-layout` runs as a command of its own on this machine, on the CPU, before the run joins its ranks: the
comparison must not share a process with CUDA or with process groups. Data-parallel ranks beyond two show nothing new,
so a job of any size is checked on tp * pp * 2 ranks at most. What passed is kept in the run directory and not repeated
until model, layout, loss, optimizer, freeze set or the program's own versions change.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega import __version__
from janus_mega.config import derive
from janus_mega.config.load import dump, save
from janus_mega.config.schema import RunConfig, VerifyLayout
from janus_mega.observe.stopping import StopFlag
from janus_mega.train.exits import NotSaved

_log = logging.getLogger(__name__)

PASSED_FILE = "verify_layout.json"
"""In the run directory: {"digest": of what was checked, ...the command's own JSON}."""

MAX_CHECKED_DP = 2
_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip
_TAIL_LINES = 12
_LOOK_EVERY_S = 0.2


def require_verified(config: RunConfig, world_size: int, stop: StopFlag | None = None) -> None:
    """Checks the layout unless that is off or has passed before. Called by one rank; the others wait in the join.

    Raises:
        NotSaved: a signal asked to stop meanwhile.
        UserError: the layout does not train as one process does; nothing was trained.
    """
    if config.parallel.verify_layout is VerifyLayout.off or world_size == 1:
        return
    run_dir = Path(config.run_dir)
    ranks = config.parallel.tp_size * config.parallel.pp_size
    ranks *= min(MAX_CHECKED_DP, derive.dp_size(config.parallel, world_size))
    digest = _digest(config, ranks)
    if _passed_digest(run_dir / PASSED_FILE) == digest:
        _log.info("%s: its layout has passed before", config.name)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    checked, found = run_dir / "verify_layout.yaml", run_dir / f"{PASSED_FILE}.tmp"
    save(config, checked)
    stop = stop or StopFlag()
    code, output = _run_command(checked, ranks, found, stop)
    if stop.asked:
        raise NotSaved(f"{config.name}: stopped by a signal while its layout was checked; nothing was trained")
    if code != 0:
        raise UserError(
            f"{config.name}: its layout does not train as one process does (parallel.verify_layout):\n{output}\n"
            f"see janus-mega verify-layout {checked} --ranks {ranks}; train on another layout, or report a defect"
        )
    values = json.loads(found.read_text(encoding="utf-8"))
    found.write_text(json.dumps({"digest": digest, **values}, indent=1) + "\n", encoding="utf-8")
    os.replace(found, run_dir / PASSED_FILE)
    checked.unlink()
    _log.info("%s: its layout trains as one process does, on %d ranks in %.0f s", config.name, ranks, values["seconds"])


def _digest(config: RunConfig, ranks: int) -> str:
    """Of everything that the check depends on; data, names and directories are none of it."""
    blank = RunConfig()
    checked = replace(config, name="", run_dir="", data=blank.data, logging=blank.logging, checkpoint=blank.checkpoint)
    checked = replace(checked, stage=replace(config.stage, name="", num_steps=0, stop_at_step=0, init_from=""))
    return hashlib.sha256(f"{__version__} {ranks}\n{dump(checked)}".encode()).hexdigest()


def _passed_digest(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("digest") if found.get("passed") is True else None


def _run_command(checked: Path, ranks: int, found: Path, stop: StopFlag) -> tuple[int, str]:
    """Exit code of the command, and the end of what it said; it is ended where the run is to stop."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    } | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "janus_mega.cli.main", "verify-layout", str(checked)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--ranks", str(ranks), "--json", str(found)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            if stop.asked:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_EVERY_S)
        output.seek(0)
        return process.returncode, "\n".join(output.read().splitlines()[-_TAIL_LINES:])
