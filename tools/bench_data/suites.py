"""The run: who takes part, what is asked of whom and in which order, and what comes back.

Repeats of different systems take turns, so a disturbance of the machine meets all of them. A peer that fails drops out
and is named in the record; a failure of ours ends the run.
"""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench_data.client import Worker, WorkerFailed
from tools.bench_data.environments import PEERS, interpreter
from tools.bench_data.raw import Sizes, bytes_per_pixel, make_raw
from tools.bench_data.systems.interface import BATCH

OURS = "janus_mega"
PHOTO_SETS = ("photos512", "photos1024")
_TITLES = {
    "webdataset": "webdataset",
    "energon": "Megatron-Energon",
    "litdata": "litdata",
    "mosaic": "mosaic-streaming",
}
SEQUENCE = "our tars in sequence, webdataset"
ROWS = f"{OURS}, packed rows"


@dataclass(frozen=True, slots=True)
class Contender:
    """One line of a table: a system in one of its variants."""

    title: str
    system: str
    variant: str = ""
    data: str = ""
    """Whose files it reads; empty for its own."""


@dataclass(slots=True)
class Bench:
    """A run in progress."""

    scratch: Path
    """Data, states and logs of this run."""
    environments: Path
    """Below it lie the environments of the peers."""
    sizes: Sizes
    core: int
    workers: dict[str, Worker] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=lambda: {"failures": [], "load": {}})

    def start(self, names: list[str]) -> None:
        """Starts the processes of the systems, ours first."""
        for name in (OURS, *names):
            self.workers[name] = self._worker(name)

    def _worker(self, name: str) -> Worker:
        environment = PEERS[name].environment if name in PEERS else ""
        system = PEERS[name].system if name in PEERS else "ours"
        return Worker(system, interpreter(environment, self.environments), self.core, self.scratch / f"{name}.log")

    def stop(self) -> None:
        """Ends the processes."""
        for worker in self.workers.values():
            worker.close()

    def say(self, what: str) -> None:
        """Tells what begins, and notes the load of the machine."""
        self.results["load"][what] = os.getloadavg()[0]
        print(f"{what} (load {os.getloadavg()[0]:.2f})", file=sys.stderr, flush=True)

    def ask(self, name: str, operation: str, **arguments: Any) -> Any:
        """Asks a system; None if it is a peer that fails.

        Raises:
            WorkerFailed: Ours failed.
        """
        if name not in self.workers:
            return None
        try:
            return self.workers[name].ask(operation, **arguments)
        except WorkerFailed as error:
            if name == OURS:
                raise
            self.results["failures"].append(f"{_TITLES[name]}: {error}")
            print(f"left out: {error}", file=sys.stderr, flush=True)
            self.workers.pop(name).close()
            return None

    def root(self, name: str, what: str) -> str:
        """Where a system's converted data lies."""
        return str(self.scratch / "data" / f"{name}-{what}")

    def take_turns(self, contenders: list[Contender], measure: Callable[[Contender], Any]) -> dict[str, list[Any]]:
        """One warm-up and the repeats of each contender, in turns; who failed or does not offer it is absent."""
        answers: dict[str, list[Any]] = {contender.title: [] for contender in contenders}
        for repeat in range(self.sizes.repeats + 1):
            first = repeat % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                answer = measure(contender)
                if repeat and answer is not None and "not_offered" not in answer:
                    answers[contender.title].append(answer)
        return {title: given for title, given in answers.items() if len(given) == self.sizes.repeats}


def run(bench: Bench, names: list[str]) -> None:
    """Everything, in order; fills `bench.results`."""
    bench.say("raw data")
    raw = bench.scratch / "data" / "raw"
    make_raw(raw, bench.sizes)
    bench.results["photo_bytes_per_pixel"] = {name: bytes_per_pixel(raw / name) for name in PHOTO_SETS}
    bench.say("environments")
    bench.start(names)
    bench.results["versions"] = {name: bench.ask(name, "versions") for name in list(bench.workers)}
    _convert(bench)
    _check(bench)
    _tokens(bench)
    for photos in PHOTO_SETS:
        _photos(bench, photos)
    _access(bench)
    _first(bench)
    _resume(bench)
    bench.say("physical limits")
    photo_places = [str(raw / photos) for photos in PHOTO_SETS]
    bench.results["limits"] = bench.ask(
        OURS, "extra", method="limits", root=bench.root(OURS, "tokens"), photos=photo_places
    )
    bench.say("offline encoding")
    bench.results["encoding"] = [
        bench.ask(
            OURS,
            "extra",
            method="encoding",
            photos=photo_places[0],
            scratch=str(bench.scratch / "data"),
            count=bench.sizes.encoded,
        )
        for _ in range(min(bench.sizes.repeats, 3))
    ]


def _convert(bench: Bench) -> None:
    """T3: the same raw data into every format."""
    for what in ("tokens", *PHOTO_SETS):
        bench.say(f"conversion, {what}")
        raw = bench.scratch / "data" / "raw"
        source = str(raw if what == "tokens" else raw / what)
        answers = {
            name: bench.ask(name, "convert", what=what, raw=source, root=bench.root(name, what))
            for name in list(bench.workers)
        }
        bench.results[f"conversion {what}"] = _titled(answers)
    bench.results["drawing_bytes"] = bench.ask(OURS, "extra", method="drawing_bytes", root=bench.root(OURS, "tokens"))


def _check(bench: Bench) -> None:
    """All systems must hold the same ids and decode the same pictures, or nothing is comparable."""
    bench.say("check that all read the same")
    expected = bench.ask(OURS, "sums", root=bench.root(OURS, "tokens"))
    bench.results["sums"] = expected
    pixel = bench.ask(OURS, "mean_pixel", root=bench.root(OURS, PHOTO_SETS[0]), variant="ours")
    for name in list(bench.workers):
        sums = bench.ask(name, "sums", root=bench.root(name, "tokens"))
        if sums is not None and sums != expected:
            raise SystemExit(f"{name}: holds samples, ids, sum of ids {sums}, ours {expected}: not comparable")
        for variant in ("pillow", "ours"):
            mean = bench.ask(name, "mean_pixel", root=bench.root(name, PHOTO_SETS[0]), variant=variant)
            if mean is not None and abs(mean - pixel) > 0.5:
                raise SystemExit(f"{name}: mean pixel {mean:.2f}, ours {pixel:.2f}: not comparable")


def _titled(answers: dict[str, Any]) -> dict[str, Any]:
    return {_TITLES.get(name, name): answer for name, answer in answers.items() if answer is not None}


def _tokens(bench: Bench) -> None:
    """T1: a pass over the token samples."""
    bench.say("tokens")
    contenders = [
        Contender(ROWS, OURS),
        Contender(f"{OURS}, of it compiling the plan", OURS, "plan"),
        Contender(f"{OURS}, loader and torch batches", OURS, "loader"),
    ]
    if "webdataset" in bench.workers:
        contenders += [
            Contender(SEQUENCE, "webdataset", "sequence", OURS),
            Contender(f"{SEQUENCE}, laid into rows", "webdataset", "laid", OURS),
            Contender("webdataset, one sample a key", "webdataset"),
        ]
    if "energon" in bench.workers:
        contenders += [
            Contender("Megatron-Energon, default", "energon"),
            Contender("Megatron-Energon, gc off", "energon", "tuned"),
        ]
    contenders += [Contender(_TITLES[name], name) for name in ("litdata", "mosaic") if name in bench.workers]

    def measure(contender: Contender) -> Any:
        root = bench.root(contender.data or contender.system, "tokens")
        return bench.ask(contender.system, "tokens", root=root, variant=contender.variant)

    answers = bench.take_turns(contenders, measure)
    ours = bench.ask(OURS, "extra", method="count", root=bench.root(OURS, "tokens"))
    bench.results["padding"] = ours.pop("padding")
    for title, given in answers.items():
        if title.startswith(f"{OURS},"):
            answers[title] = [{**answer, **ours} for answer in given]
    bench.results["tokens"] = answers


def _photos(bench: Bench, photos: str) -> None:
    """T2: photos to 384 px, each system's documented way and everybody with our decoding."""
    bench.say(f"images, {photos}")
    contenders = [Contender(OURS, OURS, "ours")]
    for name in bench.workers:
        if name == OURS:
            continue
        contenders.append(Contender(f"{_TITLES[name]}, Pillow", name, "pillow"))
        if name == "webdataset":
            contenders.append(Contender("webdataset, rgb8 + Pillow", name, "rgb8"))
        contenders.append(Contender(f"{_TITLES[name]}, our decoding", name, "ours"))
    bench.results[photos] = bench.take_turns(
        contenders,
        lambda contender: bench.ask(
            contender.system, "photos", root=bench.root(contender.system, photos), variant=contender.variant
        ),
    )


def _access(bench: Bench) -> None:
    """T3: token samples by number."""
    bench.say("random access")
    total = bench.sizes.drawings + bench.sizes.texts
    numbers = random.Random(0).choices(range(total), k=bench.sizes.accesses)
    contenders = [Contender(_TITLES.get(name, name), name) for name in bench.workers]
    bench.results["access"] = bench.take_turns(
        contenders,
        lambda contender: bench.ask(
            contender.system, "access", root=bench.root(contender.system, "tokens"), numbers=numbers
        ),
    )


def _first(bench: Bench) -> None:
    """T6: from nothing to the first batch."""
    bench.say("first batch")
    contenders = [Contender(_TITLES.get(name, name), name) for name in bench.workers]
    bench.results["first"] = bench.take_turns(
        contenders,
        lambda contender: bench.ask(contender.system, "first", root=bench.root(contender.system, "tokens")),
    )


def _resume(bench: Bench) -> None:
    """T5: a position saved in one process and restored in another."""
    bench.say("resume")
    in_epoch = (bench.sizes.drawings + bench.sizes.texts) // BATCH
    num_batches = min(in_epoch // 2, in_epoch - 4)  # three more must follow
    found: dict[str, Any] = {}
    for name in list(bench.workers):
        state = str(bench.scratch / f"{name}.state")
        root = bench.root(name, "tokens")
        saved = bench.ask(name, "save", root=root, state=state, num_batches=num_batches)
        if saved is None:
            continue
        if "not_offered" in saved:
            found[name] = saved
            continue
        bench.workers.pop(name).close()
        bench.workers[name] = bench._worker(name)
        restored = bench.ask(name, "restore", root=root, state=state)
        if restored is not None:
            exact = restored.pop("hashes") == saved["hashes"]
            found[name] = {**restored, "bytes": saved["bytes"], "exact": exact, "batches": num_batches}
    bench.results["resume"] = _titled(found)
