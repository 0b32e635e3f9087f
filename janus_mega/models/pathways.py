"""The ways into and out of the stream: which modules each calls, and on what where a micro-batch gives it nothing.

Every rank's backward must reach every trainable module in every micro-batch, or data-parallel ranks reduce different
buckets: a hang, or silently wrong sums. A chunk therefore walks these tables instead of naming modules: a way without
items is walked with one dummy item whose result is multiplied by zero, so a pathway that is added here is guarded
without another line. It has to be a module call; ZeRO-3 gathers parameters there.

Shapes: `m` understanding images, `p` tokens of one, `g` drawn-image tokens, `h` hidden_size.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.schema import TaskId
from janus_mega.config.schema import ModelConfig, Module
from janus_mega.models.placement import PlacedBatch
from janus_mega.models.vision.siglip import normalize_pixels


@dataclass(frozen=True, slots=True)
class WayIn:
    """One modality on its way into the stream: items -> modules, one after the other -> rows of the stream."""

    modules: tuple[Module, ...]
    """Attributes of the first chunk, in the order of their calls."""
    items: Callable[[PlacedBatch], Tensor]
    """What the first module is called on, [n, ...]."""
    index: Callable[[PlacedBatch], Tensor]
    """int64: flat positions that the result fills."""
    dummy: Callable[[ModelConfig, Tensor], Tensor]
    """One item, from the model and the empty items."""
    prepare: Callable[[Tensor, torch.dtype], Tensor]
    """Items in the number format that the first module takes."""
    encoded: Callable[[PlacedBatch], Tensor | None]
    """Results of the first module where they were computed before (see `encode_ahead`)."""


WAYS_IN = (
    WayIn(
        modules=(Module.understanding_encoder, Module.understanding_adaptor),
        items=lambda batch: batch.pixel_values,
        index=lambda batch: batch.understanding_index,
        dummy=lambda model, items: items.new_zeros(
            1, 3, model.understanding.image_size, model.understanding.image_size
        ),
        prepare=normalize_pixels,
        encoded=lambda batch: batch.understanding_features,
    ),
    WayIn(
        modules=(Module.generation_embedding, Module.generation_adaptor),
        items=lambda batch: batch.generation_ids,
        index=lambda batch: batch.generation_index,
        dummy=lambda model, items: items.new_zeros(1),
        prepare=lambda items, dtype: items,
        encoded=lambda batch: None,
    ),
)
"""Modalities beside text, in the order in which they are written into the stream."""

HEADS = {
    TaskId.text: Module.text_head,
    TaskId.understanding: Module.text_head,
    TaskId.generation: Module.image_head,
}
"""The module of the last chunk that scores each task's labels; one without labels is called on one position."""


def walk_in(
    way: WayIn, chunk: nn.Module, batch: PlacedBatch, model: ModelConfig, trainable: Collection[Module]
) -> Tensor | None:
    """What a modality brings into the stream.

    Args:
        way: of WAYS_IN.
        chunk: holds the modules, and calls them by name.
        batch: may have no items; one dummy item is used then, or nothing where no module of the way trains.
        model: sizes.
        trainable: modules that get a gradient; what comes before the first of them is computed without a graph.

    Returns:
        [m * p, h] or [g, h]; None if there is nothing to bring.
    """
    items = way.items(batch)
    if items.shape[0] == 0:
        if not any(module in trainable for module in way.modules):
            return None
        items = way.dummy(model, items)
    encoded = way.encoded(batch)
    values = way.prepare(items, chunk.config.params_dtype) if encoded is None else encoded
    needs_graph = False
    for number, module in enumerate(way.modules):
        needs_graph = needs_graph or module in trainable
        if number == 0 and encoded is not None:
            continue
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph):
            values = chunk.call(module, values)
    return values.flatten(0, -2)


def place_in(stream: Tensor, index: Tensor, values: Tensor | None) -> Tensor:
    """Writes `values` [n, h] at `index` [n] of the flat stream; a dummy (empty index) only joins the graph, as zero."""
    if values is None:
        return stream
    if index.shape[0] == 0:
        return stream + 0.0 * values.sum()
    return stream.index_copy(0, index, values.to(stream.dtype))
