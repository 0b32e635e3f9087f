"""From identities to sample numbers: sorted once, then any number of uids is found by bisection."""

import numpy as np

from data_pipeline.manifest import Source


class UidIndex:
    """The uids of a source, sorted. An image with several captions has several samples of one uid."""

    def __init__(self, uids: np.ndarray) -> None:
        """`uids` is uint64 [n, 2]."""
        self._order = np.lexsort((uids[:, 1], uids[:, 0]))
        self._high = np.ascontiguousarray(uids[self._order, 0])
        self._low = np.ascontiguousarray(uids[self._order, 1])

    def find(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up uids (uint64 [m, 2]).

        Returns:
            (queries, samples): int64 arrays of one length, one entry for every sample whose uid is asked for.
        """
        query = np.arange(len(words))
        at = np.searchsorted(self._high, words[:, 0])
        queries, samples = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while len(at):
            there = at < len(self._high)
            query, at = query[there], at[there]
            same = self._high[at] == words[query, 0]
            query, at = query[same], at[same]
            found = self._low[at] == words[query, 1]
            queries.append(query[found])
            samples.append(self._order[at[found]])
            at = at + 1
        return np.concatenate(queries), np.concatenate(samples)


def rows_of_uids(source: Source, other: Source) -> np.ndarray:
    """int64 [len(source)]: for every sample the first sample of `other` with its uid, -1 where there is none."""
    queries, samples = UidIndex(other.uids).find(source.uids)
    rows = np.full(len(source), len(other), np.int64)
    np.minimum.at(rows, queries, samples)
    rows[rows == len(other)] = -1
    return rows
