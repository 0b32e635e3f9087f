"""Counts where a step would make the host wait for its device, on a machine without one.

Every tensor is taken to be on the device except those that were made without a device, copies that were sent to the
host without waiting, and what was computed from such alone. Reading any other tensor (`item`, `tolist`, `bool`, ...)
would wait for the device, and so would bringing it to the host at once, an operator whose result has a shape that
values decide (`x[mask]`, `nonzero`, `bincount`, ...), and an upload that is not `non_blocking`.

Two modes look. One sees functions as Python calls them: here alone can copies between host and device be told, by how
the device is spelt ("cpu" is the host, a torch.device is the device), and tensors of the host from others. The other
sees the operators that they come down to, also those of C++ and of backward.
"""

import traceback
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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

_READING_OPERATORS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}

_OF_GENERATORS = {"random.py:fork"}
"""Looks at states of generators, which live on the host."""


class HostWaits(TorchFunctionMode):
    """While entered: the places that wait, as `file:function`, with how often."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.is_settled = False
        """Whether the function that runs has been counted, or touches tensors of the host alone."""
        self.is_called = False
        """Whether a function runs that Python called, and not backward on its own."""
        self._operators = _Operators(self)

    def __enter__(self) -> "HostWaits":
        self._operators.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = _tensors_of(args, kwargs)
        are_on_host = all(map(_is_on_host, tensors))
        is_upload = kwargs.get("device") not in (None, "cpu") or (
            name == "to" and any(isinstance(argument, torch.device) for argument in args)
        )
        num_reads = self._reads_of(name, args, kwargs)
        if num_reads and _place() not in _OF_GENERATORS:
            self.reads[_place()] += num_reads
        if is_upload and are_on_host and name in ("tensor", "to") and not kwargs.get("non_blocking"):
            self.uploads[_place()] += 1
        outer = self.is_settled, self.is_called
        self.is_settled, self.is_called = bool(num_reads) or bool(tensors and are_on_host), name != "backward"
        try:
            result = func(*args, **kwargs)
        finally:
            self.is_settled, self.is_called = outer
        is_made_there = not tensors and (name == "tensor" or kwargs.get("device") is None) and not is_upload
        is_there = is_made_there or name in _READS or _is_sent(name, args, kwargs)
        if is_there or (tensors and are_on_host and not is_upload):
            _put_on_host(result)
        elif is_upload and isinstance(result, torch.Tensor) and _is_on_host(result):  # nothing was copied here
            result = result.view_as(result)
            vars(result).pop("is_on_host", None)
        return result

    def _reads_of(self, name: str, args: Any, kwargs: Any) -> int:
        """How many tensors of the device a function would read."""
        tensors = _tensors_of(args, kwargs)
        if name == "tensor":  # each element that is a tensor is read
            return sum(not _is_on_host(tensor) for tensor in tensors)
        if name == "copy_":
            return int(_is_on_host(tensors[0]) and not _is_on_host(tensors[-1]) and not _is_unwaited(args, kwargs))
        is_read = name in _READS or (_is_sent(name, args, kwargs) and not kwargs.get("non_blocking"))
        return int(is_read and not all(map(_is_on_host, tensors)))


class _Operators(TorchDispatchMode):
    """Counts operators that would wait beneath functions that were not counted themselves."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors_of(args, kwargs)
        if not self._waits.is_settled and not all(map(_is_on_host, tensors)) and _waits_for(func, args, kwargs):
            place = _place()
            self._waits.reads[place] += place not in _OF_GENERATORS
        result = func(*args, **kwargs)
        # Numbers as Python hands them over, in x[mask] = 0, and the zero that its backward fills in where that number
        # was; had that been one of the device, x[mask] = number would have been counted.
        is_number = func is torch.ops.aten.lift_fresh.default
        is_number |= func is torch.ops.aten.zeros.default and not args[0] and not self._waits.is_called
        if is_number or (tensors and all(map(_is_on_host, tensors)) and kwargs.get("device") is None):
            _put_on_host(result)
        return result


def _waits_for(operator: Any, args: Any, kwargs: Any) -> bool:
    name = operator._schema.name.removeprefix("aten::")
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        # One number of the host for all places of a mask is filled in without counting them.
        is_filled = name != "index" and len(masks) == 1 and args[2].numel() == 1 and _is_on_host(args[2])
        return bool(masks) and not is_filled
    return name in _READING_OPERATORS


def _is_sent(name: str, args: Any, kwargs: Any) -> bool:
    return name == "to" and ("cpu" in [leaf for leaf in args if isinstance(leaf, str)] or kwargs.get("device") == "cpu")


def _is_unwaited(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or args[2:3] == (True,))


def _tensors_of(args: Any, kwargs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


def _put_on_host(result: Any) -> None:
    for leaf in _tensors_of(result, {}):
        if leaf.numel():
            leaf.is_on_host = True


def _is_on_host(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "is_on_host")


def _is_between(filename: str) -> bool:
    return "/torch/" in filename or filename.endswith(("/parallel/platform.py", "/host_waits.py"))


def _place() -> str:
    frames = (frame for frame in reversed(traceback.extract_stack()[:-2]) if not _is_between(frame.filename))
    frame = next(frames)
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}"
