"""The most memory a stretch of work has allocated, from the allocator's own reports.

torch's profiler tells every allocation and every release of the CPU allocator with its size, those inside operators and
in C++ autograd included, which a dispatch mode would miss. Whatever was allocated before the profiler started (imports,
libraries) is not in the sum.
"""

import gc
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

SETTLING_S = 0.02
BETWEEN_SPANS_S = 0.2
"""The same for what the stretch before left behind, which would lie under all of the next one."""


class SettledCollectives(TorchDispatchMode):
    """While entered, a rank waits for every collective and rests.

    A gloo thread that lets go of a message later than its caller does so where the profiler does not look: the message
    would count as held until the end. Enter before the first collective.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            works = [item for item in result if isinstance(item, torch.ScriptObject)] if type(result) is tuple else []
            for work in works:  # a lone one is of a send or a receive, which its peer may not have entered yet
                dist.Work.unbox(work).wait()
            time.sleep(SETTLING_S)
        return result


_MARK = "peak_is_measured_here"


class AllocatedPeak:
    """Enter before the first tensor is made; `span()` around the work; `peak_bytes` after leaving."""

    def __enter__(self) -> "AllocatedPeak":
        gc.collect()
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def span(self) -> Any:
        """A stretch whose peak is asked for; of several, the lowest peak counts."""
        gc.collect()
        time.sleep(BETWEEN_SPANS_S)
        return record_function(_MARK)

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        reports = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == _MARK]
        self.peak_bytes = min(_peak_of(reports, *span) for span in spans)


def _peak_of(reports: list[tuple[int, int]], start: int, stop: int) -> int:
    held = peak = sum(size for when, size in reports if when < start)
    for when, size in reports:
        if start <= when <= stop:
            held += size
            peak = max(peak, held)
    return peak
