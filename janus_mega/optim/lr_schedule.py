"""Learning rate as a pure function of the step."""

import math

from janus_mega.config.schema import OptimizerConfig, Schedule


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """The rate used by the update number `step` (0-based) of a stage of `num_steps`.

    Warm-up is linear and reaches lr at its last step; after it the rate is constant, or follows
    lr * (r + (1 - r) * (1 + cos(pi * t)) / 2) with r = min_lr_ratio and t the share of the remaining steps done.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == Schedule.constant:
        return optimizer.lr
    done = (step - optimizer.warmup_steps) / max(1, num_steps - optimizer.warmup_steps)
    factor = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * factor)
