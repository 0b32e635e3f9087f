"""The phase that exports the trained model and checks the export against the training network itself."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import open_source
from data_pipeline.schema import Document, TaskId
from data_pipeline.stream.assemble import cut_document
from data_pipeline.stream.read import SampleReader
from janus_mega.checkpoint.hf.export import export_hf
from janus_mega.checkpoint.trained import open_trained
from janus_mega.demo import digits, exam
from janus_mega.demo.raw import RawData
from janus_mega.demo.workspace import Workspace
from janus_mega.infer.model import InferenceModel
from janus_mega.infer.verify import ExportCheck, Probes, verify_export
from janus_mega.observe.progress import Progress
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.train.training_logits import TrainingLogits

PROBED = {
    "questions": TaskId.understanding,
    "captions": TaskId.generation,
    "pairs": TaskId.understanding,
    "prose_held_out": TaskId.text,
    "differences": TaskId.understanding,
}
"""Sources whose documents are compared, in the order in which they share rows, and their tasks."""
DOCUMENTS_EACH = 4
QUESTIONS = 4
CAPTIONS = 4


def export_and_verify(workspace: Workspace, checkpoint: str, raw: RawData) -> dict[str, Any]:
    """Writes the export and compares it: logits of packed training documents, greedy text, greedy guided images.

    Collective over: world (of one rank).
    """
    groups = build_groups(1, 1)
    with Progress("export", 2) as bar:
        export_hf(Path(checkpoint), workspace.export)
        bar.advance(note="comparing")
        check = _verify(workspace, checkpoint, raw, groups)
        bar.advance()
    return {
        "hf_max_logit_diff": check.max_relative_diff,
        "hf_greedy_equal": check.greedy_equal,
        "hf_logit_diff_by_position": check.relative_diff,
        "hf_positions_compared": check.num_positions,
    }


def _verify(workspace: Workspace, checkpoint: str, raw: RawData, groups: ProcessGroups) -> ExportCheck:
    trained = open_trained(Path(checkpoint))
    model = InferenceModel(trained)
    pictures = exam.as_rgb(raw.held_out[:QUESTIONS])
    probes = Probes(
        documents=probed_documents(workspace, model),
        questions=[
            (digits.QUESTIONS[number % len(digits.QUESTIONS)], [picture]) for number, picture in enumerate(pictures)
        ],
        captions=exam.captions_to_draw(CAPTIONS * digits.NUM_DIGITS)[0][:: digits.NUM_DIGITS + 1][:CAPTIONS],
    )
    return verify_export(workspace.export, model, probes, TrainingLogits(trained, groups))


def probed_documents(workspace: Workspace, model: InferenceModel) -> list[Document]:
    """Documents of every kind, interleaved, so that rows hold several kinds side by side."""
    by_source = []
    for name, task in PROBED.items():
        source = open_source(workspace.shards(name))
        reader = SampleReader(source, model.dialogue.geometry)
        chosen = np.linspace(0, source.num_samples - 1, DOCUMENTS_EACH).astype(int)
        by_source.append([model.dialogue.build_document(reader.read(int(number)), task) for number in chosen])
    seq_len = model.trained.config.data.seq_len
    documents = [document for chosen in zip(*by_source, strict=True) for document in chosen]
    return [cut_document(document, 0, min(len(document.input_ids), seq_len)) for document in documents]
