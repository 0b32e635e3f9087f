"""Fresh weights that do not depend on the layout.

Every parameter is drawn whole from a generator seeded by the run's seed and the hash of its global name, then cut. Two
layouts therefore start bit-equal, which is what lets tests assert losses, gradient norms and weights across them. The
first matching row of the table decides the distribution.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from janus_mega.config.schema import BackboneConfig
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import Box, index_of

Initializer = Callable[[Tensor, torch.Generator, BackboneConfig], None]


def _ones(x: Tensor, generator: torch.Generator, backbone: BackboneConfig) -> None:
    x.fill_(1.0)


def _zeros(x: Tensor, generator: torch.Generator, backbone: BackboneConfig) -> None:
    x.zero_()


def _unit_normal(x: Tensor, generator: torch.Generator, backbone: BackboneConfig) -> None:
    x.normal_(generator=generator)


def _normal(x: Tensor, generator: torch.Generator, backbone: BackboneConfig) -> None:
    x.normal_(std=backbone.init_std, generator=generator)


def _into_stream(x: Tensor, generator: torch.Generator, backbone: BackboneConfig) -> None:
    x.normal_(std=backbone.init_std / math.sqrt(2 * backbone.num_layers), generator=generator)


def _fan_in(x: Tensor, generator: torch.Generator, backbone: BackboneConfig) -> None:
    x.normal_(std=1 / math.sqrt(x[0].numel()), generator=generator)


INIT_TABLE: tuple[tuple[str, Initializer], ...] = (
    ("*norm*.weight", _ones),
    ("*.bias", _zeros),
    ("generation_embedding.weight", _unit_normal),
    ("decoder.*.linear_proj.weight", _into_stream),
    ("decoder.*.linear_fc2.weight", _into_stream),
    ("decoder.*", _normal),
    ("text_embedding.weight", _normal),
    ("text_head.weight", _normal),
    ("image_head.fc2.weight", _normal),
    ("*", _fan_in),
)
"""fnmatch pattern over global names -> initialiser; encoders, adaptors and the image head's inner layer keep the
variance of their inputs."""


def initial_value(name: str, shape: tuple[int, ...], backbone: BackboneConfig, seed: int) -> Tensor:
    """The full fp32 tensor that parameter `name` starts from."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(shape)
    next(initializer for pattern, initializer in INIT_TABLE if fnmatchcase(name, pattern))(value, generator, backbone)
    return value


@torch.no_grad()
def initialize(parameters: Iterable[ShardedParameter], backbone: BackboneConfig, seed: int) -> None:
    """Fills local parameters with their cut of the layout-independent initial values."""
    for sharded in parameters:
        full = initial_value(sharded.name, sharded.global_shape, backbone, seed)
        sharded.parameter.copy_(sharded.cut(partial(_read, full)))


def _read(full: Tensor, box: Box) -> Tensor:
    return full[index_of(box)]
