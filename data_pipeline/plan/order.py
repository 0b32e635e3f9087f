"""Counter-based randomness: every order and every choice is a hash of what it is about.

Nothing here keeps a state, so any position of any epoch is known without what came before. numpy's own permutations are
avoided because their streams may change between releases; splitmix64 is a bijection of its counter, so keys never tie.
"""

import hashlib

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def stream_key(*parts: int | str) -> int:
    """Hashes what a choice is about (purpose, seed, name, epoch ...) to 64 bits; the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def unit_interval(*parts: int | str) -> float:
    """A number in [0, 1) that depends on the parts alone; compare it with a rate to decide something."""
    return (stream_key(*parts) >> 11) / (1 << 53)


def choice_keys(key: int, uids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """uint64 [n]: what chance says to each (uid, epoch) under a key, the same in any process and any company.

    Args:
        key: `stream_key` of the purpose and the seed.
        uids: uint64 [n, 2], as an index holds them.
        epochs: int [n].
    """
    keys = uids[:, 0] * np.uint64(_FACTORS[0])
    keys ^= uids[:, 1]
    keys += epochs.astype(np.uint64) * np.uint64(_GOLDEN)
    keys += np.uint64(key & _WORD)
    return _mixed(keys)


def happens(keys: np.ndarray, rate: float) -> np.ndarray:
    """bool [n]: which of the keys that `choice_keys` gave fall into a share `rate` of all keys."""
    if rate >= 1:
        return np.ones(len(keys), bool)
    return keys < np.uint64(int(max(rate, 0.0) * 2**64))


def counter_keys(key: int, count: int) -> np.ndarray:
    """uint64 [count]: splitmix64 of the counters 0 ... count - 1 under a key; all different."""
    keys = np.arange(1, count + 1, dtype=np.uint64)
    keys *= np.uint64(_GOLDEN)
    keys += np.uint64(key & _WORD)
    return _mixed(keys)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """The bijection of splitmix64, in place."""
    keys ^= keys >> np.uint64(30)
    keys *= np.uint64(_FACTORS[0])
    keys ^= keys >> np.uint64(27)
    keys *= np.uint64(_FACTORS[1])
    keys ^= keys >> np.uint64(31)
    return keys


def permutation(key: int, count: int) -> np.ndarray:
    """A permutation of 0 ... count - 1, int32 where that suffices (an epoch of ten million samples takes 40 MB).

    Counters that are added later leave the relative order of the earlier ones as it was.
    """
    order = np.argsort(counter_keys(key, count))
    return order.astype(np.int32) if count <= np.iinfo(np.int32).max else order
