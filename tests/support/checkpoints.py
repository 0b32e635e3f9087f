"""Small checkpoints of made-up tensors, cut over any number of ranks that are threads."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from janus_mega.checkpoint.claim import Claim
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.manager import Ranks, save_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.parallel.slices import Slice

TENSORS = {
    "decoder.layers.0.mlp.linear_fc2.weight": torch.arange(24.0).reshape(6, 4),
    "decoder.final_layernorm.weight": torch.linspace(0, 1, 4),
    "optimizer.exp_avg/decoder.final_layernorm.weight": torch.linspace(1, 2, 4).double(),
    "optimizer.step": torch.tensor(7),
}
EXTRA_FILE = "text_tokenizer/tokenizer.model"


def state(step: int, **changes: object) -> TrainState:
    """Where a run might stand."""
    fields = {"step": step, "consumed_rows": 8 * step, "plan_digest": "ab12", "config_text": "name: x\n"}
    return TrainState(**{**fields, **changes})  # type: ignore[arg-type]


def rows_of(rank: int, world_size: int) -> list[Slice]:
    """The tensors cut by rows over ranks; what has no row to give stays on rank 0."""
    pieces = []
    for name, tensor in TENSORS.items():
        if tensor.ndim == 0:
            pieces += [Slice(name, (), (), tensor)] if rank == 0 else []
            continue
        size = -(-tensor.shape[0] // world_size)
        part = tensor[rank * size : (rank + 1) * size]
        if len(part):
            offset = (rank * size,) + (0,) * (tensor.ndim - 1)
            pieces.append(Slice(name, tuple(tensor.shape), offset, part))
    return pieces


def agreement(world_size: int) -> Callable[[bool], bool]:
    """What the gloo reduction of a real run answers, among threads."""
    barrier, answers = threading.Barrier(world_size), list[bool]()

    def agree(ok: bool) -> bool:
        answers.append(ok)
        barrier.wait(timeout=20)
        all_ok = all(answers)
        if barrier.wait(timeout=20) == 0:
            answers.clear()
        barrier.wait(timeout=20)
        return all_ok

    return agree


def save_on_threads(
    place: Path | Claim,
    world_size: int,
    slices: Callable[[int], list[Slice]],
    step: int = 3,
    disk_of: Callable[[int], Disk] = lambda rank: DISK,
) -> list[object]:
    """What save_checkpoint returned or raised on each of `world_size` ranks."""
    agree = agreement(world_size)
    results: list[object] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = save_checkpoint(
                place,
                slices(rank),
                state(step, rng={"torch": torch.full((4,), rank, dtype=torch.uint8)}),
                ranks=Ranks(rank, world_size, agree),
                extra_files={EXTRA_FILE: b"pieces"},
                disk=disk_of(rank),
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
