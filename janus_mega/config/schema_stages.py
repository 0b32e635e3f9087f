"""The dataclasses of a chain of stages: which runs follow each other, and what crosses the border between two.

A stage is its own run with its own file (freeze set, groups, ratios, steps, early stop); a chain only says the order
and what differs, so no value stands twice.
"""

from dataclasses import dataclass, field
from enum import Enum

from data_pipeline.spec import MISSING


class Border(Enum):
    """Weights that a stage starts from."""

    as_configured = "as_configured"
    previous = "previous"


class OptimizerAtBorder(Enum):
    """`fresh`: moments and their step count start at zero, the schedule starts anew; weights alone are handed on."""

    fresh = "fresh"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLink:
    """One stage of a chain."""

    config: str = MISSING
    """YAML of the stage's run: a path, or a name under configs/."""
    starts_from: Border = Border.as_configured
    """`previous`: the last checkpoint of the stage before, in place of what stage.init_from of its file says."""
    optimizer: OptimizerAtBorder = OptimizerAtBorder.fresh
    """What becomes of the optimizer's state at the border."""
    overrides: list[str] = field(default_factory=list)
    """key=value over the run's file, for this stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesConfig:
    """Stages that run one after the other, each in processes of its own: the root of `janus-mega stages`."""

    family: str = MISSING
    """Name of the chain."""
    ranks: int = 1
    """Ranks of every stage; here they are started on one machine, under SLURM the job brings them."""
    overrides: list[str] = field(default_factory=list)
    """key=value over every run's file, before the stage's own."""
    stages: dict[str, StageLink] = field(default_factory=dict)
    """Name of each stage -> stage, in the order in which they run."""
