"""The phase that judges a trained model: one rank lets it draw, another lets it read and predict text.

Judges are fitted on training digits or on drawings; held-out digits are only ever read. The guidance scale is chosen
before anything held out is looked at. Every item leaves a record, and a few leave their pictures for the page.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.manifest import open_source
from data_pipeline.schema import Document, TaskId
from data_pipeline.stream.read import SampleReader
from janus_mega.demo import digits, exam
from janus_mega.demo.phases import rank_and_size
from janus_mega.demo.raw import RawData
from janus_mega.demo.workspace import Workspace
from janus_mega.evaluate import metrics, suites
from janus_mega.evaluate.bigram import fit_bigram
from janus_mega.evaluate.judges import DigitJudge
from janus_mega.evaluate.records import write_records
from janus_mega.infer.model import InferenceModel, load_trained
from janus_mega.models.vision.image_tokenizer import load_image_tokenizer
from janus_mega.observe.progress import Progress
from janus_mega.observe.sinks import open_sinks
from janus_mega.report.pictures import sheet

GUIDANCE_SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Scales tried on training digits."""
SHOWN = 24
"""Items of a kind whose pictures are kept for the page: wrong answers first."""


@dataclass(frozen=True, slots=True)
class ExamSizes:
    """How much is asked."""

    drawings: int = 1000
    drawings_per_scale: int = 300
    repeats: int = 10
    """How often every ordered pair of digits is asked, for reading and for differences each."""
    seed: int = 0


def examine(workspace: Workspace, checkpoint: str, raw: RawData, sizes: ExamSizes) -> dict[str, Any]:
    """Figures of this rank's part: the first rank draws, the last one reads (a rank alone does both)."""
    rank, size = rank_and_size()
    figures: dict[str, Any] = {}
    model = load_trained(Path(checkpoint))
    judge = DigitJudge(raw.train, raw.train_labels)
    if rank == 0:
        figures |= _draw(workspace, model, judge, raw, sizes)
    if rank == size - 1:
        figures |= _read(workspace, model, raw, sizes, show=size == 1)
        figures |= _reconstruct(workspace, judge, raw)
        figures |= _predict(workspace, model)
    return figures


# ---- drawing -----------------------------------------------------------------------------------------------------


def _draw(
    workspace: Workspace, model: InferenceModel, judge: DigitJudge, raw: RawData, sizes: ExamSizes
) -> dict[str, Any]:
    on_training = suites.JudgedPictures(judge, raw.train, raw.train_labels)
    on_held_out = suites.JudgedPictures(judge, raw.held_out, raw.held_out_labels)
    tried, tried_asked = exam.captions_to_draw(sizes.drawings_per_scale)
    captions, asked = exam.captions_to_draw(sizes.drawings)
    with Progress("drawing", len(tried) * len(GUIDANCE_SCALES) + len(captions)) as bar:
        scale, trials = suites.choose_guidance(
            model, tried, tried_asked, on_training, scales=GUIDANCE_SCALES, seed=sizes.seed + 1, on_done=bar.advance
        )
        drawings = suites.draw_captions(
            model, captions, asked, guidance_scale=scale, seed=sizes.seed + 2, on_done=bar.advance
        )
    accuracy, coverage = suites.score_drawings(drawings, on_held_out)
    read = judge.read(drawings.pictures)
    _save_drawings(workspace, drawings, read)
    return {
        "gen_accuracy": accuracy,
        "gen_cas": coverage,
        "gen_unique": metrics.distinct_share(drawings.ids),
        "gen_copies": metrics.copied_share(drawings.ids, training_ids(workspace, model)),
        "guidance_scale": scale,
        "guidance_trials": [asdict(trial) for trial in trials],
        "gen_confusion": metrics.confusion_matrix(asked, read, digits.NUM_DIGITS).tolist(),
    }


def training_ids(workspace: Workspace, model: InferenceModel) -> np.ndarray:
    """Image ids uint16 [n, i] of all samples that drawing was trained on, from their shards."""
    source = open_source(workspace.shards("captions"))
    reader = SampleReader(source, model.dialogue.geometry)
    ids = [reader.read(number).image_ids for number in range(source.num_samples)]
    return np.stack([row for row in ids if row is not None])


def _save_drawings(workspace: Workspace, drawings: suites.Drawings, read: np.ndarray) -> None:
    """PNG files, prompts and ids beside them, and a sheet for TensorBoard."""
    workspace.drawings.mkdir(parents=True)
    records = list(drawings.records(read))
    for record, picture in zip(records, drawings.pictures, strict=True):
        Image.fromarray(picture.transpose(1, 2, 0)).save(workspace.drawings / f"{record['uid']}.png")
        record["file"] = f"{record['uid']}.png"
    write_records(workspace.drawings / "drawings.jsonl", records)
    first = np.concatenate([drawings.pictures[drawings.asked == digit][:12] for digit in range(digits.NUM_DIGITS)])
    with open_sinks(workspace.events, tensorboard=True) as sinks:
        sinks.image(0, "drawings", sheet(first, columns=12))


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(workspace: Workspace, model: InferenceModel, raw: RawData, sizes: ExamSizes, show: bool) -> dict[str, Any]:
    pictures, labels = raw.held_out, raw.held_out_labels
    items = {
        "questions": exam.question_items(model, pictures, labels),
        "pairs": exam.pair_items(model, pictures, labels, sizes.repeats, sizes.seed),
        "differences": exam.difference_items(model, pictures, labels, sizes.repeats, sizes.seed),
    }
    readings = {}
    with Progress("reading", sum(map(len, items.values())), enabled=show) as bar:
        for name, asked in items.items():
            readings[name] = suites.read_items(model, asked, exam.ANSWER_TOKENS, bar.advance)
    for name, answers in readings.items():
        write_records(workspace.items / f"{name}.jsonl", (answer.record() for answer in answers))
    _save_shown(workspace, readings)
    wanted, answered = suites.read_classes(readings["questions"], digits.DIGIT_WORDS)
    return {
        "und_accuracy": suites.reading_accuracy(readings["questions"]),
        "pair_accuracy": suites.reading_accuracy(readings["pairs"]),
        "pair_accuracy_seen": suites.reading_accuracy(readings["pairs"], exam.SEEN),
        "pair_accuracy_unseen": suites.reading_accuracy(readings["pairs"], exam.UNSEEN),
        "difference_accuracy": suites.reading_accuracy(readings["differences"]),
        "difference_accuracy_below_zero": suites.reading_accuracy(readings["differences"], exam.BELOW_ZERO),
        "und_confusion": metrics.confusion_matrix(wanted, answered, digits.NUM_DIGITS).tolist(),
    }


def _save_shown(workspace: Workspace, readings: dict[str, list[suites.Reading]]) -> None:
    """Pictures of some items as arrays [item, picture, side, side], their answers as records of the same order."""
    arrays: dict[str, Any] = {}
    for name, answers in readings.items():
        chosen = _to_show(answers)
        arrays[name] = np.stack([np.stack([image[0] for image in answer.item.prompt.images]) for answer in chosen])
        write_records(workspace.items / f"shown_{name}.jsonl", (answer.record() for answer in chosen))
    np.savez(workspace.items / "shown.npz", **arrays)


def _to_show(answers: list[suites.Reading]) -> list[suites.Reading]:
    """Wrong answers for at most half of the room, then right ones evenly from all."""
    wrong = [answer for answer in answers if not answer.is_right][: SHOWN // 2]
    right = [answer for answer in answers if answer.is_right]
    room = SHOWN - len(wrong)
    return wrong + right[:: max(1, -(-len(right) // room))]


def _reconstruct(workspace: Workspace, judge: DigitJudge, raw: RawData) -> dict[str, Any]:
    """How the image tokenizer keeps held-out digits readable."""
    tokenizer = load_image_tokenizer(workspace.image_tokenizer)
    remade = tokenizer.decode(tokenizer.encode(exam.as_rgb(raw.held_out)))
    np.savez(workspace.items / "remade.npz", pictures=raw.held_out[:SHOWN], remade=remade[:SHOWN])
    return {
        "vq_accuracy": metrics.accuracy(judge.read(remade), raw.held_out_labels),
        "judge_accuracy": metrics.accuracy(judge.read(raw.held_out), raw.held_out_labels),
    }


# ---- text --------------------------------------------------------------------------------------------------------


def _predict(workspace: Workspace, model: InferenceModel) -> dict[str, Any]:
    """Held-out prose under the model and under a bigram of the same training documents."""
    training = [document.input_ids for document in _documents(workspace, model, "prose_train")]
    bigram = fit_bigram(training, model.tokenizer.vocab_size)
    held_out = _documents(workspace, model, "prose_held_out")
    figures = suites.score_text(model, held_out, bigram, model.trained.config.data.seq_len)
    return {
        "text_bpb": figures.model_bpb,
        "text_bpb_bigram": figures.bigram_bpb,
        "text_held_out_bytes": figures.num_bytes,
        "text_held_out_tokens": figures.num_tokens,
    }


def _documents(workspace: Workspace, model: InferenceModel, name: str) -> Sequence[Document]:
    """All documents of a text source."""
    source = open_source(workspace.shards(name))
    reader = SampleReader(source, model.dialogue.geometry)
    samples = map(reader.read, range(source.num_samples))
    return [model.dialogue.build_document(sample, TaskId.text) for sample in samples]
