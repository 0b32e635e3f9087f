"""What the workers of a loader do about signals that ask a job to stop: nothing, the process they read for decides.

Such signals reach every process of a job (SLURM at the end of its time, a terminal at Ctrl-C). A worker that died of it
would end training with an error before anything is saved. So they are ignored, but for the second SIGTERM: torch ends a
worker that does not come to its end with one, and so does Python when the parent ends.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def signals_held() -> Iterator[None]:
    """Around the start of workers: none of them meets a signal before it has said what to do about it.

    This process takes its signals in another thread, or afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker_id: int) -> None:
    """To be called in each worker as its `worker_init_fn`."""
    terms = 0

    def on_term(number: int, frame: object) -> None:
        nonlocal terms
        terms += 1
        if terms > 1:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_term)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
