"""Numbers of a step on their way to the host, while the step goes on.

The host has to wait for the device once in a step: for the gradient norm, which decides about the update. Losses and
counts are copied before that, behind the backward pass in the same stream, so they are there when the norm is and cost
no wait of their own. Phases of a step are timed the same way, by events of the stream.
"""

import time

import torch
from torch import Tensor


class Mark:
    """A moment of a step: in the device's stream where there is one, else by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.host_s = time.perf_counter()
        """The host's clock when the mark was set."""
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the device has passed here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Seconds between two marks that the device has passed."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self.host_s - earlier.host_s


class Sent:
    """A tensor whose copy to the host is under way."""

    def __init__(self, numbers: Tensor) -> None:
        """`numbers`: [n], of any type that Python has."""
        self._numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
        self.mark = Mark(numbers.device)
        """When the device has come as far as this."""

    def read(self) -> list[float]:
        """The numbers; waits for nothing if the host has since waited for something that came later."""
        self.mark.wait()
        return self._numbers.tolist()
