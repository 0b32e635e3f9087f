"""What one pipeline rank holds: layers, weights, which of them train. Elements per tensor-parallel rank.

The first and the last pipeline rank hold other things than those between, so everything is told per pipeline rank; the
tensor-parallel and data-parallel ranks of a pipeline rank are alike.
"""

from collections.abc import Collection
from dataclasses import dataclass

from janus_mega.config import derive
from janus_mega.config.schema import EncoderConfig, Module, Precision, RunConfig
from janus_mega.models.count import module_parameters
from janus_mega.observe.throughput import PATHS_INTO_BACKBONE
from janus_mega.parallel.layout import ChunkPlace, chunk_places

HEADS = (Module.text_head, Module.image_head)


@dataclass(frozen=True, slots=True)
class RankShape:
    """One pipeline rank's part of the model."""

    chunks: tuple[ChunkPlace, ...]
    weights: int
    """Elements of all parameters here."""
    trained: int
    """Elements of those that train here."""
    tensors: tuple[int, ...]
    """Elements of each parameter."""

    @property
    def num_layers(self) -> int:
        """Decoder layers here."""
        return sum(len(chunk.layers) for chunk in self.chunks)

    @property
    def is_first(self) -> bool:
        """Whether this rank embeds."""
        return any(chunk.is_first for chunk in self.chunks)

    @property
    def is_last(self) -> bool:
        """Whether this rank scores."""
        return any(chunk.is_last for chunk in self.chunks)


def element_bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.parallel.precision is Precision.bf16 else 4


def rank_shapes(config: RunConfig) -> list[RankShape]:
    """The pipeline ranks of a run, first to last."""
    parallel = config.parallel
    counts = derive.layer_counts(config.model, parallel)
    return [_shape(config, tuple(chunk_places(counts, parallel.pp_size, rank))) for rank in range(parallel.pp_size)]


def enters_trained(trainable: Collection[Module]) -> bool:
    """Whether something before the backbone trains, so that gradients pass through all of it."""
    return any(module in trainable for module in PATHS_INTO_BACKBONE)


def _shape(config: RunConfig, chunks: tuple[ChunkPlace, ...]) -> RankShape:
    elements = _elements(config, chunks)
    trainable = config.stage.trainable
    return RankShape(
        chunks=chunks,
        weights=sum(elements.values()),
        trained=sum(count for module, count in elements.items() if module in trainable),
        tensors=tuple(_tensor_sizes(config, chunks)),
    )


def _elements(config: RunConfig, chunks: tuple[ChunkPlace, ...]) -> dict[Module, int]:
    """Elements of each module that these chunks hold, cut over tp as `models.sharding` says."""
    model, tp_size = config.model, config.parallel.tp_size
    whole = module_parameters(model)
    found: dict[Module, int] = {}
    if any(chunk.is_first for chunk in chunks):
        found = {module: whole[module] for module in PATHS_INTO_BACKBONE}
        found[Module.text_embedding] //= tp_size
    if any(chunk.is_last for chunk in chunks):
        inner, width = derive.image_head_hidden_size(model), model.backbone.hidden_size
        found[Module.text_head] = whole[Module.text_head] // tp_size
        found[Module.image_head] = inner * (width + 1) + (inner + 1) * model.image_tokenizer.codebook_size // tp_size
    found[Module.backbone] = _backbone(config, chunks)
    return found


def _backbone(config: RunConfig, chunks: tuple[ChunkPlace, ...]) -> int:
    backbone, tp_size = config.model.backbone, config.parallel.tp_size
    width, head_dim = backbone.hidden_size, derive.head_dim(backbone)
    heads = 2 * (backbone.num_heads + backbone.num_kv_heads) * head_dim
    matrices = width * (heads + 3 * backbone.ffn_hidden_size) // tp_size
    norms = 2 * width + (2 * head_dim if backbone.qk_norm else 0)
    final = width if any(chunk.is_last for chunk in chunks) else 0
    return sum(len(chunk.layers) for chunk in chunks) * (matrices + norms) + final


def encoder_tensors(encoder: EncoderConfig) -> list[int]:
    """Elements of every parameter of the understanding encoder, which every tp rank holds whole."""
    e, f = encoder.hidden_size, derive.encoder_ffn_size(encoder)
    ends = [3 * encoder.patch_size**2 * e, derive.understanding_tokens(encoder) * e, e, e, e]
    return ends + [*[e * e, e] * 4, e * f, f, e * f, *[e] * 5] * encoder.num_layers


def _tensor_sizes(config: RunConfig, chunks: tuple[ChunkPlace, ...]) -> list[int]:
    """Elements of every parameter of these chunks."""
    model, tp_size = config.model, config.parallel.tp_size
    backbone, encoder, codes = model.backbone, model.understanding, model.image_tokenizer
    width, head_dim, inner = backbone.hidden_size, derive.head_dim(backbone), derive.image_head_hidden_size(model)
    queries, keys, ffn = backbone.num_heads * head_dim, backbone.num_kv_heads * head_dim, backbone.ffn_hidden_size
    matrices = [width * size // tp_size for size in (queries + 2 * keys, queries, 2 * ffn, ffn)]
    layer = [*matrices, width, width, *([head_dim] * 2 if backbone.qk_norm else [])]
    sizes = layer * sum(len(chunk.layers) for chunk in chunks)
    if any(chunk.is_first for chunk in chunks):
        sizes += encoder_tensors(encoder)
        sizes += [backbone.vocab_size * width // tp_size, codes.codebook_size * codes.code_dim]
        sizes += [encoder.hidden_size * width, codes.code_dim * width, *[width * width] * 2, *[width] * 4]
    if any(chunk.is_last for chunk in chunks):
        head = [width * inner, inner, inner * codes.codebook_size // tp_size, codes.codebook_size // tp_size]
        sizes += [width, backbone.vocab_size * width // tp_size, *head]
    return sizes
