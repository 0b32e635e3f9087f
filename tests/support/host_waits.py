"""Counts where a step would make the host wait for its device, on a machine without one.

Every tensor is taken to be on the device except those that were made without a device, copies that were sent to the
host without waiting, and what was computed from such alone. Reading any other tensor (`item`, `tolist`, `bool`, ...)
would wait for the device, and so would an upload that is not `non_blocking`. What happens below Python is not seen, nor
a device that is spelt "cpu".
"""

import traceback
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_READS = {
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "numpy",
    "cpu",
    "nonzero",
    "equal",
    "unique",
}

_OF_GENERATORS = {"random.py:fork"}
"""Looks at states of generators, which live on the host."""


class HostWaits(TorchFunctionMode):
    """While entered: the places that wait, as `file:function`, with how often."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        are_on_host = all(hasattr(tensor, "is_on_host") for tensor in tensors)
        is_upload = kwargs.get("device") not in (None, "cpu") or (  # the device is a torch.device, "cpu" means the host
            name == "to" and any(isinstance(argument, torch.device) for argument in args)
        )
        if name in _READS and not are_on_host and _place() not in _OF_GENERATORS:
            self.reads[_place()] += 1
        if name == "tensor":  # each element that is a tensor is read
            self.reads.update([_place()] * sum(not hasattr(tensor, "is_on_host") for tensor in tensors))
        if is_upload and are_on_host and name in ("tensor", "to") and not kwargs.get("non_blocking"):
            self.uploads[_place()] += 1
        result = func(*args, **kwargs)
        is_sent = name == "to" and "cpu" in args and kwargs.get("non_blocking")
        is_made_there = not tensors and (name == "tensor" or kwargs.get("device") is None) and not is_upload
        if is_sent or is_made_there or name in _READS or (tensors and are_on_host and not is_upload):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.numel():
                    leaf.is_on_host = True
        return result


def _is_between(filename: str) -> bool:
    return "/torch/" in filename or filename.endswith(("/parallel/platform.py", "/host_waits.py"))


def _place() -> str:
    frames = (frame for frame in reversed(traceback.extract_stack()[:-2]) if not _is_between(frame.filename))
    frame = next(frames)
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}"
