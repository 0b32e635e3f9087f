"""What ranks find out and decide together about files: over the host's group, since a disk may be slow.

Rank 0 alone lists directories, and what it finds counts for all: shared file systems show new names to hosts at
different times, and two ranks that go on from different checkpoints train nonsense.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import Superseded
from janus_mega.checkpoint.finding import Seekers
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.messages import share_bytes


def seekers_of(groups: ProcessGroups) -> Seekers:
    """All ranks, looking for a checkpoint together."""

    def agree(ok: bool) -> bool:
        flag = torch.tensor(int(ok))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=groups.host)
        return bool(flag)

    layout = groups.layout
    return Seekers(layout.rank, layout.world_size, agree, lambda content: share_bytes(content, groups))


def on_rank_0(groups: ProcessGroups, fn: Callable[[], str | None]) -> str:
    """Calls `fn` on rank 0; every rank returns what it gave, and fails where it failed.

    Raises:
        UserError: as rank 0.
        Superseded: as rank 0.
        RuntimeError: rank 0 met something else, which it raises itself. Collective over: world.
    """
    answer, failure = "", None
    if groups.layout.rank == 0:
        try:
            answer = "+" + (fn() or "")
        except Exception as error:  # told after the others have heard of it
            failure = error
            kinds = ((UserError, "u"), (Superseded, "s"))
            answer = next((kind for known, kind in kinds if isinstance(error, known)), "-") + str(error)
    answer = share_bytes(answer.encode(), groups).decode()
    if failure is not None:
        raise failure
    kind, text = answer[0], answer[1:]
    if kind != "+":
        raise {"u": UserError, "s": Superseded}.get(kind, RuntimeError)(text)
    return text
