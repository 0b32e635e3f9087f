"""The record of the broken samples that a run has met: one JSON line each in <run_dir>/quarantine.jsonl.

The loader says which holes a step has; whoever trains gathers them from all ranks and hands them to the one that
writes. A sample is recorded once, however often it comes back (next epoch, the same steps after a restart), so the
count is the number of samples that are missing from the data, which is what the budget is for.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.schema import Hole

QUARANTINE_FILE = "quarantine.jsonl"
"""In the run directory."""


class Quarantine:
    """Broken samples of one run, kept in a file."""

    def __init__(self, run_dir: Path, budget: int) -> None:
        """Takes over what is recorded there already, so a resumed run goes on counting.

        Args:
            run_dir: Directory of the run.
            budget: data.max_broken_samples.

        Raises:
            UserError: The file holds something else.
        """
        self.path = run_dir / QUARANTINE_FILE
        self.budget = budget
        self.holes, self._whole_bytes = _read(self.path)
        self._unwritten = b""
        self._known = {(hole.source, hole.uid) for hole in self.holes}

    def add(self, holes: Iterable[Hole]) -> list[Hole]:
        """Records those that are new, durably, and returns them.

        Raises:
            OSError: They could not be written. They count all the same, and the next call writes them too.
        """
        new = []
        for hole in holes:
            if (hole.source, hole.uid) not in self._known:
                self._known.add((hole.source, hole.uid))
                new.append(hole)
        self.holes += new
        self._unwritten += b"".join(json.dumps(asdict(hole), ensure_ascii=False).encode() + b"\n" for hole in new)
        if self._unwritten:
            with self.path.open("r+b" if self.path.exists() else "wb") as stream:
                # Over a line that a kill cut off, if there is one: its hole is found again.
                stream.seek(self._whole_bytes)
                stream.truncate()
                stream.write(self._unwritten)
                stream.flush()
                os.fsync(stream.fileno())
            self._whole_bytes += len(self._unwritten)
            self._unwritten = b""
        return new

    def exceeded(self) -> str | None:
        """One line for the user once more samples are broken than the budget allows, else None."""
        if len(self.holes) <= self.budget:
            return None
        last = self.holes[-1]
        return (
            f"{self.path}: {len(self.holes)} broken samples, data.max_broken_samples={self.budget} allows fewer (the "
            f"last: {last.reason}, sample {last.uid} of source {last.source!r}); find what is damaged with "
            "`janus-mega data verify`, copy those shards again, or raise the budget"
        )


def read_quarantine(run_dir: Path) -> list[Hole]:
    """The broken samples recorded for a run, in the order in which they were found.

    Raises:
        UserError: As `Quarantine`.
    """
    return _read(run_dir / QUARANTINE_FILE)[0]


def _read(path: Path) -> tuple[list[Hole], int]:
    """The recorded holes and the bytes they take; a last line that was cut off is left out, no file is an empty one."""
    try:
        *lines, _cut_off = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    holes = []
    for number, line in enumerate(lines, start=1):
        try:
            holes.append(Hole(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: no record of a broken sample ({error}); restore the file or remove it to count anew"
            ) from error
    return holes, sum(len(line) + 1 for line in lines)
