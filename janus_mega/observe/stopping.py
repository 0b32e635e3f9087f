"""Whether a run is to end early: asked for on some rank, agreed by all.

The flag is written by the thread that takes signals and read by the thread that trains. Ranks agree through a number in
an all-reduce that every step makes anyway, so a rank learns of a signal that only another one received, and all of them
stop at the same step. In the same way they learn, at one step, what a rank may find alone and all must end by: that a
newer attempt has taken the run over, or that saves can no longer be agreed on.

The number is a count of ranks per finding, side by side: an exact sum in fp64 for up to 131,071 ranks.
"""

_ROOM = 2.0**17
"""What a count is below: more than there are ranks."""


class StopFlag:
    """One per rank and run."""

    __slots__ = ("agreed", "lost", "saves_lost", "signal", "superseded", "taken_over")

    def __init__(self) -> None:
        self.signal = 0
        """Number of the stop signal that this rank received, 0 for none."""
        self.agreed = False
        """Whether all ranks know that some rank was asked; becomes true within the same collective on all of them."""

        self.superseded = False
        """Whether this rank has found that a newer attempt has taken the run over."""
        self.taken_over = False
        """Whether all ranks know that some rank has found so; becomes true as `agreed` does."""

        self.lost = False
        """Whether this rank has found that the ranks can no longer agree on saves."""
        self.saves_lost = False
        """Whether all ranks know that some rank has found so; becomes true as `agreed` does."""

    @property
    def told(self) -> float:
        """What this rank adds to the number that ranks agree through."""
        return float(self.signal != 0) + _ROOM * (self.superseded + _ROOM * self.lost)

    @property
    def asked(self) -> bool:
        """Whether this rank knows of a wish to stop."""
        return self.agreed or self.signal != 0

    def hear(self, told: float) -> None:
        """Takes what all ranks have told, as all of them have just read it."""
        findings, num_asked = divmod(told, _ROOM)
        num_lost, num_superseded = divmod(findings, _ROOM)
        self.agreed = self.agreed or num_asked > 0
        self.taken_over = self.taken_over or num_superseded > 0
        self.saves_lost = self.saves_lost or num_lost > 0
