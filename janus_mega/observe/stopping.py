"""Whether a run is to end early: asked for on some rank, agreed by all.

The flag is written by the thread that takes signals and read by the thread that trains. Ranks agree through a number in
an all-reduce that every step makes anyway, so a rank learns of a signal that only another one received, and all of them
stop at the same step.
"""


class StopFlag:
    """One per rank and run."""

    __slots__ = ("agreed", "signal")

    def __init__(self) -> None:
        self.signal = 0
        """Number of the stop signal that this rank received, 0 for none."""
        self.agreed = False
        """Whether all ranks know that some rank was asked; becomes true within the same collective on all of them."""

    @property
    def asked(self) -> bool:
        """Whether this rank knows of a wish to stop."""
        return self.agreed or self.signal != 0

    def hear(self, num_asked: float) -> None:
        """Takes how many ranks were asked, as all of them have just read it."""
        if num_asked > 0:
            self.agreed = True
