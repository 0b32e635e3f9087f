"""Reading a checkpoint: names, shapes, and any box of any tensor, whatever layout wrote it.

What is given out are the bytes that were compared with a digest, never a second reading of the file. Each stored piece
has a digest of its own, so a rank that needs a tenth of the bytes hashes and reads a tenth. Memory is the wanted box
and one piece.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.format import (
    CONFIG_FILE,
    STATE_FILE,
    check_file,
    read_index,
    read_listed,
    read_manifest,
)
from janus_mega.checkpoint.index import Entry, Piece
from janus_mega.checkpoint.state import TrainState
from janus_mega.checkpoint.tensor_file import TensorFile, damaged
from janus_mega.parallel.slices import Box, Slice, group_by_name, index_of, intersect, whole

OPTIMIZER_PREFIX = "optimizer."
"""Names of optimizer tensors: `optimizer.<state>/<parameter name>`."""
RNG_PREFIX = "rng/"
"""Names of random generator states: `rng/<rank>/<name>`."""
EMA_PREFIX = "ema/"
"""Names of averaged weights: `ema/<parameter name>`."""


class CheckpointReader:
    """One checkpoint directory. Its `read_box` is what `parallel.slices.fill_local` and `fill_range` take."""

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        """Opens a directory; see `open_checkpoint`."""
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self._verify = verify
        self._verified: set[str] = set()
        self._index = read_index(self.directory, self.manifest, verify=verify)
        self._files: dict[str, tuple[TensorFile, dict[str, bytes]]] = {}
        self._last: tuple[Piece, Tensor] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps completed when it was saved."""
        return int(self.manifest["step"])

    @property
    def names(self) -> list[str]:
        """All tensors: weights, optimizer, random generators."""
        return list(self._index.entries)

    @property
    def weight_names(self) -> list[str]:
        """Tensors of the model itself."""
        return [name for name in self._index.entries if not name.startswith((OPTIMIZER_PREFIX, RNG_PREFIX, EMA_PREFIX))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""
        return self._entry(name).dtype

    def read_box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor, reading only the pieces that reach into it.

        Raises:
            UserError: no such tensor, or a file it lies in is damaged.
        """
        entry = self._entry(name)
        shared = [(piece, intersect(piece.box, box)) for piece in entry.pieces]
        found = [(piece, common) for piece, common in shared if common is not None]
        if sum(common.numel for _, common in found) != box.numel:
            raise ValueError(f"{name}: {box} reaches beyond the shape {list(entry.shape)}")
        if len(found) == 1 and found[0][0].box == box:
            return self._read_piece(found[0][0])
        content = torch.empty(box.shape, dtype=entry.dtype)
        for piece, common in found:
            stored = self._read_piece(piece, keep=True)
            content[index_of(common, box.offset)] = stored[index_of(common, piece.box.offset)]
        return content

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
            for piece in self._entry(name).pieces:
                box = piece.box
                shared = [(view, common) for view in views if (common := intersect(view.box, box)) is not None]
                if shared:
                    content = self._read_piece(piece)
                    for view, common in shared:
                        part = content[index_of(common, box.offset)]
                        view.tensor[index_of(common, view.offset)] = part.to(view.tensor.device)
                    del content, part  # before the next is read: one piece at a time

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.read_box(name, whole(self.shape(name)))

    def read_bytes(self, name: str) -> bytes:
        """Content of a listed file, verified."""
        self._refuse_unlisted(name)
        return read_listed(self.directory, self.manifest, name, verify=self._verify)

    def has_file(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest["files"]

    def sha256(self, name: str) -> str:
        """Digest of a listed file that holds no tensors, hex; UserError if it is not listed."""
        self._refuse_unlisted(name)
        digest: str = self.manifest["files"][name]["sha256"]
        return digest

    def path(self, name: str) -> Path:
        """Path of a listed file, verified; what is read there later is the caller's to compare.

        Raises:
            UserError: it is not listed or damaged.
        """
        self._refuse_unlisted(name)
        if self._verify and name not in self._verified:
            check_file(self.directory, self.manifest, name)
            self._verified.add(name)
        return self.directory / name

    def read_state(self, rank: int = 0) -> TrainState:
        """Where the run stands, with the generators' states of one rank (none for a rank that did not exist)."""
        config_text = self.read_bytes(CONFIG_FILE).decode()
        try:
            fields = json.loads(self.read_bytes(STATE_FILE))
            state = TrainState(**fields, config_text=config_text)
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise damaged(self.directory / STATE_FILE, f"not the state of a run ({error})") from None
        prefix = f"{RNG_PREFIX}{rank:05d}/"
        rng = {name.removeprefix(prefix): self.read(name) for name in self.names if name.startswith(prefix)}
        return replace(state, rng=rng)

    def _refuse_unlisted(self, name: str) -> None:
        if name not in self.manifest["files"]:
            raise UserError(f"{self.directory}: holds no {name}; save the checkpoint with it among its extra files")

    def _entry(self, name: str) -> Entry:
        try:
            return self._index.covered(name)
        except KeyError:
            raise UserError(f"{self.directory}: holds no tensor {name}; it was saved from another model") from None

    def _read_piece(self, piece: Piece, *, keep: bool = False) -> Tensor:
        """A stored piece as a whole; with `keep` it is the caller's to read only, and at hand if it is asked for next.

        Ranges of a flat optimizer become several boxes of one piece, which is not read and hashed for each.
        """
        if self._last is not None and self._last[0] is piece:
            content = self._last[1]
        else:
            self._last = None  # before the next is read: one piece at a time
            if piece.file not in self._files:
                self._files[piece.file] = self._index.open_file(piece.file, verify=self._verify)
            file, digests = self._files[piece.file]
            content = file.read(piece.key, digests[piece.key] if self._verify else None)
        self._last = (piece, content) if keep else None
        return content


def open_checkpoint(directory: Path, *, verify: bool = True) -> CheckpointReader:
    """Opens a checkpoint for reading.

    Args:
        directory: a step directory.
        verify: compare what is read with its digest.

    Raises:
        UserError: not a checkpoint, damaged, or of an unknown schema.
    """
    return CheckpointReader(directory, verify=verify)
