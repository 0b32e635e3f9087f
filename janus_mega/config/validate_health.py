"""Rules of what is saved, and of what happens when numbers go wrong or a rank stops."""

import math
from collections.abc import Iterator

from janus_mega.config.schema import CheckpointConfig, HealthConfig

MIN_WINDOW = 8
MIN_SIGMAS = 2.0
MIN_TIMEOUT_S = 1.0


def health_rules(health: HealthConfig) -> Iterator[str]:
    """Ranges; a threshold that ordinary steps would pass is refused."""
    if health.max_skips_in_a_row < 1:
        yield f"health.max_skips_in_a_row {health.max_skips_in_a_row} must be at least 1"
    if health.max_rewinds < 0:
        yield f"health.max_rewinds {health.max_rewinds} must be 0 (stop instead) or more"
    if health.spike_sigmas != 0 and not MIN_SIGMAS <= health.spike_sigmas < math.inf:
        yield (
            f"health.spike_sigmas {health.spike_sigmas:g} must be 0 (off) or at least {MIN_SIGMAS:g}, or ordinary "
            "steps are skipped; 6 is usual"
        )
    if health.spike_window < MIN_WINDOW:
        yield f"health.spike_window {health.spike_window} must be at least {MIN_WINDOW} steps"
    if health.hang_timeout_s != 0 and not MIN_TIMEOUT_S <= health.hang_timeout_s < math.inf:
        yield f"health.hang_timeout_s {health.hang_timeout_s:g} must be 0 (off) or at least {MIN_TIMEOUT_S:g} second"
    if not 0 <= health.stop_grace_s < math.inf:
        yield f"health.stop_grace_s {health.stop_grace_s:g} must be 0 (waits for ever) or more seconds"
    if health.replicas_every < 0:
        yield f"health.replicas_every {health.replicas_every} must be 0 (never) or more steps"


def checkpoint_rules(checkpoint: CheckpointConfig) -> Iterator[str]:
    """Ranges; something must always stay."""
    if checkpoint.save_every < 0:
        yield f"checkpoint.save_every {checkpoint.save_every} must be 0 (only at the end) or more"
    if checkpoint.keep_last < 1:
        yield f"checkpoint.keep_last {checkpoint.keep_last} must be at least 1"
    if checkpoint.keep_every < 0:
        yield f"checkpoint.keep_every {checkpoint.keep_every} must be 0 (none stays for good) or more steps"
    if checkpoint.save_every > 0 and checkpoint.keep_every % checkpoint.save_every:
        yield (
            f"checkpoint.keep_every {checkpoint.keep_every} is no multiple of checkpoint.save_every "
            f"{checkpoint.save_every}, so most of those steps are never saved; make it one"
        )
    if not 0 <= checkpoint.staging_gib < math.inf:
        yield f"checkpoint.staging_gib {checkpoint.staging_gib:g} must be 0 (one share of the state) or more GiB"
