"""One pass over the stored samples of a source, in this process or in several; results come in the order of samples.

Processes are spawned, so nothing of this one (threads, open files) leaks into them; a source pickles as its path.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from data_pipeline.manifest import Source
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.read import SampleReader

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all) as work goes on."""

_RUN = 256


def over_samples(
    source: Source,
    numbers: np.ndarray,
    work: Callable[[SampleReader, list[int]], T],
    workers: int = 1,
    progress: Progress | None = None,
) -> Iterator[T]:
    """Yields `work(reader, numbers)` for run after run of sample numbers.

    Args:
        source: Whose samples are read.
        numbers: int [n], ascending, so that tars are read front to back.
        work: A function of a module (processes must find it) that does one run.
        workers: Processes; 1 works in this one.
        progress: Told after every run.
    """
    runs = [numbers[start : start + _RUN].tolist() for start in range(0, len(numbers), _RUN)]
    done = 0
    reader = SampleReader(source, ImageGeometry())
    pool: ProcessPoolExecutor | None = None
    results: Iterator[T] = map(partial(work, reader), runs)
    if workers > 1 and len(runs) > 1:
        pool = ProcessPoolExecutor(min(workers, len(runs)), mp_context=multiprocessing.get_context("spawn"))
        results = pool.map(partial(work, reader), runs)
    try:
        for run, result in zip(runs, results, strict=True):
            done += len(run)
            if progress is not None:
                progress(done, len(numbers))
            yield result
    finally:
        reader.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
