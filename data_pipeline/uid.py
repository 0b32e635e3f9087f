"""The identity of a sample: 128 bits that shards, masks and lists of ids agree on.

Written as 32 hex digits, stored as two words, the first digits first: the order in which DataComp writes its subset
files, so those can be used as they are. What has no such id is named by the sha256 of its own name.
"""

import hashlib
import re

import numpy as np

_HEX = re.compile(r"[0-9a-f]{32}")


def uid_text(identity: str) -> str:
    """The uid of a record by what it is called: 32 lower-case hex digits are one already, anything else is hashed."""
    if _HEX.fullmatch(identity):
        return identity
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def uid_words(uids: list[str]) -> np.ndarray:
    """uint64 [n, 2] of uids written as 32 hex digits."""
    return np.frombuffer(bytes.fromhex("".join(uids)), ">u8").reshape(-1, 2).astype("<u8")


def words_text(words: np.ndarray) -> str:
    """One stored uid (uint64 [2]) as 32 hex digits."""
    return f"{int(words[0]):016x}{int(words[1]):016x}"
