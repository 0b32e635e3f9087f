"""The open tars of one source, and reads at known offsets in them.

Plain positioned reads rather than memory maps: a disk that fails or a file that shrinks gives an error to report, where
a map would end the process with SIGBUS; and bytes that are not in the cache of the processor cost the same both ways.
"""

import os
import resource

from data_pipeline.errors import UserError
from data_pipeline.manifest import Source

_MAX_OPEN = 4096
"""Tars that a process keeps open, where the system allows as many."""


def open_limit(num_sources: int) -> int:
    """Tars of one of so many sources that may stay open: together at most half of what the system allows."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    together = _MAX_OPEN if allowed == resource.RLIM_INFINITY else min(_MAX_OPEN, allowed // 2)
    return max(together // num_sources, 8)


class ShardFiles:
    """Opens the shards of a source when they are read and closes the oldest when there are many."""

    def __init__(self, source: Source, limit: int = 64) -> None:
        self.source = source
        self.limit = limit
        """How many stay open."""
        self._files: dict[int, int] = {}

    def __reduce__(self) -> tuple[type["ShardFiles"], tuple[Source, int]]:
        return ShardFiles, (self.source, self.limit)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open; reading opens it again."""
        files = self.__dict__.get("_files", {})
        while files:
            os.close(files.popitem()[1])

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes at an offset; fewer than asked for where the tar ends before.

        Raises:
            UserError: The shard is missing or the disk gives an error.
        """
        try:
            return os.pread(self.descriptors([shard])[0], size, offset)
        except OverflowError:
            return b""  # a damaged index: no file is as long as that
        except OSError as error:
            raise self.unreadable(shard, error) from error

    def descriptors(self, shards: list[int]) -> list[int]:
        """Descriptors for several reads, all open until the next call.

        Raises:
            UserError: A shard is missing.
        """
        wanted = set(shards)
        new = wanted - self._files.keys()
        too_many = len(self._files) + len(new) - self.limit
        if too_many > 0:
            for shard in [shard for shard in self._files if shard not in wanted][:too_many]:
                os.close(self._files.pop(shard))
        for shard in new:
            self._files[shard] = self._opened(shard)
        return [self._files[shard] for shard in shards]

    def unreadable(self, shard: int, error: OSError) -> UserError:
        """What to raise when a read gives an error."""
        path = self.source.shard_path(shard)
        return UserError(f"{path}: the shard cannot be read ({error.strerror}); check the disk or copy it again")

    def _opened(self, shard: int) -> int:
        path = self.source.shard_path(shard)
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: the shard cannot be opened ({error.strerror}); copy it again") from error
