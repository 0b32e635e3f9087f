"""How a run ends, as a number that the script around it can act on: the same alone, in forked ranks, under a launcher.

    0   done
    1   a defect, or the last save failed
    2   bad input, told in one line
    75  stopped by a signal; everything is saved, start it again
    76  superseded: a newer attempt of this run has taken its checkpoints over
    77  stopped by a signal without having saved; the newest checkpoint stands
    78  ranks that must hold the same values do not
    86  hung (`train.watch`)

One number is told for several ranks, see `most_telling`. Codes above 128 are deaths by a signal, as shells say it.
"""

from collections.abc import Iterable

from data_pipeline.errors import UserError

DONE, DEFECT, BAD_INPUT = 0, 1, 2
STOPPED, SUPERSEDED, NOT_SAVED, REPLICAS_DIFFER, HANG = 75, 76, 77, 78, 86
_SIGNALLED = 128
_BY_TELLING = (REPLICAS_DIFFER, SUPERSEDED, BAD_INPUT, HANG, NOT_SAVED)
"""What one rank knows and the others only suffer from comes first."""


class RunEnded(Exception):
    """A run ends before its last step for a reason that has an exit code; the message is one line."""

    exit_code = DEFECT


class Stopped(RunEnded):
    """By a signal, with everything saved."""

    exit_code = STOPPED


class NotSaved(RunEnded):
    """By a signal, before anything could be saved."""

    exit_code = NOT_SAVED


class ReplicasDiffer(RunEnded):
    """Ranks that must hold the same values do not."""

    exit_code = REPLICAS_DIFFER


def exit_code_of(error: BaseException) -> int | None:
    """The code an error ends a process with; None for a defect, which keeps its traceback."""
    if isinstance(error, RunEnded):
        return error.exit_code
    if isinstance(error, UserError):
        return BAD_INPUT
    if isinstance(error, RuntimeError):
        from janus_mega.checkpoint.claim import Superseded  # torch stands behind it; bad input is told without

        return SUPERSEDED if isinstance(error, Superseded) else None
    return None


def most_telling(codes: Iterable[int]) -> int:
    """One code for a job of several ranks.

    Args:
        codes: of its processes; -9 and 137 are both a death by signal 9.

    Returns:
        What explains the end best: what only one rank can know, then a death by a signal, then a defect (most often
        the loss of such a peer). STOPPED only if no rank says anything worse.
    """
    shell = {_SIGNALLED - code if code < 0 else code for code in codes}
    for code in _BY_TELLING:
        if code in shell:
            return code
    deaths = sorted(code for code in shell if code > _SIGNALLED)
    others = sorted(shell - {*deaths, DONE, STOPPED})
    return next(iter((*deaths, *others)), STOPPED if STOPPED in shell else DONE)
