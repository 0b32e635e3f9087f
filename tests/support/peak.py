"""The most memory a stretch of work has allocated, from the allocator's own reports.

torch's profiler tells every allocation and every release of the CPU allocator with its size, those inside operators and
in C++ autograd included, which a dispatch mode would miss. Whatever was allocated before the profiler started (imports,
libraries) is not in the sum.
"""

import gc
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "peak_is_measured_here"


class AllocatedPeak:
    """Enter before the first tensor is made; `span()` around the work; `peak_bytes` after leaving."""

    def __enter__(self) -> "AllocatedPeak":
        gc.collect()
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def span(self) -> Any:
        """The stretch whose peak is asked for; once."""
        gc.collect()
        return record_function(_MARK)

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        (span,) = [event for event in events if event.name() == _MARK]
        start, stop = span.start_ns(), span.start_ns() + span.duration_ns()
        reports = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        held = self.peak_bytes = sum(size for when, size in reports if when < start)
        for when, size in reports:
            if start <= when <= stop:
                held += size
                self.peak_bytes = max(self.peak_bytes, held)
