"""The dataclasses of a model: its backbone and both visual pathways. `schema` hands them on; import them from there."""

from dataclasses import dataclass, field

from data_pipeline.spec import MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """The shared Llama-style transformer."""

    hidden_size: int = MISSING
    """Model width."""
    num_layers: int = MISSING
    """Decoder layers over all pipeline ranks."""
    num_heads: int = MISSING
    """Query heads."""
    num_kv_heads: int = MISSING
    """Key/value heads; equal to num_heads for plain multi-head attention."""
    ffn_hidden_size: int = MISSING
    """Inner width of the gated MLP."""
    vocab_size: int = MISSING
    """Rows of the text embedding and of the text head; must hold every id of the text tokenizer."""
    max_position_embeddings: int = 16384
    """Longest document the positions are meant for; written to exports."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on queries and keys per head (not expressible in the Hugging Face Janus export)."""
    init_std: float = 0.02
    """Standard deviation of fresh matrices; projections back into the stream are divided by sqrt(2 * num_layers)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The understanding encoder (registry name and its sizes)."""

    name: str = "siglip"
    """Entry of the encoder registry in models/vision."""
    image_size: int = 384
    """Side of the input picture, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels; tokens = (image_size / patch_size)^2."""
    hidden_size: int = 1024
    """Width of the encoder."""
    num_layers: int = 24
    """Encoder layers."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Inner width of its MLP over hidden_size."""
    norm_eps: float = 1e-6
    """Epsilon of its LayerNorms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokenizerConfig:
    """The VQ generation tokenizer (VQ-16 of LlamaGen at its defaults)."""

    image_size: int = 384
    """Side of the picture it encodes, pixels."""
    base_channels: int = 128
    """Channels of the first level."""
    channel_multiplier: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels per level over base_channels; levels - 1 halvings of the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    latent_channels: int = 256
    """Channels between encoder and quantiser."""
    codebook_size: int = 16384
    """Number of codes."""
    code_dim: int = 8
    """Width of a code; also of the generation embedding."""
    commitment_weight: float = 0.25
    """Weight of the commitment term of the quantiser's loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Janus: one backbone, two visual pathways that share nothing but it."""

    name: str = MISSING
    """Used in reports and exports."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The shared transformer."""
    understanding: EncoderConfig = field(default_factory=EncoderConfig)
    """How images come in."""
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    """How images go out."""
    image_head_hidden_size: int = 0
    """Inner width of the image head; 0 means the backbone's hidden_size."""
