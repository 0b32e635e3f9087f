"""The directory that prepare fills: tasks that are done or not, then one manifest.

    prepare.json            what the command was told; another command may not continue here
    parts/000012.npy, .json index and facts of a finished task; the .json is written last and is its proof
    shards/000012.tar       the shard of that task
    index/, janus.json      written when all tasks are done; then parts/ and prepare.json go

A task is a fixed slice of the raw records, so its bytes depend on nothing else. Everything is written aside, under a
name that carries the process, and renamed: a kill at any instant loses at most the task at work, and doing it again
gives the same bytes. No lock is needed: processes that do the same task, or that finish the directory at the same time,
replace equal files by equal files, and who finds its half-written file removed has lost to one that was done.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from data_pipeline.prepare.asides import aside_of, is_aside, remove_asides, remove_dead_asides
from data_pipeline.prepare.inputs import InputEntry, check_inputs, inputs_setting
from data_pipeline.prepare.join import join_parts
from data_pipeline.prepare.meta import META_DIR, Meta, join_meta, meta_table
from data_pipeline.prepare.shard import npy_bytes

_SETTINGS_NAME = "prepare.json"
_ROOMS = ("parts", "shards", "index")
_WRITTEN_IN = (".", *_ROOMS, f"index/{META_DIR}")
"""Where something half-written can lie."""


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


class TaskOutput(Protocol):
    """What a task has made: a shard by its writer, or the index of a tar that was there."""

    rejects: Counter[str]
    uses_template: bool
    metas: list[Meta]

    @property
    def num_samples(self) -> int:
        """Samples of the task."""
        ...

    def finish(self) -> np.ndarray:
        """Makes its tar real; returns its index rows, ROW_DTYPE [samples]."""
        ...

    def abandon(self) -> None:
        """Drops what was written, unless it has been finished."""
        ...


class ShardDirectory:
    """Bookkeeping of one prepare command's output."""

    def __init__(
        self, path: Path, settings: dict[str, Any], inputs: Sequence[InputEntry] = (), preprocessing: str = ""
    ) -> None:
        """Begins or continues.

        Args:
            path: The directory.
            settings: All that the bytes depend on besides the inputs, ready for JSON.
            inputs: The raw files.
            preprocessing: Versions of what works on pictures; must not change before the directory is finished.

        Raises:
            UserError: The directory holds something else, or shards made of other inputs or with other settings.
        """
        self.path = path
        self.settings = json.loads(json.dumps(settings)) | ({"inputs": inputs_setting(inputs)} if inputs else {})
        self._inputs = [list(entry) for entry in inputs]
        self._preprocessing = preprocessing
        path.mkdir(parents=True, exist_ok=True)
        while self.read_manifest() is None and not self._claim():
            pass  # another process began or finished it in between: look again
        self.remove_leftovers()
        manifest = self.read_manifest()
        if manifest is not None:
            self._check_finished(manifest)
            self._clean()

    def _claim(self) -> bool:
        """Begins the directory or checks that it was begun by this command; False if it changed under our eyes."""
        told = self.path / _SETTINGS_NAME
        try:
            self._check_begun(json.loads(told.read_bytes()))
        except FileNotFoundError:
            strangers = [name for name in os.listdir(self.path) if not is_aside(name)]
            if _SETTINGS_NAME in strangers or MANIFEST_NAME in strangers:
                return False
            if strangers:
                raise UserError(
                    f"{self.path}: the output directory is not empty and holds no shards ({strangers[0]!r}); give a "
                    "new directory"
                ) from None
            content = {"settings": self.settings, "inputs": self._inputs, "preprocessing": self._preprocessing}
            self._write(told, json.dumps(content, sort_keys=True).encode())
        for room in _ROOMS:
            (self.path / room).mkdir(exist_ok=True)
        return True

    def _check_begun(self, told: dict[str, Any]) -> None:
        self._check_settings(told["settings"])
        check_inputs(told["inputs"], self._inputs, self.path)
        if told["preprocessing"] != self._preprocessing:
            raise UserError(
                f"{self.path}: its shards were begun with {told['preprocessing']!r}, now it is "
                f"{self._preprocessing!r}; continue with the versions of then, or give a new output directory"
            )

    def _check_finished(self, manifest: Manifest) -> None:
        self._check_settings(manifest.settings)
        check_inputs(manifest.settings.get("inputs"), self.settings.get("inputs"), self.path)

    def _check_settings(self, made_with: dict[str, Any]) -> None:
        for name in sorted((self.settings.keys() | made_with.keys()) - {"inputs"}):
            if self.settings.get(name) != made_with.get(name):
                raise UserError(
                    f"{self.path}: its shards were made with {name} = {made_with.get(name)!r}, now it is "
                    f"{self.settings.get(name)!r}; give a new output directory or delete this one"
                )

    def read_manifest(self) -> Manifest | None:
        """The manifest, once the directory is finished."""
        path = self.path / MANIFEST_NAME
        try:
            return parse_manifest(path.read_bytes(), path)
        except FileNotFoundError:
            return None

    def remove_leftovers(self) -> None:
        """Removes what processes of this machine that are no more have left half-written."""
        for room in _WRITTEN_IN:
            remove_dead_asides(self.path / room)

    def shard_path(self, task: int) -> Path:
        """Where a task's tar goes."""
        return self.path / "shards" / f"{task:06d}.tar"

    def done_tasks(self) -> set[int]:
        """Numbers of the finished tasks, from one listing of the parts; empty once the directory is finished."""
        with suppress(FileNotFoundError):
            names = os.listdir(self.path / "parts")
            return {int(name.removesuffix(".json")) for name in names if name.endswith(".json")}
        return set()

    def is_done(self, task: int) -> bool:
        """Whether a task's facts are there, and fit its tar and this command."""
        try:
            self._read_part(task)
        except (FileNotFoundError, UserError):
            return False
        return self._part_path(task, ".npy").exists()

    def commit(self, task: int, writer: TaskOutput) -> None:
        """Makes a finished task durable; a task without a sample leaves no tar.

        Raises:
            UserError: Somebody removed what it had written, and nobody has finished this task instead.
        """
        tar, num_samples = self.shard_path(task), writer.num_samples
        facts: dict[str, Any] = {"num_samples": num_samples, "rejects": dict(writer.rejects)}
        facts |= {"uses_template": writer.uses_template, "settings": self._settings_digest()}
        try:
            rows = writer.finish()
            facts |= {"bytes": tar.stat().st_size, "sha256": sha256_of(tar)} if num_samples else {"bytes": 0}
            self._write(self._part_path(task, ".npy"), npy_bytes(rows))
            self._write(self._part_path(task, ".meta.npy"), npy_bytes(meta_table(writer.metas)))
            self._write(self._part_path(task, ".json"), json.dumps(facts, sort_keys=True).encode())
        except FileNotFoundError as error:
            writer.abandon()
            if self.read_manifest() is None and not self.is_done(task):
                raise UserError(
                    f"{error.filename}: removed while it was written; run the same command again, and let nothing else "
                    "work in this directory"
                ) from error

    def finish(self, num_tasks: int, facts: Facts) -> Manifest:
        """Joins the parts into index and manifest; any number of processes may do it at the same time.

        Raises:
            UserError: Not a single sample came out, or a part does not fit its shard.
        """
        manifest = self.read_manifest()
        if manifest is None:
            try:
                manifest = self._join(num_tasks, facts)
                self._write(self.path / MANIFEST_NAME, manifest.to_json())
            except FileNotFoundError as error:
                manifest = self.read_manifest()
                if manifest is None:
                    raise UserError(
                        f"{error.filename}: missing although its task was done; run the same command again"
                    ) from error
        self._clean()
        return manifest

    def _join(self, num_tasks: int, facts: Facts) -> Manifest:
        """Writes the index; returns the manifest to write."""
        rejects: Counter[str] = Counter()
        entries: list[ShardEntry] = []
        parts: list[Path] = []
        metas: list[Path] = []
        uses_template = False
        for task in range(num_tasks):
            part = self._read_part(task)
            rejects.update(part["rejects"])
            uses_template |= part["uses_template"]
            if not part["num_samples"]:
                continue
            fields = {name: part[name] for name in ("bytes", "sha256", "num_samples")}
            entries.append(ShardEntry(name=self.shard_path(task).name, **fields))
            parts.append(self._part_path(task, ".npy"))
            metas.append(self._part_path(task, ".meta.npy"))
        if not entries:
            raise UserError(
                f"{self.path}: no usable record in the input (rejects: {dict(rejects)}); check the raw data"
            )
        columns = SAMPLE_COLUMNS | {"uid": "<u8"} | (DRAWING_COLUMNS if facts.image_tokenizer is not None else {})
        num_samples = [entry.num_samples for entry in entries]
        index = join_parts(parts, num_samples, self.path / "index", columns, ("ntok", "nund", "ngen"))
        index.sha256 |= join_meta(metas, num_samples, self.path / "index")
        return Manifest(
            kind=facts.kind,
            num_samples=sum(num_samples),
            num_text_tokens=index.totals["ntok"],
            num_und_images=index.totals["nund"],
            num_gen_images=index.totals["ngen"],
            shards=tuple(entries),
            text_tokenizer=facts.text_tokenizer,
            token_dtype=facts.token_dtype,
            image_tokenizer=facts.image_tokenizer,
            template=facts.template if uses_template else None,
            record_size=facts.record_size,
            rejects=dict(sorted(rejects.items())),
            settings=self.settings,
            index=index.sha256,
        )

    def _read_part(self, task: int) -> dict[str, Any]:
        """Facts of a finished task.

        Raises:
            UserError: Its tar is not there in full, or it was made by another command.
            FileNotFoundError: The task is not done, or another process has finished the directory.
        """
        path, tar = self._part_path(task, ".json"), self.shard_path(task)
        facts = json.loads(path.read_bytes())
        size = tar.stat().st_size if tar.exists() else 0
        if facts["settings"] != self._settings_digest():
            raise UserError(f"{path}: made by another command in the same directory; give a new output directory")
        if facts["num_samples"] and size != facts["bytes"]:
            raise UserError(f"{tar}: has {size} bytes instead of {facts['bytes']}; run the same command again")
        return facts

    def _part_path(self, task: int, suffix: str) -> Path:
        """Where a task's part of the index (.npy) or its facts (.json) go."""
        return self.path / "parts" / f"{task:06d}{suffix}"

    def _clean(self) -> None:
        """Removes what is of no use once there is a manifest."""
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        (self.path / _SETTINGS_NAME).unlink(missing_ok=True)
        for room in _WRITTEN_IN:
            remove_asides(self.path / room)

    def _settings_digest(self) -> str:
        content = [self.settings, self._inputs, self._preprocessing]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _write(self, path: Path, content: bytes) -> None:
        write_aside(path, content, aside_of(path))
