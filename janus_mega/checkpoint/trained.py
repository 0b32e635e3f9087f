"""A training checkpoint as a model: its configuration, tokenizers and weights under our global names.

What export and inference need besides tensors travels inside the checkpoint (`companion_files` says as what), so a
step directory alone can be exported or drawn with.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from data_pipeline.dialogue import DialogueBuilder, SpecialIds, special_ids
from data_pipeline.errors import UserError
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.load import load_text_tokenizer
from janus_mega.checkpoint.format import CONFIG_FILE, IMAGE_TOKENIZER_DIR, TEXT_TOKENIZER_DIR
from janus_mega.checkpoint.hf.names import IMAGE_TOKENIZER_PREFIX
from janus_mega.checkpoint.name_map import Heads
from janus_mega.checkpoint.reader import EMA_PREFIX, CheckpointReader, open_checkpoint
from janus_mega.checkpoint.tensor_file import damaged
from janus_mega.config import derive
from janus_mega.config.load import load_config
from janus_mega.config.schema import ModelConfig, RunConfig
from janus_mega.models.vision.image_tokenizer import (
    CONFIG_FILE as IMAGE_TOKENIZER_CONFIG,
)
from janus_mega.models.vision.image_tokenizer import WEIGHTS_FILE, FrozenImageTokenizer, load_image_tokenizer

_VOCABULARY_TENSORS = ("text_embedding.weight", "text_head.weight")


def companion_files(text_tokenizer: Path, image_tokenizer: Path) -> dict[str, Path]:
    """Extra files of a checkpoint by their name in it.

    Args:
        text_tokenizer: the file of the text tokenizer (`TextTokenizer.path`).
        image_tokenizer: directory of the image tokenizer.
    """
    files = {f"{IMAGE_TOKENIZER_DIR}/{name}": image_tokenizer / name for name in (IMAGE_TOKENIZER_CONFIG, WEIGHTS_FILE)}
    name = "tokenizer.json" if text_tokenizer.suffix == ".json" else "tokenizer.model"
    return {f"{TEXT_TOKENIZER_DIR}/{name}": text_tokenizer, **files}


def heads_of(model: ModelConfig) -> Heads:
    """The attention sizes that transforms of names maps ask for."""
    backbone = model.backbone
    return Heads(backbone.num_heads, backbone.num_kv_heads, derive.head_dim(backbone))


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint of a Janus; tensors and tokenizers are read when asked for, and verified then."""

    reader: CheckpointReader
    config: RunConfig
    averaged: bool = False
    """Whether weights are the moving average; those that never trained have none and are what they are."""

    @property
    def model(self) -> ModelConfig:
        """Architecture."""
        return self.config.model

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The text tokenizer that the data was prepared with."""
        names = [name for name in self.reader.manifest["files"] if name.startswith(f"{TEXT_TOKENIZER_DIR}/")]
        if len(names) != 1:
            raise UserError(
                f"{self.reader.directory}: holds {len(names)} files under {TEXT_TOKENIZER_DIR}/, one is needed; "
                "save checkpoints with their companion files"
            )
        tokenizer = load_text_tokenizer(self.reader.path(names[0]))
        if tokenizer.digest != self.reader.sha256(names[0]):  # it hashes the bytes that it reads
            raise damaged(tokenizer.path, "bytes do not match the manifest's SHA-256")
        return tokenizer

    @cached_property
    def image_tokenizer(self) -> FrozenImageTokenizer:
        """The image tokenizer whose ids the model draws."""
        names = (IMAGE_TOKENIZER_CONFIG, WEIGHTS_FILE)
        digests = {name: self.reader.sha256(f"{IMAGE_TOKENIZER_DIR}/{name}") for name in names}
        return load_image_tokenizer(self.reader.directory / IMAGE_TOKENIZER_DIR, digests=digests)

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Ids of the special tokens."""
        return special_ids(self.text_tokenizer)

    @cached_property
    def dialogue(self) -> DialogueBuilder:
        """Prompts and documents as they were in training."""
        return DialogueBuilder(self.text_tokenizer, self.config.data.template, derive.image_geometry(self.model))

    @cached_property
    def _image_tokenizer_weights(self) -> dict[str, Tensor]:
        return {f"{IMAGE_TOKENIZER_PREFIX}{name}": x for name, x in self.image_tokenizer.model.state_dict().items()}

    @property
    def names(self) -> Iterable[str]:
        """All weights by global name, the image tokenizer's under its prefix."""
        return [*self.reader.weight_names, *self._image_tokenizer_weights]

    def read(self, name: str) -> Tensor:
        """One whole weight; rows that only padded the vocabulary are cut off."""
        if name.startswith(IMAGE_TOKENIZER_PREFIX):
            return self._image_tokenizer_weights[name]
        average = EMA_PREFIX + name
        tensor = self.reader.read(average if self.averaged and average in self.reader.names else name)
        return tensor[: self.model.backbone.vocab_size] if name in _VOCABULARY_TENSORS else tensor


def open_trained(directory: Path, *, averaged: bool = False) -> TrainedModel:
    """Opens a step directory of a Janus run.

    Args:
        directory: the checkpoint.
        averaged: give the moving average of the weights.

    Raises:
        UserError: not a checkpoint, damaged, of another kind of run, or without an average that is asked for.
    """
    reader = open_checkpoint(Path(directory))
    if averaged and not any(name.startswith(EMA_PREFIX) for name in reader.names):
        raise UserError(
            f"{directory}: holds no average of the weights; train with optimizer.ema_decay, or leave --ema out"
        )
    return TrainedModel(reader, _config_of(reader), averaged)


def _config_of(reader: CheckpointReader) -> RunConfig:
    """The configuration, from a private copy of the bytes that were verified."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / CONFIG_FILE
        copy.write_bytes(reader.read_bytes(CONFIG_FILE))
        try:
            return load_config(RunConfig, copy).config
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(reader.directory / CONFIG_FILE))) from None
