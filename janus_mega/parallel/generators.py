"""The random generators of a rank as tensors: torch's, CUDA's, megatron's tracker's, numpy's and Python's.

Tensors and integers only, so that nothing is unpickled. A rank of another layout than the one that saved, or on another
kind of device, has no generators to go on with; it draws from seeds that are a function of the run's seed, the step and
its place.
"""

import hashlib
import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from janus_mega.parallel.layout import Layout

_CUDA = "cuda"
_TRACKER = "megatron."


def generator_states() -> dict[str, Tensor]:
    """States of all generators of this process by name, on the CPU."""
    states = {"torch": torch.get_rng_state(), "python": _python_state(), "numpy": _numpy_state()}
    if torch.cuda.is_available():
        states[_CUDA] = torch.cuda.get_rng_state()
    tracked = megatron_random.get_cuda_rng_tracker().get_states()
    return states | {_TRACKER + name: state.cpu().clone() for name, state in tracked.items()}


def has_cuda_states(states: Mapping[str, Tensor]) -> bool:
    """Whether `generator_states` gave these on CUDA; megatron's tracker keeps states of that device's kind."""
    return _CUDA in states


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Puts back what `generator_states` gave on such a device; generators that it does not name stay as they are."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if _CUDA in states:
        torch.cuda.set_rng_state(states[_CUDA])
    if "python" in states:
        version, *words, has_next, bits = states["python"].tolist()
        random.setstate((version, tuple(words), _float_of(bits) if has_next else None))
    if "numpy" in states:
        *words, position, has_next, bits = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(words, np.uint32), position, has_next, _float_of(bits)))  # noqa: NPY002
    tracked = {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    if tracked:
        megatron_random.get_cuda_rng_tracker().set_states(tracked)


def seed_host_generators(seed: int) -> None:
    """Seeds Python's and numpy's generators, which otherwise begin by chance; `build_groups` has seeded the others."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def reseed_generators(seed: int, step: int, layout: Layout) -> int:
    """Seeds all generators from a run's seed, a step and this rank's place; returns what they were seeded with.

    Ranks of one tp group get the same seed, since what they hold in copy must stay equal; megatron's tracker tells them
    apart where they must differ.
    """
    text = f"{seed} {step} {layout.dp_rank} {layout.pp_rank}"
    derived = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") // 2
    torch.manual_seed(derived)
    seed_host_generators(derived)
    megatron_random.model_parallel_cuda_manual_seed(derived)
    return derived


def _python_state() -> Tensor:
    """[version, 625 words, whether a second normal number is waiting, its bits]."""
    version, words, waiting = random.getstate()
    return torch.tensor([version, *words, int(waiting is not None), _bits_of(waiting or 0.0)])


def _numpy_state() -> Tensor:
    """[624 words, position, whether a second normal number is waiting, its bits]."""
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    _, words, position, has_next, waiting = state
    return torch.tensor([*words.tolist(), position, has_next, _bits_of(waiting)])


def _bits_of(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def _float_of(bits: int) -> float:
    value: float = struct.unpack("<d", bits.to_bytes(8, "little", signed=True))[0]
    return value
