"""What is measured: a model of 50 million parameters, and a tiny one to see that everything runs."""

from dataclasses import dataclass, field

from janus_mega.config.schema import BackboneConfig, EncoderConfig, ImageTokenizerConfig, ModelConfig, OptimizerConfig


@dataclass(frozen=True)
class Size:
    """One size of the comparison."""

    model: ModelConfig
    seq_len: int
    rows: int
    """Per micro-batch."""
    tokens: int
    """Of all documents of a step, about."""
    padded_documents: int
    """Documents in a batch of the padded way."""
    repeats: int
    host_repeats: int
    gemm: int
    """Side of the matrices that the GEMM peak is measured with."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))


def _model(hidden: int, layers: int, vocab: int, codes: int, encoder: tuple[int, int], side: int) -> ModelConfig:
    return ModelConfig(
        name="bench",
        backbone=BackboneConfig(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=hidden // 64 or 1,
            num_kv_heads=hidden // 64 or 1,
            ffn_hidden_size=hidden * 11 // 4,
            vocab_size=vocab,
        ),
        understanding=EncoderConfig(
            image_size=side, patch_size=16, hidden_size=encoder[0], num_layers=encoder[1], num_heads=encoder[0] // 32
        ),
        image_tokenizer=ImageTokenizerConfig(image_size=side, base_channels=32, codebook_size=codes),
    )


FULL = Size(
    model=_model(512, 8, 16384, 4096, (256, 4), 192),
    seq_len=1024,
    rows=2,
    tokens=4096,
    padded_documents=8,
    repeats=5,
    host_repeats=200,
    gemm=2048,
)
TINY = Size(
    model=_model(64, 2, 256, 64, (32, 2), 64),
    seq_len=128,
    rows=1,
    tokens=512,
    padded_documents=4,
    repeats=2,
    host_repeats=20,
    gemm=256,
)
