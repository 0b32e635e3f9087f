"""Reading a checkpoint: names, shapes, and any box of any tensor, whatever layout wrote it.

Files are opened and verified when first touched, so a rank that needs a tenth of the bytes hashes and reads a tenth.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.format import (
    CONFIG_FILE,
    DTYPE_NAMES,
    INDEX_FILE,
    STATE_FILE,
    find_file_damage,
    read_manifest,
)
from janus_mega.checkpoint.state import TrainState
from janus_mega.parallel.slices import Box, Slice, assemble_box, group_by_name, index_of, intersect, whole

OPTIMIZER_PREFIX = "optimizer."
"""Names of optimizer tensors: `optimizer.<state>/<parameter name>`."""
RNG_PREFIX = "rng/"
"""Names of random generator states: `rng/<rank>/<name>`."""
EMA_PREFIX = "ema/"
"""Names of averaged weights: `ema/<parameter name>`."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class CheckpointReader:
    """One checkpoint directory. Its `read_box` is what `parallel.slices.fill_local` and `fill_range` take."""

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        """Opens a directory; see `open_checkpoint`."""
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self._verify = verify
        self._verified: set[str] = set()
        self._handles: dict[str, Any] = {}
        self._index: dict[str, Any] = self._load_json(INDEX_FILE)

    @property
    def step(self) -> int:
        """Optimizer steps completed when it was saved."""
        return int(self.manifest["step"])

    @property
    def names(self) -> list[str]:
        """All tensors: weights, optimizer, random generators."""
        return list(self._index)

    @property
    def weight_names(self) -> list[str]:
        """Tensors of the model itself."""
        return [name for name in self._index if not name.startswith((OPTIMIZER_PREFIX, RNG_PREFIX, EMA_PREFIX))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""
        return _DTYPES[self._entry(name)["dtype"]]

    def read_box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor, reading only the pieces that reach into it.

        Raises:
            UserError: no such tensor, or a file it lies in is damaged.
        """
        shape = self.shape(name)
        pieces = []
        for piece in self._entry(name)["pieces"]:
            common = intersect(Box(tuple(piece["offset"]), tuple(piece["shape"])), box)
            if common is not None:
                pieces.append(Slice(name, shape, common.offset, self._read_piece(piece, common)))
        if len(pieces) == 1 and pieces[0].box == box:
            return pieces[0].tensor
        if not pieces:
            return torch.empty(box.shape, dtype=self.dtype(name))
        return assemble_box(pieces, box)

    def fill(self, targets: Iterable[Slice]) -> None:
        """Writes into views, in place and cast to their format, what is saved there; reads a stored piece once.

        Raises:
            UserError: no such tensor, one of another shape, or a file it lies in is damaged.
        """
        for name, views in group_by_name(targets).items():
            if self.shape(name) != views[0].global_shape:
                raise UserError(
                    f"{self.directory}: {name} is {list(self.shape(name))}, the model has "
                    f"{list(views[0].global_shape)}; it was saved from another model"
                )
            for piece in self._entry(name)["pieces"]:
                box = Box(tuple(piece["offset"]), tuple(piece["shape"]))
                shared = [(view, common) for view in views if (common := intersect(view.box, box)) is not None]
                if shared:
                    content = self._read_piece(piece, box)
                    for view, common in shared:
                        view.tensor[index_of(common, view.offset)] = content[index_of(common, box.offset)].to(
                            view.tensor.device
                        )

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.read_box(name, whole(self.shape(name)))

    def read_bytes(self, name: str) -> bytes:
        """Content of a listed file, verified."""
        return self.path(name).read_bytes()

    def has_file(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest["files"]

    def path(self, name: str) -> Path:
        """Path of a listed file, verified.

        Raises:
            UserError: it is not listed or damaged.
        """
        if name not in self.manifest["files"]:
            raise UserError(f"{self.directory}: holds no {name}; save the checkpoint with it among its extra files")
        if self._verify and name not in self._verified:
            damage = find_file_damage(self.directory, self.manifest, name)
            if damage is not None:
                raise UserError(damage)
            self._verified.add(name)
        return self.directory / name

    def read_state(self, rank: int = 0) -> TrainState:
        """Where the run stands, with the generators' states of one rank (none for a rank that did not exist)."""
        fields = self._load_json(STATE_FILE)
        prefix = f"{RNG_PREFIX}{rank:05d}/"
        rng = {name.removeprefix(prefix): self.read(name) for name in self._index if name.startswith(prefix)}
        return TrainState(**fields, config_text=self.read_bytes(CONFIG_FILE).decode(), rng=rng)

    def _entry(self, name: str) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = self._index[name]
        except KeyError:
            raise UserError(f"{self.directory}: holds no tensor {name}; it was saved from another model") from None
        return entry

    def _load_json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.read_bytes(name))
        return content

    def _read_piece(self, piece: dict[str, Any], common: Box) -> Tensor:
        file = piece["file"]
        if file not in self._handles:
            self._handles[file] = safe_open(self.path(file), framework="pt")
        handle = self._handles[file]
        if list(common.shape) == piece["shape"]:
            return handle.get_tensor(piece["key"])
        return handle.get_slice(piece["key"])[index_of(common, piece["offset"])]


def open_checkpoint(directory: Path, *, verify: bool = True) -> CheckpointReader:
    """Opens a checkpoint for reading.

    Args:
        directory: a step directory.
        verify: hash every file when it is first touched.

    Raises:
        UserError: not a checkpoint, damaged, or of an unknown schema.
    """
    return CheckpointReader(directory, verify=verify)
