"""The one exception of the data side (and of the framework) that is meant for the user's eyes.

A `UserError` is raised for bad input, never for a bug: its message is ONE line that names the file, the value, the rule
that it breaks and the remedy. The command line prints that line alone and exits with code 2; everything else that
reaches the top is a defect and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input; the message is one line: which file, which value, which rule, what to do about it."""


class BrokenSample(UserError):
    """One sample whose stored bytes are damaged: the stream masks it as a hole, everything else names it and stops."""

    def __init__(self, message: str, *, shard: str, offset: int, uid: str, reason: str) -> None:
        """Say where.

        Args:
            message: The whole line, for those who stop.
            shard: Path of the tar.
            offset: First byte of the sample in it.
            uid: The sample's identity.
            reason: One of checksum, truncated, undecodable, mismatch.
        """
        super().__init__(message)
        self.shard = shard
        self.offset = offset
        self.uid = uid
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_broken_sample, (str(self), self.shard, self.offset, self.uid, self.reason)


def _rebuild_broken_sample(message: str, shard: str, offset: int, uid: str, reason: str) -> BrokenSample:
    """What unpickling in another process calls: exceptions with keyword arguments need it."""
    return BrokenSample(message, shard=shard, offset=offset, uid=uid, reason=reason)
