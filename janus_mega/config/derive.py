"""Arithmetic over a configuration: every number that follows from others and can therefore not be set.

Pure functions of plain values or of one section; `world_size` is an argument because a configuration does not know on
how many ranks it will run. They presume a configuration that `validate` accepted.
"""

from data_pipeline.spec import ImageGeometry
from janus_mega.config.schema import (
    BackboneConfig,
    EncoderConfig,
    ImageTokenizerConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
)


def dp_size(parallel: ParallelConfig, world_size: int) -> int:
    """Returns the number of data-parallel ranks: world / (tp * pp)."""
    return world_size // (parallel.tp_size * parallel.pp_size)


UNDERSTOOD_SHARE, DRAWN_SHARE, WRITTEN_SHARE = 0.15, 0.45, 0.35
"""Positions that hold an understood image, that the image head scores and that the text head scores, at the papers'
2 : 3 : 5 of stage II: what the ends of a pipeline are weighed with."""


def layer_counts(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Returns the decoder layers of every chunk in the order of the stream.

    Without `pipeline_layers`, each layer goes to the pipeline rank, and within it to the chunk, that has least to
    multiply so far. Chunk k lives on rank k % pp_size.
    """
    if parallel.pipeline_layers:
        return tuple(parallel.pipeline_layers)
    pp_size, num_chunks = parallel.pp_size, parallel.pp_size * parallel.virtual_pp_size
    layer = _layer_weights(model.backbone)
    first, last = _end_weights(model)
    counts = [1] * num_chunks
    load = [float(layer)] * num_chunks
    load[0] += first
    load[-1] += last
    for _ in range(model.backbone.num_layers - num_chunks):
        rank = min(range(pp_size), key=lambda r: (sum(load[r::pp_size]), r))
        chunk = min(range(rank, num_chunks, pp_size), key=lambda k: (load[k], k))
        counts[chunk] += 1
        load[chunk] += layer
    return tuple(counts)


def _layer_weights(backbone: BackboneConfig) -> int:
    """Returns the weights that a token is multiplied with in one decoder layer."""
    width = head_dim(backbone)
    heads = 2 * backbone.num_heads * width + 2 * backbone.num_kv_heads * width
    return backbone.hidden_size * (heads + 3 * backbone.ffn_hidden_size)


def _end_weights(model: ModelConfig) -> tuple[float, float]:
    """Returns the same before the first and after the last layer, for a mean position."""
    hidden, encoder = model.backbone.hidden_size, model.understanding
    patch = encoder.num_layers * encoder.hidden_size * (4 * encoder.hidden_size + 2 * encoder_ffn_size(encoder))
    inner = image_head_hidden_size(model)
    text_head = hidden * model.backbone.vocab_size
    image_head = inner * (hidden + model.image_tokenizer.codebook_size)
    return UNDERSTOOD_SHARE * patch, WRITTEN_SHARE * text_head + DRAWN_SHARE * image_head


def num_micro_batches(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Returns how many micro-batches one dp rank works through in a step."""
    return global_batch_size // (micro_batch_size * dp_size)


def tokens_per_step(config: RunConfig) -> int:
    """Returns the positions, padding included, that one optimizer step sees over all ranks."""
    return config.stage.global_batch_size * config.data.seq_len


def last_step(stage: StageConfig) -> int:
    """Returns the step after which the stage ends: `stop_at_step` where given, else `num_steps`."""
    return stage.stop_at_step or stage.num_steps


def head_dim(backbone: BackboneConfig) -> int:
    """Returns the width of one attention head."""
    return backbone.hidden_size // backbone.num_heads


def padded_vocab_size(vocab_size: int, tp_size: int, multiple: int = 128) -> int:
    """Returns `vocab_size` rounded up so that every tp rank holds equally many rows, a multiple of `multiple`."""
    block = multiple * tp_size
    return -(-vocab_size // block) * block


def understanding_grid(encoder: EncoderConfig) -> int:
    """Returns patches per side of an understood image."""
    return encoder.image_size // encoder.patch_size


def understanding_tokens(encoder: EncoderConfig) -> int:
    """Returns the tokens that one understood image occupies."""
    return understanding_grid(encoder) ** 2


def downsampling(tokenizer: ImageTokenizerConfig) -> int:
    """Returns the pixels per side that one image id covers: every level but the last halves the resolution."""
    return 2 ** (len(tokenizer.channel_multiplier) - 1)


def generation_grid(tokenizer: ImageTokenizerConfig) -> int:
    """Returns ids per side of a drawn image."""
    return tokenizer.image_size // downsampling(tokenizer)


def generation_tokens(tokenizer: ImageTokenizerConfig) -> int:
    """Returns the ids of one drawn image."""
    return generation_grid(tokenizer) ** 2


def image_geometry(model: ModelConfig) -> ImageGeometry:
    """Returns the geometry that data must be prepared with for this model."""
    return ImageGeometry(
        understanding_size=model.understanding.image_size,
        understanding_tokens=understanding_tokens(model.understanding),
        generation_size=model.image_tokenizer.image_size,
        generation_tokens=generation_tokens(model.image_tokenizer),
        codebook_size=model.image_tokenizer.codebook_size,
    )


def image_head_hidden_size(model: ModelConfig) -> int:
    """Returns the inner width of the image head; the backbone's width where the config says 0."""
    return model.image_head_hidden_size or model.backbone.hidden_size


def encoder_ffn_size(encoder: EncoderConfig) -> int:
    """Returns the inner width of the understanding encoder's MLP."""
    return int(encoder.hidden_size * encoder.mlp_ratio)


def task_shares(config: RunConfig) -> dict[str, float]:
    """Returns the share of every task in the mixture, summing to 1; tasks without a source are absent."""
    total = sum(source.weight for source in config.data.sources.values())
    shares: dict[str, float] = {}
    for source in config.data.sources.values():
        if source.weight > 0:
            shares[source.task.value] = shares.get(source.task.value, 0.0) + source.weight / total
    return shares
