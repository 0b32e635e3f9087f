"""Stages one after the other: what trains where, and a command for each.

A border between stages is a border between processes: a stage is `janus-mega train` on its own file with the weights of
the stage before as `stage.init_from`, so starting a stage and resuming one are the roads that single runs take. A stage
that has its last checkpoint is passed over; one that was interrupted continues from its newest.
"""

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.checkpoint.manager import find_latest, list_checkpoints
from janus_mega.config import derive
from janus_mega.config.load import load_config
from janus_mega.config.schema import Module, OptimizerState, RunConfig
from janus_mega.config.schema_stages import Border, StagesConfig
from janus_mega.config.validate import validate_run
from janus_mega.models.count import backbone_parameters, module_parameters
from janus_mega.train.exits import BAD_INPUT, DEFECT, RunEnded, most_telling
from janus_mega.train.saving import CHECKPOINTS_DIR
from janus_mega.train.stop import STOP_SIGNALS

LAST = (Module.text_head, Module.image_head)
"""Modules of the last pipeline rank; all others but the backbone live on the first."""
SLURM_SCRIPT = "slurm/train.sbatch"
"""In the repository; what follows it goes to `janus-mega train`."""


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with everything resolved."""

    name: str
    file: str
    overrides: tuple[str, ...]
    config: RunConfig
    ranks: int

    @property
    def last_step(self) -> int:
        """Step after which it ends."""
        return derive.last_step(self.config.stage)

    @property
    def root(self) -> Path:
        """Folder of its checkpoints."""
        return Path(self.config.run_dir) / CHECKPOINTS_DIR

    def reached_step(self) -> int:
        """Step of its newest checkpoint, 0 without one; nothing is verified."""
        return max((found.step for found in list_checkpoints(self.root)), default=0)

    def final(self) -> Path | None:
        """Its last checkpoint, if that is whole."""
        return find_latest(self.root, lambda step: step == self.last_step)

    def command(self) -> list[str]:
        """`janus-mega train` of this stage, without the ranks."""
        return ["janus-mega", "train", self.file, *self.overrides]


def plan_stages(chain: StagesConfig) -> list[PlannedStage]:
    """Resolves every stage of a chain.

    Raises:
        UserError: there is none, a file is wrong, a rule is broken, the first starts from a stage before it, the models
            differ, or two stages share a run directory.
    """
    if not chain.stages:
        raise UserError(f"{chain.family}: names no stage; list them under stages")
    planned: list[PlannedStage] = []
    for name, link in chain.stages.items():
        overrides = [*chain.overrides, *link.overrides]
        if link.starts_from is Border.previous:
            if not planned:
                raise UserError(f"{chain.family}: {name} is first, so it cannot start from a previous stage")
            overrides.append(f"stage.init_from={planned[-1].root / f'step-{planned[-1].last_step:08d}'}")
        config = load_config(RunConfig, link.config, overrides).config
        validate_run(config, chain.ranks)
        planned.append(PlannedStage(name, link.config, tuple(overrides), config, chain.ranks))
    _check_together(chain.family, planned)
    return planned


def _check_together(family: str, planned: Sequence[PlannedStage]) -> None:
    first = planned[0]
    for number, stage in enumerate(planned):
        if stage.config.model != first.config.model:
            raise UserError(f"{family}: {stage.name} has another model than {first.name}; give all stages the same")
        shared = [other.name for other in planned[:number] if other.config.run_dir == stage.config.run_dir]
        if shared:
            raise UserError(
                f"{family}: {shared[0]} and {stage.name} share run_dir {stage.config.run_dir}; give each its own"
            )


def run_stages(planned: Sequence[PlannedStage]) -> Iterator[str]:
    """Runs what is not done yet, each stage in processes of its own on this machine; yields a line before each.

    Raises:
        RunEnded: a stage did not come to its end; carries the exit code that says why. What it saved stays, and running
            the chain again continues there.
        UserError: a stage met bad input, which it has told.
    """
    for stage in planned:
        if stage.final() is not None:
            yield f"{stage.name}: done, {stage.last_step} steps"
            continue
        yield f"{stage.name}: from step {stage.reached_step()} to {stage.last_step}"
        command = [sys.executable, "-m", "janus_mega.cli.main", *stage.command()[1:], "--ranks", str(stage.ranks)]
        code = _code_of(command)
        if code != 0 or stage.final() is None:
            told = f"{stage.name}: {shlex.join(stage.command())} ended with code {code} at step "
            told += f"{stage.reached_step()} of {stage.last_step}"
            if code == BAD_INPUT:
                raise UserError(f"{told}; correct what it says, the same command continues there")
            ended = RunEnded(f"{told}; the same command continues there")
            ended.exit_code = most_telling([code]) or DEFECT  # 0 without a last checkpoint explains nothing
            raise ended


def _code_of(command: Sequence[str]) -> int:
    """Runs a command; stop signals meanwhile are its own to act on."""
    process = subprocess.Popen(command)
    if threading.current_thread() is not threading.main_thread():
        return process.wait()
    before = {number: signal.signal(number, lambda told, _: process.send_signal(told)) for number in STOP_SIGNALS}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def slurm_lines(planned: Sequence[PlannedStage]) -> Iterator[str]:
    """Commands for a login node: each stage waits for the one before, one that is submitted again resumes by itself."""
    waits = ""
    for number, stage in enumerate(planned, start=1):
        options = f"--parsable --ntasks={stage.ranks} --job-name={shlex.quote(stage.name)}{waits}"
        yield f"job{number}=$(sbatch {options} {SLURM_SCRIPT} {shlex.join([stage.file, *stage.overrides])})"
        waits = f" --dependency=afterok:$job{number} --kill-on-invalid-dep=yes"


def describe_stages(planned: Sequence[PlannedStage]) -> Iterator[str]:
    """What trains where: per stage its steps, ratios and borders, then modules by pipeline rank."""
    for number, stage in enumerate(planned):
        config, reached = stage.config, stage.reached_step()
        optimizer, parallel = config.optimizer, config.parallel
        done = "done" if reached >= stage.last_step else f"at step {reached}" if reached else "not started"
        stop = f" of {config.stage.num_steps} planned" if stage.last_step != config.stage.num_steps else ""
        shares = ", ".join(f"{task} {share:.0%}" for task, share in derive.task_shares(config).items())
        dp_size = derive.dp_size(parallel, stage.ranks)
        yield f"{stage.name}  ({stage.file}, {done})"
        yield f"  steps      {stage.last_step}{stop}, {config.stage.global_batch_size} rows of {config.data.seq_len}"
        yield f"  ratios     {shares}"
        yield f"  rate       {optimizer.lr:g} {optimizer.schedule.value}, warm-up {optimizer.warmup_steps}"
        yield f"  starts     {config.stage.init_from or 'fresh'}"
        yield f"  optimizer  {_optimizer_start(stage, planned[:number])}"
        yield f"  run        {config.run_dir}"
        yield f"  layout     tp {parallel.tp_size} x pp {parallel.pp_size} x dp {dp_size}, {parallel.backend.value}"
        yield from _module_table(config)
        yield ""


def _optimizer_start(stage: PlannedStage, earlier: Sequence[PlannedStage]) -> str:
    """What becomes of moments at the stage's start, by module where the stage it starts from is of the chain."""
    here = stage.config.stage
    if here.optimizer_state is OptimizerState.fresh:
        return "fresh"
    sources = [other for other in earlier if Path(here.init_from).parent == other.root]
    if not sources:
        return "carried where parameters trained before"
    before = sources[0].config.stage.trainable
    carried, new = (
        [module.value for module in here.trainable if (module in before) is known] for known in (True, False)
    )
    return f"carried for {', '.join(carried) or 'nothing'}" + (f", fresh for {', '.join(new)}" if new else "")


def _module_table(config: RunConfig) -> Iterator[str]:
    pp_size = config.parallel.pp_size
    heads = "".join(f"{f'pp rank {rank}':>16}" for rank in range(pp_size))
    yield f"  {'module':<24}{'rate':>10}{heads}"
    trained = [0] * pp_size
    for module, counts in parameters_by_rank(config).items():
        trains = module in config.stage.trainable
        rate = f"{config.optimizer.lr * config.optimizer.lr_scales.get(module.value, 1.0):g}" if trains else "frozen"
        trained = [total + count * trains for total, count in zip(trained, counts, strict=True)]
        yield f"  {module.value:<24}{rate:>10}" + "".join(
            f"{count or '-':>16{',' if count else ''}}" for count in counts
        )
    yield f"  {'trained':<24}{'':>10}" + "".join(f"{count:>16,}" for count in trained)


def parameters_by_rank(config: RunConfig) -> dict[Module, list[int]]:
    """Parameters of every module on every pipeline rank, over its tp ranks together."""
    pp_size, backbone = config.parallel.pp_size, config.model.backbone
    layers = derive.layer_counts(config.model, config.parallel)
    layer = (backbone_parameters(backbone) - backbone.hidden_size) // backbone.num_layers
    found = {}
    for module, count in module_parameters(config.model).items():
        counts = [0] * pp_size
        if module is Module.backbone:
            counts = [layer * sum(layers[rank::pp_size]) for rank in range(pp_size)]
            counts[-1] += backbone.hidden_size  # the final norm
        else:
            counts[-1 if module in LAST else 0] = count
        found[module] = counts
    return found
