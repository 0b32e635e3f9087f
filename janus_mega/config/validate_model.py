"""Rules of shapes: what a Janus and an image tokenizer may look like, alone and cut over tp and pp ranks."""

from collections.abc import Iterator

from janus_mega.config import derive
from janus_mega.config.schema import BackboneConfig, EncoderConfig, ImageTokenizerConfig, ModelConfig, ParallelConfig

GROUP_NORM_GROUPS = 32
"""Groups of every GroupNorm in the image tokenizer; its channel counts are multiples of it."""

LARGEST_CODEBOOK = 65536
"""Image ids are stored as uint16."""


def model_rules(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yields the broken rules of a model and of the way it is cut."""
    yield from backbone_rules(model.backbone)
    yield from encoder_rules(model.understanding)
    yield from image_tokenizer_rules(model.image_tokenizer, "model.image_tokenizer")
    yield from grid_rules(model)
    yield from tensor_parallel_rules(model, parallel.tp_size)
    yield from pipeline_rules(model.backbone, parallel)


def pipeline_rules(backbone: BackboneConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Every chunk of the pipeline holds a layer, and together they hold all."""
    num_chunks = parallel.pp_size * parallel.virtual_pp_size
    if num_chunks > backbone.num_layers:
        yield (
            f"parallel.pp_size {parallel.pp_size} * virtual_pp_size {parallel.virtual_pp_size} is above "
            f"model.backbone.num_layers {backbone.num_layers}: a pipeline rank would hold no layer; lower "
            "parallel.pp_size"
        )
    counts = parallel.pipeline_layers
    if counts and (len(counts) != num_chunks or min(counts) < 1 or sum(counts) != backbone.num_layers):
        yield (
            f"parallel.pipeline_layers {list(counts)} must be {num_chunks} numbers (pp_size * virtual_pp_size) of at "
            f"least 1 that sum to model.backbone.num_layers {backbone.num_layers}; correct them or leave them out"
        )


def backbone_rules(backbone: BackboneConfig) -> Iterator[str]:
    """Head counts and widths of the transformer."""
    names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
    small = [name for name in names if getattr(backbone, name) < 1]
    for name in small:
        yield f"model.backbone.{name} {getattr(backbone, name)} must be at least 1"
    if {"num_heads", "num_kv_heads"}.intersection(small):
        return
    if backbone.hidden_size % backbone.num_heads:
        yield (
            f"model.backbone.hidden_size {backbone.hidden_size} is not divisible by num_heads {backbone.num_heads}; "
            "change one of them"
        )
    elif derive.head_dim(backbone) % 2:
        yield (
            f"model.backbone: head width {derive.head_dim(backbone)} (hidden_size / num_heads) is odd, rotary "
            "positions turn pairs; change hidden_size or num_heads"
        )
    if backbone.num_heads % backbone.num_kv_heads:
        yield (
            f"model.backbone.num_heads {backbone.num_heads} is not divisible by num_kv_heads "
            f"{backbone.num_kv_heads}; use a divisor"
        )


def encoder_rules(encoder: EncoderConfig) -> Iterator[str]:
    """The understanding encoder's patches and heads."""
    if encoder.patch_size < 1 or encoder.image_size < 1 or encoder.image_size % encoder.patch_size:
        yield (
            f"model.understanding.image_size {encoder.image_size} is not divisible by patch_size "
            f"{encoder.patch_size}; change one of them"
        )
    if encoder.num_heads < 1 or encoder.hidden_size < 1 or encoder.hidden_size % encoder.num_heads:
        yield (
            f"model.understanding.hidden_size {encoder.hidden_size} is not divisible by num_heads "
            f"{encoder.num_heads}; change one of them"
        )
    if encoder.num_layers < 1:
        yield f"model.understanding.num_layers {encoder.num_layers} must be at least 1"


def image_tokenizer_rules(tokenizer: ImageTokenizerConfig, section: str) -> Iterator[str]:
    """Levels, channels and codes of the image tokenizer; `section` is where it stands in the config."""
    if not tokenizer.channel_multiplier:
        yield f"{section}.channel_multiplier is empty; give one factor per level, for example [1, 2, 2]"
        return
    factor = derive.downsampling(tokenizer)
    if tokenizer.image_size < factor or tokenizer.image_size % factor:
        yield (
            f"{section}.image_size {tokenizer.image_size} is not divisible by {factor}, the downsampling of "
            f"{len(tokenizer.channel_multiplier)} levels; change it or channel_multiplier"
        )
    for multiplier in tokenizer.channel_multiplier:
        channels = tokenizer.base_channels * multiplier
        if channels < 1 or channels % GROUP_NORM_GROUPS:
            yield (
                f"{section}: a level of {channels} channels (base_channels {tokenizer.base_channels} * {multiplier}) "
                f"is not a multiple of the {GROUP_NORM_GROUPS} norm groups; change base_channels"
            )
            break
    if not 2 <= tokenizer.codebook_size <= LARGEST_CODEBOOK:
        yield f"{section}.codebook_size {tokenizer.codebook_size} must lie in 2 ... {LARGEST_CODEBOOK}"
    for name in ("num_res_blocks", "latent_channels", "code_dim"):
        if getattr(tokenizer, name) < 1:
            yield f"{section}.{name} {getattr(tokenizer, name)} must be at least 1"
    if tokenizer.commitment_weight < 0:
        yield f"{section}.commitment_weight {tokenizer.commitment_weight} must be 0 or more"


def grid_rules(model: ModelConfig) -> Iterator[str]:
    """Both pathways cut an image into the same grid: the Hugging Face format has one number for both."""
    encoder, tokenizer = model.understanding, model.image_tokenizer
    if encoder.patch_size < 1 or not tokenizer.channel_multiplier:
        return
    understanding, generation = derive.understanding_grid(encoder), derive.generation_grid(tokenizer)
    if understanding != generation:
        yield (
            f"model.understanding makes a {understanding}x{understanding} grid, model.image_tokenizer "
            f"{generation}x{generation}; the Hugging Face format needs equal grids: change patch_size, image_size or "
            "channel_multiplier"
        )


def tensor_parallel_rules(model: ModelConfig, tp_size: int) -> Iterator[str]:
    """Whatever is cut over tp ranks is cut evenly."""
    if tp_size <= 1:
        return
    backbone = model.backbone
    cut = {
        "model.backbone.num_heads": backbone.num_heads,
        "model.backbone.num_kv_heads": backbone.num_kv_heads,
        "model.backbone.ffn_hidden_size": backbone.ffn_hidden_size,
        "model.backbone.vocab_size": backbone.vocab_size,
        "model.image_tokenizer.codebook_size": model.image_tokenizer.codebook_size,
    }
    for name, value in cut.items():
        if value % tp_size:
            yield f"{name} {value} is not divisible by parallel.tp_size {tp_size}; {_remedy(name, value, tp_size)}"


def _remedy(name: str, value: int, tp_size: int) -> str:
    if name.endswith("vocab_size"):
        return f"set it to {derive.padded_vocab_size(value, tp_size, multiple=1)} or change parallel.tp_size"
    divisors = [str(size) for size in range(1, min(value, tp_size) + 1) if value % size == 0]
    return f"set parallel.tp_size to {' or '.join(divisors[-3:])}"
