"""VQAv2 and sets of its layout: a file of questions, and files of annotations with their answers.

Questions are the records; an annotation is found by its question_id through a sorted table, and read when its question
is. Pictures go by COCO's names of the image_id (with the subset that the file names), else by the plain number.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.prepare.importers.array import iterate_objects, text_member
from data_pipeline.prepare.importers.pictures import Pictures
from data_pipeline.prepare.importers.record import Record, parse_json
from data_pipeline.prepare.importers.vqa import vqa_fields
from data_pipeline.prepare.records import Reject


@dataclass(slots=True)
class QuestionsAndAnswers:
    """One file of questions with the annotations of all files."""

    path: Path
    annotations: tuple[Path, ...]
    pictures: Pictures
    _questions: np.ndarray | None = None
    """uint64 [n, 3]: question_id, first byte, end."""
    _answers: np.ndarray | None = None
    """uint64 [m, 4]: question_id (sorted), number of the file, first byte, end."""
    _subset: str = ""

    def files(self) -> list[Path]:
        """See Part."""
        return [self.path, *self.annotations]

    def count(self) -> int:
        """See Part."""
        return len(self._find()[0])

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """See Part."""
        questions, answers = self._find()
        with self.path.open("rb") as stream:
            for number, (identity, first, end) in enumerate(questions[start:stop].tolist(), start=start):
                stream.seek(first)
                raw = (stream.read(end - first), self._answer(answers, identity))
                place = f"{self.path}: question {identity}"
                yield Record(place, f"{self.path.name}:{number}", raw, self._parse, self.pictures, self.path.parent)

    def _answer(self, answers: np.ndarray, identity: int) -> bytes | None:
        """The annotation of a question, undecoded."""
        at = int(np.searchsorted(answers[:, 0], np.uint64(identity)))
        if at == len(answers) or int(answers[at, 0]) != identity:
            return None
        _, file, first, end = answers[at].tolist()
        with self.annotations[file].open("rb") as stream:
            stream.seek(first)
            return stream.read(end - first)

    def _find(self) -> tuple[np.ndarray, np.ndarray]:
        if self._questions is None or self._answers is None:
            flat = array("Q")
            for first, end, value in iterate_objects(self.path, "questions"):
                flat.extend((_identity(value, self.path, first), first, end))
            self._questions = np.array(flat, np.uint64).reshape(-1, 3)
            flat = array("Q")
            for number, path in enumerate(self.annotations):
                for first, end, value in iterate_objects(path, "annotations"):
                    flat.extend((_identity(value, path, first), number, first, end))
            answers = np.array(flat, np.uint64).reshape(-1, 4)
            self._answers = answers[np.argsort(answers[:, 0], kind="stable")]
            subset = text_member(self.path, "data_subtype")
            self._subset = subset if subset.isalnum() else ""
        return self._questions, self._answers

    def _parse(self, raw: tuple[bytes, bytes | None]) -> dict[str, Any]:
        question, answer = raw
        if answer is None:
            raise Reject("no_answer", "no annotation of this question")
        fields = parse_json(question)
        annotation = parse_json(answer)
        fields |= {name: annotation[name] for name in ("answers", "multiple_choice_answer") if name in annotation}
        fields["id"] = fields["question_id"]
        if "image" not in fields:
            fields["image"] = self._picture_name(fields.get("image_id"))
        return vqa_fields(fields)

    def _picture_name(self, image_id: Any) -> str:
        if type(image_id) is not int or image_id < 0:
            raise Reject("bad_record", f"image_id {image_id!r} is no number")
        subset = f"COCO_{self._subset}_{image_id:012d}.jpg" if self._subset else ""
        names = [subset, f"{image_id:012d}.jpg", f"{image_id}.jpg", f"{self._subset}/{subset}"]
        names = [name for name in names if name and not name.startswith("/")]
        return next((name for name in names if self.pictures.has(name)), names[0])


def _identity(value: dict[str, Any], path: Path, first: int) -> int:
    identity = value.get("question_id")
    if type(identity) is not int or not 0 <= identity < 1 << 63:
        raise UserError(f"{path}: the object at byte {first} has no question_id; give files of VQAv2's layout")
    return identity
