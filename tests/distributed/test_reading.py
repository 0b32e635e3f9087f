"""What ranks read when a run goes on: their shares, once; and that files made for a layout are read by its ranks so."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from janus_mega.checkpoint.reader import RNG_PREFIX, CheckpointReader
from janus_mega.checkpoint.reshard import Target, reshard
from janus_mega.checkpoint.tensor_file import TensorFile
from janus_mega.config.schema import Backend, ParallelConfig
from janus_mega.parallel.slices import Slice
from tests.distributed.resume_runs import STEPS, Case, difference_of, resumed, saved, told, undisturbed
from tests.support.tiny import STAGE1, fp32

pytestmark = pytest.mark.dist

STOP = 2
EMA = 0.7
NEEDED = "needed"
"""Beside the files of a rank's readings: bytes of what it fills."""


def counting(folder: Path) -> Callable[[], None]:
    """Every rank writes down how much it reads from which files, and how much it needs."""

    def patch() -> None:
        read, path = TensorFile.read, folder / os.environ["RANK"]

        def counted(file: TensorFile, key: str, digest: bytes | None) -> Tensor:
            tensor = read(file, key, digest)
            if not key.startswith(RNG_PREFIX):
                with path.open("a") as log:
                    log.write(f"{file.path.name} {tensor.nbytes}\n")
            return tensor

        fill = CheckpointReader.fill

        def noted(reader: CheckpointReader, targets: Iterable[Slice]) -> None:
            views = list(targets)
            needed = sum(view.tensor.numel() * 4 for view in views)
            with path.open("a") as log:
                log.write(f"{NEEDED} {needed}\n")
            fill(reader, views)

        TensorFile.read, CheckpointReader.fill = counted, noted

    return patch


def readings(folder: Path) -> list[dict[str, int]]:
    """Bytes by file, rank after rank."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
        amounts: dict[str, int] = {}
        for file, size in map(str.split, path.read_text().splitlines()):
            amounts[file] = amounts.get(file, 0) + int(size)
        found.append(amounts)
    return found


def stored_bytes(reader: CheckpointReader) -> int:
    sizes = (torch.empty(reader.shape(name), device="meta") for name in reader.names if not name.startswith(RNG_PREFIX))
    return sum(size.nbytes for size in sizes)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, fp32(zero_stage=2), ema=EMA),
        Case(2, ParallelConfig(zero_stage=3), ema=EMA),
        Case(2, ParallelConfig(backend=Backend.megatron), ema=EMA),
    ],
    ids=["zero2", "zero3_bf16", "megatron_bf16"],
)
def test_all_ranks_together_read_what_is_stored_once(case: Case, tmp_path: Path) -> None:
    source = undisturbed(tmp_path / "whole", case, STOP)
    (tmp_path / "reads").mkdir()
    resumed(tmp_path / "rest", source, STOP, Case(2, case.parallel, ema=EMA, patch=counting(tmp_path / "reads")))
    found = readings(tmp_path / "reads")
    for rank, amounts in enumerate(found):
        needed = amounts.pop(NEEDED)
        assert amounts == {f"tensors-{rank:05d}.safetensors": needed}
    assert sum(sum(amounts.values()) for amounts in found) == stored_bytes(saved(source, STOP))


def test_frozen_parameters_are_read_by_one_dp_rank(tmp_path: Path) -> None:
    """The others receive them: so what is stored is read once, though every dp rank holds it."""
    source = undisturbed(tmp_path / "whole", Case(2, fp32(), trainable=STAGE1), STOP)
    (tmp_path / "reads").mkdir()
    resumed(tmp_path / "rest", source, STOP, Case(2, fp32(), trainable=STAGE1, patch=counting(tmp_path / "reads")))
    found = sum(size for amounts in readings(tmp_path / "reads") for name, size in amounts.items() if name != NEEDED)
    assert found == stored_bytes(saved(source, STOP))


@pytest.mark.parametrize(
    ("parallel", "target"),
    [
        (fp32(2, 2), Target(4, 2, (2, 2), 2)),
        (fp32(2, zero_stage=3), Target(4, 2, (4,), 1, cuts_parameters=True)),
        (fp32(1, 2, virtual_pp_size=2), Target(4, 1, (1, 1, 1, 1), 2)),
    ],
    ids=["tp2_pp2", "tp2_dp2_zero3", "dp2_pp2_interleaved"],
)
def test_a_layout_starts_from_files_that_were_made_for_it(
    parallel: ParallelConfig, target: Target, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The same run as from the files of one rank, and reading close to a rank's share."""
    source = undisturbed(tmp_path / "whole", Case(1, fp32(), ema=EMA), STOP)
    reshard(saved(source, STOP), tmp_path / "again" / "checkpoints", target)
    runs, amounts = {}, {}
    for name, folder in (("plain", source), ("again", tmp_path / "again")):
        (tmp_path / name / "reads").mkdir(parents=True)
        case = Case(4, parallel, ema=EMA, patch=counting(tmp_path / name / "reads"))
        runs[name] = resumed(tmp_path / name / "run", folder, STOP, case)
        amounts[name] = readings(tmp_path / name / "reads")
    assert told(runs["plain"]) == told(runs["again"]) and len(told(runs["again"])) == STEPS - STOP
    assert difference_of(runs["plain"], runs["again"]).are_equal
    needed = [read.pop(NEEDED) for read in amounts["again"]]
    for rank, read in enumerate(amounts["again"]):
        record_property(f"read_over_needed_{rank}", sum(read.values()) / needed[rank])
        assert sum(read.values()) <= 1.1 * needed[rank]
        # What tp ranks hold in copy lies with the first of them, runs of parameters with their dp neighbours.
        assert f"tensors-{rank:05d}.safetensors" in read and len(read) <= 2
    if parallel.tp_size > 1:  # pieces of one process's files are whole tensors
        plain = [sum(read.values()) / read.pop(NEEDED) for read in amounts["plain"]]
        assert max(plain) > 1.4
