"""A trained image tokenizer as a frozen tool: uint8 pictures to ids and back, and its directory on disk.

A directory holds `model.safetensors` (state-dict names of the published VQ-16, fp32) and `config.json`, written last,
which names the hash of the weights: a directory without it, or with another hash, is refused. Rows of the codebook are
stored at unit length. Ids and pictures do not depend on these lengths here, but readers that forget to scale (the
transformers library when it encodes) then find the same ids.

The digest covers what ids depend on, the tensors and the picture's size, not the file around them, so it survives a
conversion to another layout.

Shapes: `n` pictures, `t` ids of one (num_tokens), side = image_size.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.files import sha256_of, write_aside
from janus_mega.config import derive
from janus_mega.config.schema import ImageTokenizerConfig
from janus_mega.config.validate_model import image_tokenizer_rules
from janus_mega.models.vision.siglip import normalize_pixels
from janus_mega.models.vision.vq import PIXEL_CHANNELS, VqModel, unit
from janus_mega.parallel.platform import device_of_rank

FORMAT = "janus-image-tokenizer/1"
"""Marks a directory's config.json; another major version is refused."""
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CODEBOOK = "quantize.embedding.weight"
UNIT_TOLERANCE = 1e-6
"""Rows this close to unit length are left as they are, so that loading and saving again changes no bit."""
MAX_BATCH = 64
"""Pictures that run at a time at most."""
BATCH_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""What the widest features of a batch may take, by type of device."""
LIVE_FEATURES = 6
"""Feature maps of the input's size that a forward pass holds at a time, workspace of the convolutions included."""


class FrozenImageTokenizer:
    """The `ImageTokenizer` of data preparation and of drawing: numpy in, numpy out, fixed weights in fp32.

    One that was loaded from a directory pickles as its path: another process loads it onto the device of its own rank.
    """

    def __init__(self, model: VqModel, config: ImageTokenizerConfig, batch_size: int | None = None) -> None:
        """Take over `model` (frozen in place, codes scaled to unit length).

        Args:
            model: the network, on its device.
            config: its sizes.
            batch_size: pictures that run at a time; default: what suits the network's width and the device.
        """
        self.config = config
        self.image_size = config.image_size
        self.codebook_size = config.codebook_size
        self.num_tokens = derive.generation_tokens(config)
        self.model = model.float().eval().requires_grad_(False)
        codebook = self.model.quantize.embedding.weight
        codebook.copy_(with_unit_rows(codebook))
        self.digest = tokenizer_digest(model.state_dict(), config.image_size)
        self._device = model.quant_conv.weight.device
        self._batch_size = batch_size or pictures_at_once(config, self._device)
        self._path: Path | None = None

    def __reduce__(self) -> Any:
        if self._path is None:
            return FrozenImageTokenizer, (self.model, self.config, self._batch_size)
        return _load_again, (self._path,)

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Ids uint16 [n, t] in raster order of pictures uint8 [n, 3, side, side].

        Raises:
            UserError: other shape or dtype.
        """
        expected = (PIXEL_CHANNELS, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
            raise UserError(
                f"the image tokenizer got {images.dtype} pictures of shape {images.shape}; it encodes uint8 "
                f"[n, {expected[0]}, {expected[1]}, {expected[2]}]: crop pictures to its image_size first"
            )
        ids = np.empty((len(images), self.num_tokens), np.uint16)
        for start in range(0, len(images), self._batch_size):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + self._batch_size]))
            found = self.model.encode(normalize_pixels(part.to(self._device)))
            ids[start : start + len(part)] = found.cpu().numpy().astype(np.uint16)
        return ids

    @torch.no_grad()
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Pictures uint8 [n, 3, side, side] of ids [n, t] (any integer dtype, raster order).

        Raises:
            UserError: other shape, or an id outside the codebook.
        """
        if ids.ndim != 2 or ids.shape[1] != self.num_tokens:
            raise UserError(f"the image tokenizer got ids of shape {ids.shape}; one picture has {self.num_tokens} ids")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
            raise UserError(
                f"the image tokenizer got ids from {ids.min()} to {ids.max()}; its codebook has {self.codebook_size} "
                "codes: were the ids written by another tokenizer?"
            )
        images = np.empty((len(ids), PIXEL_CHANNELS, self.image_size, self.image_size), np.uint8)
        for start in range(0, len(ids), self._batch_size):
            part = torch.from_numpy(ids[start : start + self._batch_size].astype(np.int64))
            images[start : start + len(part)] = to_uint8(self.model.decode(part.to(self._device))).cpu().numpy()
        return images


def pictures_at_once(config: ImageTokenizerConfig, device: torch.device) -> int:
    """How many pictures to encode at a time: as many as memory for the widest features allows, a power of two."""
    picture_bytes = LIVE_FEATURES * 4 * config.base_channels * config.image_size**2
    fitting = max(1, BATCH_BYTES.get(device.type, BATCH_BYTES["cpu"]) // picture_bytes)
    return min(MAX_BATCH, 1 << (fitting.bit_length() - 1))


def encoding_device() -> torch.device:
    """The device that this process encodes on: the GPU of its local rank (counted around), else the CPU."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return device_of_rank(int(os.environ.get("LOCAL_RANK", "0")) % max(num_devices, 1))


def to_uint8(pixels: Tensor) -> Tensor:
    """Map [-1, 1] to uint8 0..255, rounding to nearest and clipping; any shape."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def build_vq(config: ImageTokenizerConfig, weights: Mapping[str, Tensor]) -> VqModel:
    """Build the network on the CPU in fp32 from named weights.

    Raises:
        UserError: the sizes break a rule, or names or shapes of the weights are not those of the config.
    """
    for broken in image_tokenizer_rules(config, "image_tokenizer"):
        raise UserError(broken)
    with torch.device("meta"):
        model = VqModel(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name in sorted(expected.keys() ^ weights.keys()):
        state = "is missing" if name in expected else "belongs to no part of this network"
        raise UserError(f"image tokenizer weights: {name} {state}; the weights do not fit the image_tokenizer config")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(
                f"image tokenizer weights: {name} has shape {tuple(weights[name].shape)}, the image_tokenizer config "
                f"asks for {tuple(shape)}"
            )
    model.load_state_dict({name: value.detach().float() for name, value in weights.items()}, assign=True)
    return model


def save_image_tokenizer(model: VqModel, config: ImageTokenizerConfig, path: Path) -> None:
    """Write the directory `path` (created, or its tokenizer replaced): weights first, the config that vouches last."""
    weights = {name: value.detach().float().cpu().contiguous() for name, value in model.state_dict().items()}
    weights[CODEBOOK] = with_unit_rows(weights[CODEBOOK])
    path.mkdir(parents=True, exist_ok=True)
    write_aside(path / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    content = {
        "format": FORMAT,
        "image_tokenizer": dataclasses.asdict(config),
        "weights_sha256": sha256_of(path / WEIGHTS_FILE),
        "digest": tokenizer_digest(weights, config.image_size),
    }
    write_aside(path / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _load_again(path: Path) -> FrozenImageTokenizer:
    """What a pickled tokenizer becomes: loaded anew, onto the device of the process that unpickles it."""
    return load_image_tokenizer(path, encoding_device())


def load_image_tokenizer(
    path: Path,
    device: torch.device | None = None,
    batch_size: int | None = None,
    digests: Mapping[str, str] | None = None,
) -> FrozenImageTokenizer:
    """Load a directory that `save_image_tokenizer` wrote, onto `device` (default CPU).

    Each file is read once, and what is loaded are the bytes that were compared.

    Args:
        path: the directory.
        device: where the weights go.
        batch_size: pictures that run at a time, by default as many as memory is meant for.
        digests: sha256 (hex) by file name, where somebody else vouches for the files.

    Raises:
        UserError: a file is missing, of another format, or not what the config or `digests` vouch for.
    """
    path, digests = Path(path), digests or {}
    content = _read_config(path / CONFIG_FILE, digests.get(CONFIG_FILE))
    config = _tokenizer_config(path / CONFIG_FILE, content.get("image_tokenizer"))
    weights_path = path / WEIGHTS_FILE
    if not weights_path.is_file():
        raise UserError(f"{weights_path} is missing; train the image tokenizer again or copy its whole directory")
    weights = weights_path.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != content.get("weights_sha256"):
        raise UserError(
            f"{weights_path} is not the file that {CONFIG_FILE} beside it vouches for (sha256 differs); copy both again"
        )
    _check_digest(weights_path, found, digests.get(WEIGHTS_FILE))
    model = build_vq(config, load(weights))
    tokenizer = FrozenImageTokenizer(model.to(device or torch.device("cpu")), config, batch_size)
    tokenizer._path = path
    return tokenizer


def _check_digest(path: Path, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise UserError(f"{path} is not the file that it was (sha256 differs); copy the directory again")


def tokenizer_digest(weights: Mapping[str, Tensor], image_size: int) -> str:
    """sha256 (hex) over the picture's size and every tensor's name, shape and fp32 values, in order of names."""
    digest = hashlib.sha256(f"image_size {image_size}\n".encode())
    for name in sorted(weights):
        value = weights[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def with_unit_rows(codebook: Tensor) -> Tensor:
    """The codebook [v, d] with rows of unit length; a row that already has it keeps its bits."""
    is_unit = (codebook.norm(dim=-1, keepdim=True) - 1.0).abs() < UNIT_TOLERANCE
    return torch.where(is_unit, codebook, unit(codebook)).contiguous()


def _read_config(path: Path, digest: str | None) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} is not an image tokenizer's directory, or is half-written")
    raw = path.read_bytes()
    _check_digest(path, hashlib.sha256(raw).hexdigest(), digest)
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy the directory again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format {found!r} is not {FORMAT!r}; this version reads no other")
    return content


def _tokenizer_config(path: Path, fields: Any) -> ImageTokenizerConfig:
    known = {field.name for field in dataclasses.fields(ImageTokenizerConfig)}
    if not isinstance(fields, dict) or not set(fields) <= known:
        strange = sorted(set(fields) - known) if isinstance(fields, dict) else [str(fields)]
        raise UserError(f"{path}: image_tokenizer has unknown fields {strange}; it was written by another version")
    return ImageTokenizerConfig(**fields)
