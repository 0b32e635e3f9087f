"""What a plan depends on, as JSON values: the sources by their digests, and every number that changes a batch.

The digest of it stands in checkpoints. Paths, worker counts and caches are left out, because they change nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from data_pipeline.plan.documents import PlanSource
from data_pipeline.schema import SCHEMA_VERSION
from data_pipeline.spec import Captions, DataSpec

PLAN_VERSION = 3
"""Raised whenever equal inputs give another plan than before."""


def identity_of(spec: DataSpec, sources: Sequence[PlanSource], global_batch_size: int) -> dict[str, Any]:
    """All that a batch depends on; two plans differ where their identities do."""
    return {
        "plan_version": PLAN_VERSION,
        "schema_version": SCHEMA_VERSION,
        "seed": spec.seed,
        "seq_len": spec.seq_len,
        "window_rows": -(-spec.window_rows // global_batch_size) * global_batch_size,
        "global_batch_size": global_batch_size,
        "ratio_unit": spec.ratio_unit.value,
        "temperature": spec.temperature,
        "schedule_unit": spec.schedule_unit.value,
        "guidance_dropout": spec.guidance_dropout,
        "template": spec.template.value,
        "geometry": asdict(spec.geometry),
        "sources": [_identity_of_source(source) for source in sources],
    }


def digest_of(identity: dict[str, Any]) -> str:
    """sha256 of an identity, hex."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _identity_of_source(source: PlanSource) -> dict[str, Any]:
    has_choice = source.captions is Captions.one and source.caption_number is not None
    return {
        "name": source.name,
        "digest": source.digest,
        "task": source.task.value,
        "weight": source.weight,
        "schedule": [{"at": point.at, "weight": point.weight, "shape": point.shape.value} for point in source.schedule],
        "max_epochs": source.max_epochs,
        "on_exhausted": source.on_exhausted.value,
        "captions": source.captions.value,
        "caption_numbers": _hash_of(source.caption_number, np.uint8) if has_choice else "",
        "samples": len(source.lengths),
        "lengths": _hash_of(source.lengths, np.int32),
        "images": _hash_of(source.num_images, np.uint8),
        "can_cut": source.can_cut,
        "masks": dict(sorted(source.masks.items())),
        "samples_left_out": 0 if source.left_out is None else int(source.left_out.sum()),
        "left_out": "" if source.left_out is None or not source.left_out.any() else _hash_of(source.left_out, np.uint8),
    }


def _hash_of(values: np.ndarray | None, dtype: type) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype).tobytes()).hexdigest()
