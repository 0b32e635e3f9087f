"""The measured process: pins itself to one core, imports one system, and answers requests on its standard streams.

It lives through all repeats, so imports are paid once and repeats of different systems can take turns. Whatever a
library prints goes to the log, not between the answers.
"""

import importlib
import json
import os
import shutil
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.bench_data.clock import Stopwatch
from tools.bench_data.systems.interface import NotOffered, System


class Operations:
    """What can be asked; every method takes JSON values and returns them."""

    def __init__(self, system: System) -> None:
        self._system = system

    def versions(self) -> dict[str, str]:
        """Versions of the packages that matter here."""
        return {name: version(name) for name in (*self._system.packages, "numpy", "pillow", "torch")}

    def convert(self, what: str, raw: str, root: str) -> dict[str, Any]:
        """Writes the system's format; times, bytes on disk and bytes of indexes."""
        place = Path(root)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        convert = self._system.convert_tokens if what == "tokens" else self._system.convert_photos
        watch = Stopwatch()
        convert(Path(raw), place)
        times = watch.read()
        files = [path for path in place.rglob("*") if path.is_file()]
        return {**times, "bytes": sum(path.stat().st_size for path in files), "index": self._system.index_bytes(place)}

    def tokens(self, root: str, variant: str) -> dict[str, Any]:
        """Times of a pass over the token samples; opening is not counted."""
        opened = self._system.open_tokens(Path(root), variant)
        watch = Stopwatch()
        counts = self._system.pass_over(opened)
        return {**watch.read(), **counts}

    def sums(self, root: str) -> list[int]:
        """Samples, ids and the sum of all ids."""
        return self._system.sums(Path(root))

    def photos(self, root: str, variant: str) -> dict[str, Any]:
        """Times of a pass over the photos; opening is not counted."""
        photos = self._system.photos(Path(root), variant)
        watch = Stopwatch()
        samples = sum(1 for photo in photos if photo.size == 3 * 384 * 384)
        return {**watch.read(), "samples": samples}

    def mean_pixel(self, root: str, variant: str) -> float:
        """Mean over all photos: systems that resize in the same way agree, whatever the order."""
        means = [float(photo.mean()) for photo in self._system.photos(Path(root), variant)]
        return sum(means) / len(means)

    def access(self, root: str, numbers: list[int]) -> dict[str, Any]:
        """Times of reading token samples by number, opening not counted."""
        read = self._system.open_reader(Path(root))
        read(numbers[0])
        ids = 0
        watch = Stopwatch()
        for number in numbers:
            image_ids, text_ids = read(number)
            ids += len(image_ids) + len(text_ids)
        return {**watch.read(), "samples": len(numbers), "ids": ids}

    def first(self, root: str) -> dict[str, Any]:
        """Times from nothing open to the first batch."""
        watch = Stopwatch()
        samples = self._system.first_batch(Path(root))
        return {**watch.read(), "samples": samples}

    def save(self, root: str, state: str, num_batches: int) -> dict[str, Any]:
        """Saves a position; its bytes and the hashes of the batches that follow."""
        hashes = self._system.save(Path(root), Path(state), num_batches)
        return {"bytes": Path(state).stat().st_size, "hashes": hashes}

    def restore(self, root: str, state: str) -> dict[str, Any]:
        """Restores a position; times to the next batch and the hashes of what follows."""
        watch = Stopwatch()
        batches = self._system.restore(Path(root), Path(state))
        hashes = [next(batches)]
        times = watch.read()
        return {**times, "hashes": [*hashes, next(batches), next(batches)]}

    def extra(self, method: str, **arguments: Any) -> Any:
        """An operation that only this system has."""
        return getattr(self._system, method)(**arguments)


def _answer(operations: Operations, line: bytes) -> dict[str, Any]:
    request = json.loads(line)
    try:
        return {"value": getattr(operations, request.pop("operation"))(**request)}
    except NotOffered as error:
        return {"value": {"not_offered": str(error)}}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    """Answers until the requests end."""
    name, core = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if core >= 0 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    operations = Operations(importlib.import_module(f"tools.bench_data.systems.{name}").SYSTEM)
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_answer(operations, line)) + "\n")
        answers.flush()
    # Leave at once: a peer's threads may wait for ever in their exit handlers.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
