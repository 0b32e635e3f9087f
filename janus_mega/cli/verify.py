"""`janus-mega verify-layout`: a configuration's layout, its model shrunk, against one process."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UserError
from janus_mega.cli.launched import take_srun_place

if TYPE_CHECKING:
    from janus_mega.config.schema import ParallelConfig, RunConfig
    from janus_mega.train.layout_check import Verdict

verify_app = typer.Typer(rich_markup_mode=None)

AUTO = "auto"
NOT_EQUAL_CODE = 1
WORK_DIR = "verify_layout"
"""In the run directory: what launched ranks exchange."""

_SHOWN = {"loss": "loss", "norm": "gradient norm", "modules": "gradient norm of a module", "weights": "weights"}


@verify_app.command(name="verify-layout")
def verify_layout(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of a run: a path, or a name under configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values of the file.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps; five meet every hard case once.")] = 5,
    ranks: Annotated[
        str, typer.Option(help="Ranks to fork on this machine; auto is tp * pp * 2. torchrun starts its own.")
    ] = AUTO,
    real_rows: Annotated[
        bool, typer.Option("--real-rows", help="The run's own rows instead of synthetic ones.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything that was compared.")] = None,
) -> None:
    """Train the configuration's layout, shrunk, beside one process in fp32 on the CPU; exit code 1 when they differ."""
    take_srun_place()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Before torch: what is compared is the layout, not kernels, and DeepSpeed starts CUDA when it is imported.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import RunConfig
    from janus_mega.config.validate import validate_run
    from janus_mega.parallel.layout import make_layout

    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1")
    config = load_config(RunConfig, file, overrides or []).config
    validate_run(config, config.parallel.tp_size * config.parallel.pp_size)
    world_size = launched if launched > 1 else _ranks_of(ranks, config.parallel)
    make_layout(world_size, 0, config.parallel.tp_size, config.parallel.pp_size)
    if launched > 1:
        verdict = _verdict_of_launched(config, steps, real_rows)
    else:
        verdict = _verdict_of(config, world_size, steps, real_rows)
    if int(os.environ.get("RANK", "0")) == 0:
        _tell(verdict, json_file)
    if not verdict.passed:
        sys.exit(NOT_EQUAL_CODE)


def _ranks_of(ranks: str, parallel: "ParallelConfig") -> int:
    if ranks == AUTO:
        return parallel.tp_size * parallel.pp_size * 2
    if not ranks.isdigit() or int(ranks) < 1:
        raise UserError(f"--ranks {ranks} must be a number of at least 1, or {AUTO}")
    return int(ranks)


def _verdict_of(config: "RunConfig", world_size: int, steps: int, real_rows: bool) -> "Verdict":
    import torch

    from janus_mega.observe.log import setup_logging
    from janus_mega.train.janus import JanusWorkload
    from janus_mega.train.layout_check import verify_layout as compare

    setup_logging()
    torch.set_num_threads(1)  # the ranks are forks of this process
    if real_rows:
        JanusWorkload(config)  # opens the data: what is wrong with it is told here, in one line
    with tempfile.TemporaryDirectory(prefix="janus_mega_verify_") as folder, _told_in_a_line():
        return compare(config, world_size, Path(folder), num_steps=steps, real_rows=real_rows)


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """A rank that crashed or hung ends the command in one line; its traceback goes to a file that the line names."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    from janus_mega.train.exits import RunEnded

    try:
        yield
    except TimeoutError as error:
        raise RunEnded(f"verify-layout: {error}; nothing was compared") from None
    except ProcessExitedException as error:
        raise RunEnded(f"verify-layout: rank {error.error_index} died: {error}; nothing was compared") from None
    except ProcessRaisedException as error:
        with tempfile.NamedTemporaryFile("w", prefix="janus_mega_verify_", suffix=".txt", delete=False) as file:
            file.write(str(error))
        last = str(error).strip().splitlines()[-1]
        told = f"verify-layout: rank {error.error_index} failed: {last}"
        raise RunEnded(f"{told}; nothing was compared, its traceback is in {file.name}") from None


def _verdict_of_launched(config: "RunConfig", steps: int, real_rows: bool) -> "Verdict":
    import torch

    from janus_mega.observe.log import setup_logging
    from janus_mega.train.janus import JanusWorkload
    from janus_mega.train.layout_check import verify_launched

    setup_logging(int(os.environ["RANK"]))
    torch.set_num_threads(1)
    if real_rows:
        JanusWorkload(config)  # every rank tells what is wrong with the data before it would wait for others
    return verify_launched(config, Path(config.run_dir) / WORK_DIR, num_steps=steps, real_rows=real_rows)


def _tell(verdict: "Verdict", json_file: Path | None) -> None:
    from janus_mega.train.layout_check import BARS

    print(f"{verdict.layout} against one process, fp32, {verdict.num_steps} steps")
    print(f"{'largest relative difference':<28}  {'found':>9}  {'bar':>9}")
    for key, (value, name) in verdict.worst.items():
        mark = "" if value <= BARS[key] else "  <-- OFF"
        print(f"{_SHOWN[key]:<28}  {value:9.1e}  {BARS[key]:9.1e}  {name}{mark}")
    print(f"{'EQUAL' if verdict.passed else 'NOT EQUAL'} in {verdict.seconds:.1f} s")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(verdict.as_values(), indent=1) + "\n", encoding="utf-8")
