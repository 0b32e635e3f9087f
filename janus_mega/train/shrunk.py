"""A configuration made small enough to train in seconds on a CPU, with its layout left as it is.

Every degree, the backend, ZeRO stage, recomputation, interleaving, freeze set, loss and optimizer are the run's own;
widths, depth, vocabulary, codebook and pictures become the smallest that tp and pp still cut the same way: what was cut
evenly stays cut evenly, and every chunk of the pipeline keeps one layer, or two where it had more. Compilation is off:
on the CPU it needs a compiler and shows nothing of the device's kernels. What a shrunken run cannot show is what only
size does: memory, speed, and rounding over long sums.
"""

from dataclasses import replace

from janus_mega.config import derive
from janus_mega.config.schema import BackboneConfig, EncoderConfig, ParallelConfig, Precision, RunConfig, Schedule

HEAD_DIM = 16
IMAGE_SIDE, PATCH_SIDE, IMAGE_CHANNELS, IMAGE_LEVELS = 16, 4, 32, (1, 1, 2)
"""Pictures of 16 pixels a side and grids of 4 x 4 in either pathway."""
SEQ_LEN = 112
CHUNK_TOKENS = 16
CHECK_LR = 3e-4
CHECK_EPS = 1e-3
"""AdamW's epsilon at least. Where a gradient is little more than rounding, a smaller one makes a full step of either
sign of it, and equal layouts end with weights that differ by 6e-5; with this one they follow the gradients (6e-7 over
eight seeds)."""


def shrink(config: RunConfig, dp_size: int, *, keep_data: bool = False) -> RunConfig:
    """A small configuration of the same layout, in fp32 whatever the run's precision is.

    Args:
        config: one that `validate` accepts.
        dp_size: data-parallel ranks that will train it.
        keep_data: leave what the run's own rows need: row length, vocabulary, codebook and pictures.
    """
    layers = [min(2, count) for count in derive.layer_counts(config.model, config.parallel)]
    small = _shrink_widths(config, sum(layers))
    if not keep_data:
        small = _shrink_data(small)
    parallel = config.parallel
    return replace(
        small,
        parallel=replace(
            parallel,
            precision=Precision.fp32,
            pipeline_layers=layers if parallel.pp_size > 1 else [],
            torch_threads=1,
            check_calls=True,
            compile=False,
        ),
        optimizer=replace(
            config.optimizer,
            lr=CHECK_LR,
            schedule=Schedule.constant,
            warmup_steps=0,
            eps=max(config.optimizer.eps, CHECK_EPS),
        ),
        stage=replace(
            config.stage,
            init_from="",
            global_batch_size=dp_size * parallel.micro_batch_size * max(2, parallel.pp_size),
        ),
    )


def one_process(config: RunConfig) -> RunConfig:
    """The same training on one rank, one row at a time, by the plainest road there is."""
    return replace(config, parallel=ParallelConfig(precision=Precision.fp32, torch_threads=1))


def _shrink_widths(config: RunConfig, num_layers: int) -> RunConfig:
    model = config.model
    return replace(
        config,
        model=replace(
            model,
            backbone=_shrink_backbone(model.backbone, config.parallel.tp_size, num_layers),
            understanding=_shrink_encoder(model.understanding),
            image_head_hidden_size=3 * HEAD_DIM if model.image_head_hidden_size else 0,
        ),
    )


def _shrink_data(config: RunConfig) -> RunConfig:
    """Small vocabulary, codebook, pictures and rows; what tp cuts, it cuts evenly."""
    model, tp_size = config.model, config.parallel.tp_size
    model = replace(
        model,
        backbone=replace(model.backbone, vocab_size=64 * tp_size),
        understanding=replace(model.understanding, image_size=IMAGE_SIDE, patch_size=PATCH_SIDE),
        image_tokenizer=replace(
            model.image_tokenizer,
            image_size=IMAGE_SIDE,
            base_channels=IMAGE_CHANNELS,
            channel_multiplier=list(IMAGE_LEVELS),
            codebook_size=32 * tp_size,
        ),
    )
    seq_len = -(-SEQ_LEN // tp_size) * tp_size
    return replace(
        config,
        model=model,
        data=replace(config.data, seq_len=seq_len, geometry=derive.image_geometry(model)),
        loss=replace(config.loss, chunk_tokens=min(config.loss.chunk_tokens, CHUNK_TOKENS)),
    )


def _shrink_backbone(old: BackboneConfig, tp_size: int, num_layers: int) -> BackboneConfig:
    """One or two key-value heads a tp rank, and one or two query heads to each."""
    kv_heads = tp_size * min(2, old.num_kv_heads // tp_size)
    heads = kv_heads * min(2, old.num_heads // old.num_kv_heads)
    hidden = heads * HEAD_DIM
    return replace(
        old,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_layers=num_layers,
        ffn_hidden_size=2 * hidden,
    )


def _shrink_encoder(old: EncoderConfig) -> EncoderConfig:
    heads = min(2, old.num_heads)
    return replace(old, hidden_size=heads * HEAD_DIM, num_layers=min(2, old.num_layers), num_heads=heads)
