"""Rows that are only scored: a plan of its own for each validation set, read from the first row on, whenever asked.

A set is one global batch, so ranks share it as they share a batch of training and any layout scores the same rows.
Sources of weight 0 count like those of weight 1: they stand in the mixture to be held out.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from data_pipeline.plan.open import OpenData, open_data
from data_pipeline.plan.supply import check_supply
from data_pipeline.spec import DataSpec
from data_pipeline.stream.loader import build_loader
from data_pipeline.text.interface import TextTokenizer
from janus_mega.config.schema import ValidationSet

_log = logging.getLogger(__name__)


def open_validation_sets(
    spec: DataSpec, sets: Mapping[str, ValidationSet], tokenizer: TextTokenizer
) -> dict[str, OpenData]:
    """The plans of the sets by name; reads no sample.

    Raises:
        UserError: A source is missing, damaged or too small for the set.
    """
    opened = {}
    for name, entry in sets.items():
        data = open_data(validation_spec(spec, entry), tokenizer, global_batch_size=entry.num_rows)
        check_supply(data.plan, 1)
        opened[name] = data
    return opened


def validation_spec(spec: DataSpec, entry: ValidationSet) -> DataSpec:
    """The data of a set: the chosen sources at their first weights, without prompts dropped for guidance."""
    if entry.sources:
        sources = {name: spec.sources[name] for name in entry.sources}
        sources = {name: replace(source, weight=source.weight or 1.0) for name, source in sources.items()}
    else:
        sources = {name: source for name, source in spec.sources.items() if source.weight}
    sources = {name: replace(source, schedule=[], max_epochs=0.0) for name, source in sources.items()}
    return replace(spec, sources=sources, seed=entry.seed, guidance_dropout=0.0, num_workers=0)


def read_validation_rows(data: OpenData, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[dict[str, Tensor]]:
    """A dp rank's micro-batches of a set; damaged samples are holes in them, and warned of.

    Raises:
        UserError: A shard cannot be read.
    """
    loader = build_loader(data, micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, num_steps=1)
    (batches,) = loader
    for hole in loader.holes:
        _log.warning("validation goes without sample %s of %s, which is damaged", hole.uid, hole.shard)
    return batches
