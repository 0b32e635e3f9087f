"""Copies of slices in host memory, all of one instant, for a writer that reads them while training goes on.

All copies lie in one flat buffer that is kept from save to save. Touching a page for the first time costs about ten
times as much as copying into it, so the buffer can be made ahead, beside training (`Staging.prepare`); later saves find
it there, and memory does not grow. On CUDA the buffer is registered in place: torch's own pinned allocator rounds up to
a power of two, which for tens of GiB is another copy of the state. The copies are queued on the stream that computes,
behind the update they belong to and before the next one, so the host waits for nothing; the writer waits for one event.

What does not fit stays where it is, and is the beginning of the file: the writer writes it first and tells, so training
is held for exactly that part, and the file is the same wherever the pieces came from.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from janus_mega.checkpoint.tensor_file import file_rank
from janus_mega.parallel.slices import Slice

_log = logging.getLogger(__name__)
_ALIGNMENT = 64
GIB = 2**30


class Snapshot:
    """Slices to write, in the order of the file; the first of them may be the live tensors themselves.

    `free` is set once no live tensor is needed any more: until then nothing may change them.
    """

    def __init__(self, slices: Sequence[Slice], num_live: int, wait: Callable[[], None]) -> None:
        """`num_live` of the first slices are live; `wait` returns when whatever the slices are made of is complete."""
        self.slices = tuple(slices)
        self.num_live = num_live
        self.free = threading.Event()
        self._wait = wait
        self._live = set(range(num_live))
        if not num_live:
            self.free.set()

    def __iter__(self) -> Iterator[Slice]:
        """Waits for the copies; what failed in making them is raised here, in the writer, not where it happened."""
        self._wait()
        return iter(self.slices)

    def written(self, number: int) -> None:
        """Slice `number` is written and hashed; its bytes are not looked at again."""
        self._live.discard(number)
        if not self._live:
            self.free.set()


class Staging:
    """The buffer of one rank. One snapshot at a time: the next overwrites it."""

    def __init__(self, limit_bytes: int = 0) -> None:
        """`limit_bytes` bounds the buffer; 0 lets it take whatever is asked for."""
        self._limit_bytes = limit_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._making: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return self._buffer.numel()

    def prepare(self, slices: Iterable[Slice]) -> None:
        """Makes the buffer for slices like these, in a thread of its own; the next snapshot waits for it.

        Only shapes, number formats and devices count. What goes wrong is told; the next snapshot tries again.
        """
        pieces = in_file_order(slices)
        self._begin_making(sum(map(_room_of, pieces[self._num_live(pieces) :])), _device_of(pieces))

    def snapshot(self, slices: Iterable[Slice]) -> Snapshot:
        """Copies slices, as they are when the work queued so far is done; the last ones of the file if not all fit.

        Raises:
            MemoryError: there is no memory for the buffer.
        """
        pieces = in_file_order(slices)
        num_live = self._num_live(pieces)
        device = _device_of(pieces)
        self._require(sum(map(_room_of, pieces[num_live:])), device)
        copies, position = [], 0
        with torch.no_grad():
            for piece in pieces[num_live:]:
                copies.append(replace(piece, tensor=self._copy(piece.tensor, position)))
                position += _room_of(piece)
        return Snapshot((*pieces[:num_live], *copies), num_live, _recorded(device))

    def _num_live(self, pieces: Sequence[Slice]) -> int:
        """How many of the first pieces stay where they are, so that the rest fits."""
        if not self._limit_bytes:
            return 0
        room = self._limit_bytes
        for number in range(len(pieces), 0, -1):
            room -= _room_of(pieces[number - 1])
            if room < 0:
                return number
        return 0

    def _require(self, num_bytes: int, device: torch.device) -> None:
        if self._making is not None:
            self._making.join()
            self._making = None
        if num_bytes > self._buffer.numel():
            self._error = None
            self._begin_making(num_bytes, device).join()
            self._making = None
            if self._error is not None:
                raise self._error

    def _begin_making(self, num_bytes: int, device: torch.device) -> threading.Thread:
        """Always in another thread: CUDA keeps an error per thread, and training would meet that of a failed lock."""
        arguments = (num_bytes, device)
        thread = threading.Thread(target=self._make, args=arguments, name="janus-mega-staging", daemon=True)
        thread.start()
        self._making = thread
        return thread

    def _make(self, num_bytes: int, device: torch.device) -> None:
        try:
            self._grow(num_bytes, device)
        except Exception as error:  # of a thread, which nobody would hear of
            _log.warning("no staging memory of %.1f GiB: %s", num_bytes / GIB, error)
            self._error = error.with_traceback(None)

    def _grow(self, num_bytes: int, device: torch.device) -> None:
        if num_bytes <= self._buffer.numel():
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)  # gone before the larger one is there
        try:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        except RuntimeError as error:  # torch's word for no memory
            raise MemoryError(str(error)) from None
        if device.type == "cuda":
            _register(self._buffer, device)
        else:
            self._buffer.zero_()

    def _copy(self, tensor: Tensor, position: int) -> Tensor:
        raw = self._buffer[position : position + tensor.numel() * tensor.element_size()]
        return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def live(slices: Iterable[Slice]) -> Snapshot:
    """Slices as they are, for a writer that is waited for."""
    pieces = in_file_order(slices)
    return Snapshot(pieces, len(pieces), _recorded(_device_of(pieces)))


def failed(error: Exception) -> Snapshot:
    """Nothing to write, because taking the snapshot raised: the save fails on all ranks alike, and none waits."""

    def tell() -> None:
        raise error

    return Snapshot((), 0, tell)


def in_file_order(slices: Iterable[Slice]) -> list[Slice]:
    """Slices in the order in which a tensor file holds them."""
    return sorted(slices, key=lambda piece: file_rank(piece.tensor))


def _room_of(piece: Slice) -> int:
    size = piece.tensor.numel() * piece.tensor.element_size()
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _device_of(pieces: Sequence[Slice]) -> torch.device:
    return next((piece.tensor.device for piece in pieces if piece.tensor.is_cuda), torch.device("cpu"))


def _recorded(device: torch.device) -> Callable[[], None]:
    """Waits for all that is queued on the device now."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def _register(buffer: Tensor, device: torch.device) -> None:
    """Locks the buffer's pages, so that a device copies into it by itself; without that it is only slower."""
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        code = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    if code:
        _log.warning("%.1f GiB of staging memory cannot be locked (CUDA error %d): saves hold training up for longer; "
                     "raise the limit of locked memory (ulimit -l)", buffer.numel() / GIB, code)  # fmt: skip
        return
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
