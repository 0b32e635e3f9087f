"""Keeps a moving average of the weights beside training."""

from janus_mega.engine.ema import MovingAverage
from janus_mega.train.loop import StepEvent


class AverageHook:
    """Takes the weights into the average after every update that was made."""

    def __init__(self, average: MovingAverage) -> None:
        self._average = average

    def after_step(self, event: StepEvent) -> None:
        """Updates the average, unless the step's update was left out."""
        if not event.result.skipped:
            self._average.update()

    def at_end(self, step: int) -> None:
        """Nothing is left to do."""
