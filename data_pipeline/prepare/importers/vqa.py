"""Questions about pictures with one or several answers.

VQAv2 comes as a pair of files, questions and annotations, joined by question_id (`vqa_pair.py`); other sets have
question, answers and image in one record. Of several answers the most frequent is learnt, the earlier of equals.
"""

from collections import Counter
from typing import Any

from data_pipeline.prepare.records import Reject, checked_text


def is_vqa(row: dict[str, Any]) -> bool:
    """Whether a row has this form (and not ours, which has one answer)."""
    return "question" in row and "answer" not in row and ("answers" in row or "multiple_choice_answer" in row)


def vqa_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The row as `{"question", "answer", "image"}`.

    Raises:
        Reject: No answer.
    """
    fields = {name: value for name, value in row.items() if name not in ("answers", "question_id")}
    if "answer" not in fields:
        fields["answer"] = chosen_answer(row)
    if "id" not in fields and "question_id" in row:
        fields["id"] = row["question_id"]
    return fields


def chosen_answer(row: dict[str, Any]) -> str:
    """The answer that is learnt.

    Raises:
        Reject: There is none.
    """
    if isinstance(row.get("multiple_choice_answer"), str):
        return checked_text(row["multiple_choice_answer"], "multiple_choice_answer")
    given = row.get("answers")
    answers = given if isinstance(given, list) else [given]
    texts = [checked_text(a.get("answer") if isinstance(a, dict) else a, "answers") for a in answers if a is not None]
    if not texts:
        raise Reject("empty_text", "the question has no answer")
    return Counter(texts).most_common(1)[0][0]
