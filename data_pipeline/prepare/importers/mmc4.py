"""Lines of MMC4: sentences of a page, and pictures that were each matched with one of them.

https://github.com/allenai/mmc4 describes them. Pictures go by `image_name`, else by `raw_url`.
"""

from typing import Any

from data_pipeline.prepare.importers.pictures import Pictures
from data_pipeline.prepare.importing import ImageSide
from data_pipeline.prepare.records import Reject, checked_text


def mmc4_fields(row: dict[str, Any], pictures: Pictures, side: ImageSide) -> dict[str, Any]:
    """The line as segments: sentences between pictures are joined by spaces; pictures of one sentence keep their order.

    Raises:
        Reject: A list is missing, or a picture was matched with a sentence that is not there.
    """
    sentences, infos = row.get("text_list"), row.get("image_info")
    if not isinstance(sentences, list) or not isinstance(infos, list):
        raise Reject("bad_record", "an MMC4 record must have the lists 'text_list' and 'image_info'")
    of_sentence: dict[int, list[str]] = {}
    for info in infos:
        index = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(index) is not int or not 0 <= index < len(sentences):
            raise Reject("bad_record", f"matched_text_index {index!r} is no sentence of {len(sentences)}")
        of_sentence.setdefault(index, []).append(_picture_name(info, pictures))
    segments: list[dict[str, Any]] = []
    run: list[str] = []
    for number, sentence in enumerate(sentences):
        names = of_sentence.get(number, [])
        if side is ImageSide.after:
            run.append(checked_text(sentence, "text_list"))
        if names:
            segments += [{"text": " ".join(run)}] if run else []
            segments += [{"image": name} for name in names]
            run = []
        if side is ImageSide.before:
            run.append(checked_text(sentence, "text_list"))
    segments += [{"text": " ".join(run)}] if run else []
    known = ("text_list", "image_info", "similarity_matrix", "could_have_url_duplicate")
    return {name: value for name, value in row.items() if name not in known} | {"segments": segments}


def _picture_name(info: dict[str, Any], pictures: Pictures) -> str:
    names = [checked_text(info[key], key) for key in ("image_name", "raw_url") if info.get(key)]
    if not names:
        raise Reject("bad_record", "a picture of MMC4 must have an 'image_name' or a 'raw_url'")
    return next((name for name in names if pictures.has(name)), names[0])
