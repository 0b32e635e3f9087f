"""The smallest Janus and batches that still exercise every path, and a workload over them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.schema import LabelHead, TaskId, TokenKind
from janus_mega.config.schema import (
    BackboneConfig,
    CheckpointConfig,
    EncoderConfig,
    ImageTokenizerConfig,
    LoggingConfig,
    LossConfig,
    LossNormalization,
    ModelConfig,
    Module,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from janus_mega.models.backbone import compute_dtype
from janus_mega.models.encode_ahead import prepare_with
from janus_mega.models.init import initialize
from janus_mega.models.janus import MODULE_ATTRIBUTES, build_chunks
from janus_mega.models.losses import task_denominators
from janus_mega.models.placement import TASKS, PlacedBatch, count_labels, place_batch
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.order import FixedOrder
from janus_mega.train.workload import BuiltModel, Recipe

SEQ_LEN = 96
VOCAB_SIZE = 128
CODEBOOK_SIZE = 64
IMAGE_TOKENS = 16
IMAGE_SIDE = 16
STAGE1 = (
    Module.understanding_adaptor,
    Module.generation_embedding,
    Module.generation_adaptor,
    Module.image_head,
)
STAGE3 = tuple(Module)


def tiny_model(qk_norm: bool = False) -> ModelConfig:
    """Four layers, grouped-query attention, both pathways."""
    return ModelConfig(
        name="tiny-test",
        backbone=BackboneConfig(
            hidden_size=64,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=128,
            vocab_size=VOCAB_SIZE,
            qk_norm=qk_norm,
        ),
        understanding=EncoderConfig(image_size=IMAGE_SIDE, patch_size=4, hidden_size=32, num_layers=2, num_heads=2),
        image_tokenizer=ImageTokenizerConfig(
            image_size=IMAGE_SIDE, base_channels=32, channel_multiplier=[1, 1, 2], codebook_size=CODEBOOK_SIZE
        ),
    )


def random_row(generator: torch.Generator, kinds: str, seq_len: int = SEQ_LEN) -> dict[str, Tensor]:
    """One packed row of random documents: t text, u image understood, g image drawn; what does not fit is left out."""
    row = {
        "input_ids": torch.randint(0, VOCAB_SIZE, (seq_len,), generator=generator),
        "token_kind": torch.full((seq_len,), int(TokenKind.pad), dtype=torch.uint8),
        "position_ids": torch.zeros(seq_len, dtype=torch.long),
        "labels": torch.zeros(seq_len, dtype=torch.long),
        "label_head": torch.zeros(seq_len, dtype=torch.uint8),
        "label_task": torch.zeros(seq_len, dtype=torch.uint8),
    }
    borders, num_images, start = [0], 0, 0
    for kind in kinds:
        length = int(torch.randint(20, 40, (1,), generator=generator))
        if start + length > seq_len:
            break
        document = {name: values[start : start + length] for name, values in row.items()}
        _fill_document(document, kind, length)
        num_images += kind == "u"
        start += length
        borders.append(start)
    row["position_ids"][start:] = torch.arange(seq_len - start)
    if start < seq_len:
        borders.append(seq_len)
    row["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
    shape = (num_images, 3, IMAGE_SIDE, IMAGE_SIDE)
    row["pixel_values"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return row


def _fill_document(document: dict[str, Tensor], kind: str, length: int) -> None:
    ids = document["input_ids"]
    document["position_ids"][:] = torch.arange(length)
    document["token_kind"][:] = int(TokenKind.text)
    image = slice(2, 2 + IMAGE_TOKENS)
    if kind == "t":
        scored, head, task = slice(0, length - 1), LabelHead.text, TaskId.text
    elif kind == "u":
        document["token_kind"][image] = int(TokenKind.image_und)
        scored, head, task = slice(image.stop, length - 1), LabelHead.text, TaskId.understanding
    else:
        document["token_kind"][image] = int(TokenKind.image_gen)
        ids[image] %= CODEBOOK_SIZE
        scored, head, task = slice(image.start - 1, image.stop - 1), LabelHead.image, TaskId.generation
    document["label_head"][scored] = int(head)
    document["label_task"][scored] = int(task)
    document["labels"][scored] = ids[scored.start + 1 : scored.stop + 1]


def make_batch(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one micro-batch."""
    seq_len = rows[0]["input_ids"].shape[0]
    batch = {
        name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in ("cu_seqlens", "pixel_values")
    }
    borders = [torch.zeros(1, dtype=torch.int32)]
    borders += [row["cu_seqlens"][1:] + number * seq_len for number, row in enumerate(rows)]
    batch["cu_seqlens"] = torch.cat(borders)
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    return batch


def batch_of(kinds: Sequence[str], seed: int = 0) -> dict[str, Tensor]:
    """A micro-batch with one row per string of document kinds."""
    generator = torch.Generator().manual_seed(seed)
    return make_batch([random_row(generator, row) for row in kinds])


ROWS_PER_STEP = (
    ("ugtu",) * 8,
    ("ugt", "ugt", "gut", "utg", "tgt", "tgt", "gtg", "ttg"),  # the second half has no image to understand
    ("ttt",) * 8,  # text only
    ("ggg", "gtg", "ggg", "ggg", "ttt", "ttt", "tt", "t"),  # nothing drawn in the second half
    ("uuu", "uu", "gu", "u", "gg", "g", "gug", "ugu"),
)
"""Document kinds of each row, step after step: the hard cases for dp ranks are in here."""


class TinyWorkload:
    """The tiny Janus on random rows; the global batch of a step is the same for any layout."""

    task_names = TASKS
    task_weights: dict[str, float] = {}  # noqa: RUF012
    seq_len = SEQ_LEN
    config_text = "name: tiny\n"

    def __init__(self, trainable: Iterable[Module], parallel: ParallelConfig, model: ModelConfig | None = None) -> None:
        self.model = model or tiny_model()
        self.parallel = parallel
        self.trainable = tuple(trainable)
        self.normalization = LossNormalization.per_token
        self.loss = LossConfig()
        self.seed = 0
        self.order = FixedOrder("tiny")

    def build(self, groups: ProcessGroups) -> BuiltModel:
        chunks = build_chunks(self.model, self.parallel, self.loss, groups.layout)
        for chunk in chunks:
            chunk.train_only(self.trainable)
        modules = {module.value: attribute for module, attribute in MODULE_ATTRIBUTES.items()}
        names = [module.value for module in self.trainable]
        return BuiltModel(chunks, modules, names, prepare_with(chunks[0], self.parallel))

    def initialize(self, shards: Iterable[ShardedParameter]) -> None:
        initialize(shards, self.model.backbone, self.seed)

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        for step in range(first_step, last_step):
            generator = torch.Generator().manual_seed(step + 1000 * self.seed)
            rows = [random_row(generator, kinds) for kinds in ROWS_PER_STEP[step % len(ROWS_PER_STEP)]]
            share = len(rows) // dp_size
            mine = rows[dp_rank * share : (dp_rank + 1) * share]
            size = self.parallel.micro_batch_size
            yield [make_batch(mine[i : i + size]) for i in range(0, share, size)]

    def place(self, batch: dict[str, Tensor], groups: ProcessGroups) -> PlacedBatch:
        return place_batch(batch, groups.device, compute_dtype(self.parallel))

    def count_labels(self, batch: dict[str, Tensor]) -> Tensor:
        return count_labels(batch)

    def denominators(self, global_counts: Tensor) -> Tensor:
        return task_denominators(global_counts, self.normalization)

    def measure(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {"tokens": int((batch["token_kind"] != TokenKind.pad).sum())}

    def flops(self, amounts: Mapping[str, int], label_counts: Mapping[str, int]) -> dict[str, float]:
        return {}

    def validation_sets(self, dp_rank: int, dp_size: int) -> Mapping[str, Callable[[], list[dict[str, Tensor]]]]:
        """The batches of two steps of training."""
        return {
            f"step_{step}": lambda step=step: next(self.batches(dp_rank, dp_size, step, step + 1)) for step in (0, 1)
        }

    def extra_files(self) -> dict[str, bytes | Path]:
        return {}


def tiny_recipe(run_dir: Path, parallel: ParallelConfig, last_step: int, **optimizer: Any) -> Recipe:
    """AdamW with weight decay, constant rate, and clipping at a norm that every step with gradients exceeds."""
    return Recipe(
        name="tiny",
        run_dir=run_dir,
        num_steps=100,
        last_step=last_step,
        global_batch_size=8,
        init_from="",
        parallel=parallel,
        optimizer=OptimizerConfig(**{"lr": 1e-3, "weight_decay": 0.1, "clip_grad_norm": 0.1, **optimizer}),
        logging=LoggingConfig(log_every=1, tensorboard=False),
        checkpoint=CheckpointConfig(),
    )


def fp32(tp_size: int = 1, pp_size: int = 1, **options: Any) -> ParallelConfig:
    """An fp32 layout with one row per micro-batch."""
    return ParallelConfig(tp_size=tp_size, pp_size=pp_size, precision=Precision.fp32, **options)
