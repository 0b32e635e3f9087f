"""From a data spec to a plan over real sources: opens them, checks them against the spec, asks for their lengths."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.dialogue import DialogueBuilder
from data_pipeline.errors import UserError
from data_pipeline.manifest import Source, open_source
from data_pipeline.masks.store import mask_digest, read_masks
from data_pipeline.plan.documents import PlanSource
from data_pipeline.plan.plan import Plan, compile_plan
from data_pipeline.plan.schedule import WeightCurve
from data_pipeline.spec import DataSpec, SourceSpec, Task
from data_pipeline.text.interface import TextTokenizer

TASKS_OF_KIND = {
    "text": (Task.text,),
    "interleaved": (Task.understanding, Task.text),
    "t2i": (Task.generation,),
}
"""Which losses documents of a kind can feed: image ids are drawn, everything else is read."""


@dataclass(frozen=True, slots=True)
class OpenData:
    """A compiled plan with what it takes to read its rows; pickles, so worker processes open the same."""

    spec: DataSpec
    plan: Plan
    sources: tuple[Source, ...]
    """In the order of `plan.sources`."""
    builder: DialogueBuilder


def open_data(spec: DataSpec, tokenizer: TextTokenizer, *, global_batch_size: int) -> OpenData:
    """Opens the sources that ever have weight and compiles the plan over them. Reads no sample.

    Raises:
        UserError: As `open_sources`, or a document does not fit into a row.
    """
    builder, opened, plan_sources = open_sources(spec, tokenizer)
    plan = compile_plan(spec, plan_sources, global_batch_size=global_batch_size)
    return OpenData(spec, plan, tuple(opened[source.name] for source in plan.sources), builder)


def open_sources(
    spec: DataSpec, tokenizer: TextTokenizer
) -> tuple[DialogueBuilder, dict[str, Source], list[PlanSource]]:
    """Opens the sources that ever have weight: what builds documents, the sources by name, and as the plan sees them.

    Raises:
        UserError: A source is missing, damaged or empty, was prepared for another tokenizer, template or geometry,
            cannot feed its task, or lacks a mask that is named.
    """
    builder = DialogueBuilder(tokenizer, spec.template, spec.geometry)
    opened: dict[str, Source] = {}
    plan_sources = []
    for name, source_spec in spec.sources.items():
        if not WeightCurve(source_spec.weight, tuple(source_spec.schedule)).is_used:
            continue
        source = opened[name] = open_source(source_spec.path)
        plan_sources.append(_plan_source(name, source_spec, source, builder))
    return builder, opened, plan_sources


def _plan_source(name: str, spec: SourceSpec, source: Source, builder: DialogueBuilder) -> PlanSource:
    """What the plan needs of one source."""
    allowed = TASKS_OF_KIND[source.kind]
    if spec.task not in allowed:
        raise UserError(
            f"data.sources.{name}.task={spec.task.value}: {spec.path} is of kind {source.kind}, which feeds "
            f"{' or '.join(task.value for task in allowed)}; change the task or the path"
        )
    return PlanSource(
        name=name,
        path=spec.path,
        digest=source.digest,
        task=spec.task,
        weight=spec.weight,
        schedule=tuple(spec.schedule),
        max_epochs=spec.max_epochs,
        on_exhausted=spec.on_exhausted,
        lengths=builder.document_lengths(source),
        num_images=np.asarray(source.num_und_images),
        can_cut=source.kind == "text",
        left_out=read_masks(source, list(spec.masks)) if spec.masks else None,
        masks={mask: mask_digest(source, mask) for mask in spec.masks},
        captions=spec.captions,
        caption_number=source.caption_number,
        uids=source.uids,
    )
