"""Scalars gathered over steps and read out once per log interval.

Device tensors stay on their device until `read`, which moves all of them in one copy: logging costs one host
synchronisation per interval, however many scalars there are. Values are already reduced over ranks.
"""

import torch
from torch import Tensor


class MetricAccumulator:
    """Weighted means, sums and last values by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, Tensor | float] = {}

    def mean(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Adds to a weighted mean: read as sum(value * weight) / sum(weight)."""
        value, weight = _detached(value), _detached(weight)
        self._sums[name] = self._sums.get(name, 0.0) + value * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def sum(self, name: str, value: Tensor | float) -> None:
        """Adds to a sum."""
        self._sums[name] = self._sums.get(name, 0.0) + _detached(value)
        self._weights[name] = 1.0

    def last(self, name: str, value: Tensor | float) -> None:
        """Keeps the newest value, such as a learning rate."""
        self._sums[name] = _detached(value)
        self._weights[name] = 1.0

    def read(self) -> dict[str, float]:
        """Returns all values as floats and forgets them; a mean without weight is left out."""
        names = list(self._sums)
        sums = _to_floats([self._sums[name] for name in names])
        weights = _to_floats([self._weights[name] for name in names])
        self._sums, self._weights = {}, {}
        rows = zip(names, sums, weights, strict=True)
        return {name: total / weight for name, total, weight in rows if weight != 0}


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach().double() if isinstance(value, Tensor) else float(value)


def _to_floats(values: list[Tensor | float]) -> list[float]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    on_host = iter(torch.stack([tensor.reshape(()) for tensor in tensors]).tolist() if tensors else [])
    return [next(on_host) if isinstance(value, Tensor) else value for value in values]
