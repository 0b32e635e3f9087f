"""Rows of OBELICS: `images` and `texts` of one length, in each place either a picture's URL or a text.

https://huggingface.co/datasets/HuggingFaceM4/OBELICS describes them. They hold no pictures: those come from what
`--images` names.
"""

import json
from typing import Any

from data_pipeline.prepare.records import Reject


def is_obelics(row: dict[str, Any]) -> bool:
    """Whether a row has this form."""
    return isinstance(row.get("images"), list) and isinstance(row.get("texts"), list)


def obelics_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The row as segments.

    Raises:
        Reject: The lists do not belong together.
    """
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise Reject("bad_record", "'images' and 'texts' of an OBELICS row must be lists of one length")
    segments: list[dict[str, Any]] = []
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise Reject("bad_record", f"place {number} of an OBELICS row must have either a picture or a text")
        segments.append({"text": text} if image is None else {"image": image})
    known = ("images", "texts", "metadata", "general_metadata")
    fields = {name: value for name, value in row.items() if name not in known}
    return fields | {"segments": segments, "meta": _general(row.get("general_metadata"))}


def _general(given: Any) -> dict[str, Any]:
    """What is known of the page; a row without it is as good."""
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
