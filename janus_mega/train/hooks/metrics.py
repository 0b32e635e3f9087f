"""Averaged metrics every few steps, and the progress bar.

Seconds are per step, by the host's clock but for `forward_backward` on a GPU, which is timed in the device's stream.
`data` waits for batches and places them; `forward_backward` counts labels, runs the schedule and sums the losses over
all ranks; `reduce` lasts until the host knows the global gradient norm, its one wait for the device in a step (ZeRO-2
and 3 have reduced within backward, ZeRO-1 and megatron reduce here); `update` is the rest of the optimizer's step;
`step` is the whole step. What hooks took since the last line is under `hook_seconds`.
Steps whose update was not made count for amounts and seconds, not for losses and norm.
"""

from collections import defaultdict

from janus_mega.engine.interface import StepResult
from janus_mega.observe.metrics import MetricAccumulator
from janus_mega.observe.progress import Progress
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.hooks.rates import device_peak, reduce_amounts, token_rates, utilisation
from janus_mega.train.loop import StepEvent
from janus_mega.train.totals import Totals
from janus_mega.train.workload import Recipe, Workload


class MetricsHook:
    """Writes averaged metrics every few steps and moves the progress bar.

    Losses and the norm come reduced from the engine; amounts (tokens, images) are summed over dp and peaks taken over
    all ranks when a line is due, and read in one copy. Totals are over the whole stage, restarts included.
    """

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        groups: ProcessGroups,
        sinks: SinkGroup,
        progress: Progress,
        hook_seconds: dict[str, float],
        totals: Totals | None = None,
    ) -> None:
        """`hook_seconds` is filled by other hooks and emptied here; `totals` go on from what they hold."""
        self._workload = workload
        self._recipe = recipe
        self._groups = groups
        self._sinks = sinks
        self._progress = progress
        self._hook_seconds = hook_seconds
        self._totals = totals or Totals()
        self._peak = recipe.logging.peak_flops or device_peak(groups.device)
        self._reset()

    def _reset(self) -> None:
        self._steps = self._updates = 0
        self._means = MetricAccumulator()
        self._seconds: dict[str, float] = defaultdict(float)
        self._label_counts: dict[str, int] = defaultdict(int)
        self._before = self._totals.settled()
        self._hook_seconds.clear()

    def after_step(self, event: StepEvent) -> None:
        """Adds a step; writes a line when due. Collective over: world (when due)."""
        result = event.result
        self._steps += 1
        for name, count in result.label_counts.items():
            self._label_counts[name] += count
        if not result.skipped:
            self._add_losses(result)
        for phase, seconds in {"data": event.data_s, "step": event.step_s, **result.seconds}.items():
            self._seconds[phase] += seconds
        for batch in event.batches:
            self._totals.add(self._workload.measure(batch))
        self._totals.add_step(result.label_counts, event.step_s)
        self._progress.advance(note=f"loss {result.loss:.3f}")
        if event.step % self._recipe.logging.log_every == 0:
            self._write(event.step, result.lr)

    def _add_losses(self, result: StepResult) -> None:
        self._updates += 1
        self._means.mean("loss", result.loss)
        self._means.mean("grad_norm", result.grad_norm)
        for name, loss in result.task_losses.items():
            self._means.mean(f"loss/{name}", loss, result.label_counts[name])

    def at_end(self, step: int) -> None:
        """Writes what is left. Collective over: world."""
        if self._steps:
            self._write(step, None)

    def _write(self, step: int, lr: float | None) -> None:
        sums, peaks = reduce_amounts(self._totals.pending, self._groups)
        self._totals.settle(sums)
        totals = self._totals.settled()
        amounts = {name: int(totals[name] - self._before.get(name, 0)) for name in self._totals.amounts}
        values = self._means.read()
        values |= {f"seconds/{phase}": seconds / self._steps for phase, seconds in self._seconds.items()}
        values |= {f"amount/{name}": amount / self._steps for name, amount in amounts.items()}
        flops = self._workload.flops(amounts, self._label_counts)
        seconds, devices = self._seconds["step"], self._groups.layout.world_size
        values |= peaks | token_rates(amounts, seconds, devices) | utilisation(flops, seconds, devices, self._peak)
        values |= {f"hook_seconds/{name}": seconds for name, seconds in self._hook_seconds.items()}
        values |= {f"total/{name}": total for name, total in totals.items()}
        if self._updates < self._steps:
            values["skipped_steps"] = self._steps - self._updates
        if lr is not None:
            values["lr"] = lr
            values |= {f"lr/{name}": lr * scale for name, scale in self._recipe.optimizer.lr_scales.items()}
        if self._groups.layout.rank == 0:
            tokens = self._workload.order.source_tokens(step - self._steps, step)
            values |= {f"source_tokens/{name}": count for name, count in tokens.items()}
        self._sinks.scalars(step, values)
        self._reset()
