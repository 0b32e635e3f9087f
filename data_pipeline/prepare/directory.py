"""The directory that prepare fills: tasks that are done or not, then one manifest.

    prepare.json            what the command was told; another command may not continue here
    parts/000012.npy, .json index and facts of a finished task; the .json is written last and is its proof
    shards/000012.tar       the shard of that task
    index/, janus.json      written when all tasks are done; then parts/ and prepare.json go

A task is a fixed run of raw records. Everything is written aside and renamed, so a kill at any instant loses at most
the task at work, and doing it again gives the same bytes.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import sha256_of, write_aside
from data_pipeline.manifest import (
    DRAWING_COLUMNS,
    MANIFEST_NAME,
    SAMPLE_COLUMNS,
    ImageTokenizerEntry,
    Manifest,
    ShardEntry,
    parse_manifest,
)
from data_pipeline.prepare.shard import ROW_DTYPE, ShardWriter, npy_bytes

_SETTINGS_NAME = "prepare.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the manifest says about the kind of shards being written."""

    kind: str
    text_tokenizer: str
    token_dtype: str
    image_tokenizer: ImageTokenizerEntry | None = None
    template: str | None = None
    """Recorded if any shard says that it used it."""
    record_size: int = 0


class ShardDirectory:
    """Bookkeeping of one prepare command's output."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Begins or continues.

        Raises:
            UserError: The directory holds something else, or shards made with other settings.
        """
        self.path = path
        self.settings = settings
        self.manifest: Manifest | None = None
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST_NAME).exists():
            manifest = parse_manifest((path / MANIFEST_NAME).read_bytes(), path / MANIFEST_NAME)
            self._check_settings(manifest.settings)
            self.manifest = manifest
            self._remove_parts()
            return
        if (path / _SETTINGS_NAME).exists():
            self._check_settings(json.loads((path / _SETTINGS_NAME).read_bytes()))
        elif any(entry.name != f"{_SETTINGS_NAME}.tmp" for entry in path.iterdir()):
            raise UserError(f"{path}: the output directory is not empty and holds no shards; give a new directory")
        write_aside(path / _SETTINGS_NAME, json.dumps(settings, sort_keys=True).encode())
        for name in ("parts", "shards", "index"):
            (path / name).mkdir(exist_ok=True)

    def _check_settings(self, made_with: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.settings))
        for name in sorted(wanted.keys() | made_with.keys()):
            if wanted.get(name) != made_with.get(name):
                raise UserError(
                    f"{self.path}: its shards were made with {name} = {made_with.get(name)!r}, now it is "
                    f"{wanted.get(name)!r}; give a new output directory or delete this one"
                )

    def shard_path(self, task: int) -> Path:
        """Where a task's tar goes."""
        return self.path / "shards" / f"{task:06d}.tar"

    def is_done(self, task: int) -> bool:
        """Whether a task's tar and part of the index are there."""
        part = self.path / "parts" / f"{task:06d}.json"
        if not part.exists():
            return False
        facts = json.loads(part.read_bytes())
        tar = self.shard_path(task)
        return facts["bytes"] == (tar.stat().st_size if tar.exists() else 0)

    def commit(self, task: int, writer: ShardWriter) -> None:
        """Makes a finished task durable; a task without a sample leaves no tar."""
        num_samples = writer.num_samples
        rows = writer.finish()
        tar = self.shard_path(task)
        facts: dict[str, Any] = {"num_samples": num_samples, "rejects": dict(writer.rejects)}
        facts["uses_template"] = writer.uses_template
        if num_samples:
            facts |= {"bytes": tar.stat().st_size, "sha256": sha256_of(tar)}
        else:
            tar.unlink()
            facts |= {"bytes": 0, "sha256": ""}
        write_aside(self.path / "parts" / f"{task:06d}.npy", npy_bytes(rows))
        write_aside(self.path / "parts" / f"{task:06d}.json", json.dumps(facts, sort_keys=True).encode())

    def finish(self, num_tasks: int, facts: Facts) -> Manifest:
        """Joins the parts into index and manifest.

        Raises:
            UserError: Not a single sample came out.
        """
        rejects: Counter[str] = Counter()
        entries: list[ShardEntry] = []
        rows: list[np.ndarray] = [np.empty(0, ROW_DTYPE)]
        uses_template = False
        for task in range(num_tasks):
            part = json.loads((self.path / "parts" / f"{task:06d}.json").read_bytes())
            rejects.update(part["rejects"])
            uses_template |= part["uses_template"]
            if not part["num_samples"]:
                continue
            name = self.shard_path(task).name
            size, sha256, num_samples = part["bytes"], part["sha256"], part["num_samples"]
            entries.append(ShardEntry(name=name, bytes=size, sha256=sha256, num_samples=num_samples))
            rows.append(np.load(self.path / "parts" / f"{task:06d}.npy", allow_pickle=False))
        table = np.concatenate(rows)
        if not len(table):
            raise UserError(
                f"{self.path}: no usable record in the input (rejects: {dict(rejects)}); check the raw data"
            )
        columns = {name: table[name].astype(dtype) for name, dtype in SAMPLE_COLUMNS.items()}
        columns["uid"] = table["uid"].astype("<u8")
        columns["ptr"] = np.cumsum([0, *(entry.num_samples for entry in entries)], dtype="<i8")
        if facts.image_tokenizer is not None:
            columns |= {name: table[name].astype(dtype) for name, dtype in DRAWING_COLUMNS.items()}
        for name, column in columns.items():
            write_aside(self.path / "index" / f"{name}.npy", npy_bytes(column))
        self.manifest = Manifest(
            kind=facts.kind,
            num_samples=len(table),
            num_text_tokens=int(table["ntok"].sum(dtype=np.int64)),
            num_und_images=int(table["nund"].sum(dtype=np.int64)),
            num_gen_images=int(table["ngen"].sum(dtype=np.int64)),
            shards=tuple(entries),
            text_tokenizer=facts.text_tokenizer,
            token_dtype=facts.token_dtype,
            image_tokenizer=facts.image_tokenizer,
            template=facts.template if uses_template else None,
            record_size=facts.record_size,
            rejects=dict(sorted(rejects.items())),
            settings=self.settings,
            index={f"{name}.npy": sha256_of(self.path / "index" / f"{name}.npy") for name in sorted(columns)},
        )
        write_aside(self.path / MANIFEST_NAME, self.manifest.to_json())
        self._remove_parts()
        return self.manifest

    def _remove_parts(self) -> None:
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        (self.path / _SETTINGS_NAME).unlink(missing_ok=True)
