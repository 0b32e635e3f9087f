"""Pictures to image ids, fast: while the image tokenizer works on one batch, threads read, decode and crop the next.

Batches hold the same number of pictures, the last of a shard excepted, and depend on the shard's records alone, not on
how fast anything was: redoing a shard feeds the tokenizer the same arrays.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import numpy as np

from data_pipeline.errors import UserError

T = TypeVar("T")


class ImageTokenizer(Protocol):
    """A frozen image tokenizer, as prepare needs it. For several processes it must pickle."""

    image_size: int
    """Side of the pictures, pixels."""
    num_tokens: int
    """Ids per picture."""
    codebook_size: int
    """Number of ids."""
    digest: str
    """sha256 over weights and preprocessing, hex."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures uint8 [n, 3, image_size, image_size] to ids uint16 [n, num_tokens] in raster order."""
        ...


class Ahead(Generic[T]):
    """Calls that run in threads and whose results are taken in the order in which they were asked for."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[T]] = deque()

    def ask(self, call: Callable[[], T]) -> None:
        """Asks for a call."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads)
        self._waiting.append(self._pool.submit(call))

    def take(self) -> T:
        """The result of the oldest call not yet taken; raises what it raised."""
        return self._waiting.popleft().result()

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Forgets what is not taken and ends the threads, so that nothing is left that would not pickle or fork."""
        self._waiting.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class PictureEncoder:
    """Numbers pictures as they come and has their ids a little later."""

    def __init__(self, tokenizer: ImageTokenizer, batch_size: int) -> None:
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._encoding: Ahead[np.ndarray] = Ahead(1)
        self.close()

    def add(self, picture: np.ndarray) -> int:
        """Takes a picture, uint8 [3, size, size]; returns its number. Waits for the batch before the one it fills."""
        self._batch.append(picture)
        self._num_added += 1
        if len(self._batch) == self._batch_size:
            self._start()
            self._collect(leave=1)
        return self._num_added - 1

    def flush(self) -> None:
        """Encodes what is left."""
        if self._batch:
            self._start()
        self._collect(leave=0)

    @property
    def num_ready(self) -> int:
        """Pictures whose ids are known."""
        return self._num_ready

    def take(self, number: int) -> np.ndarray:
        """Ids of a picture, uint16 [num_tokens]; each can be taken once."""
        return self._ids.pop(number)

    def close(self) -> None:
        """Forgets everything; numbers begin again at 0."""
        self._encoding.close()
        self._batch: list[np.ndarray] = []
        self._ids: dict[int, np.ndarray] = {}
        self._num_added = self._num_ready = 0

    def _start(self) -> None:
        batch, self._batch = self._batch, []
        self._encoding.ask(lambda: self._encode(np.stack(batch)))

    def _collect(self, leave: int) -> None:
        while len(self._encoding) > leave:
            for row in self._encoding.take():
                self._ids[self._num_ready] = row
                self._num_ready += 1

    def _encode(self, pictures: np.ndarray) -> np.ndarray:
        """Ids uint16 [n, num_tokens] of pictures uint8 [n, 3, size, size], checked."""
        ids = self._tokenizer.encode(pictures)
        expected = (len(pictures), self._tokenizer.num_tokens)
        if ids.shape != expected or ids.dtype != np.uint16 or int(ids.max()) >= self._tokenizer.codebook_size:
            raise UserError(
                f"the image tokenizer gave {ids.dtype} {ids.shape} with ids up to {int(ids.max())}; it promises uint16 "
                f"{expected} below {self._tokenizer.codebook_size}: correct the tokenizer"
            )
        return ids
