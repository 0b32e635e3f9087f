"""What a training checkpoint holds besides tensors of the model: where the run stands.

Plain integers, strings and tensors, so that nothing is ever unpickled. Data order is a pure function of the plan, so
the position in it is one integer; the cursor beside it only saves going through the plan from its beginning.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a run stands after `step` optimizer steps."""

    step: int
    """Completed optimizer steps of this stage."""
    consumed_rows: int
    """Rows of the compiled plan that were trained on."""
    plan_digest: str
    """Digest of the compiled plan; a resume under another plan is refused by the caller."""
    config_text: str
    """The resolved configuration as YAML; also written as a file of its own."""
    data_cursor: dict[str, Any] = field(default_factory=dict)
    """Where the plan goes on without compiling what came before (JSON values); empty where order needs no state."""
    counters: dict[str, int | float] = field(default_factory=dict)
    """Metrics that run over the whole stage (tokens, seconds, ...)."""
    health: dict[str, Any] = field(default_factory=dict)
    """Updates made and left out, and the window that spikes are judged by (JSON values, see train.health)."""
    rng: dict[str, Tensor] = field(default_factory=dict)
    """States of this rank's random generators by name; empty after loading on a rank that did not exist before."""
