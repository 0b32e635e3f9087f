"""Which form a record of others has, told by its fields, and the same record in our form.

A row of OBELICS, MMC4, LLaVA or a VQA set is the same mapping whether it came as a JSON line, out of a JSON array or
from Parquet; so files and forms are read apart. `--format` names a form; `auto` goes by the fields.
"""

from dataclasses import dataclass
from typing import Any

from data_pipeline.prepare.importers.conversations import conversation_fields, is_conversation
from data_pipeline.prepare.importers.mmc4 import mmc4_fields
from data_pipeline.prepare.importers.obelics import is_obelics, obelics_fields
from data_pipeline.prepare.importers.pictures import Pictures
from data_pipeline.prepare.importers.vqa import is_vqa, vqa_fields
from data_pipeline.prepare.importing import Format, ImportOptions
from data_pipeline.prepare.records import Reject

TEXT_COLUMNS = ("text", "content")
CAPTION_COLUMNS = ("captions", "caption", "text")
IMAGE_COLUMNS = ("image", "image_path", "jpg", "jpeg", "png", "webp", "file_name")
"""Usual names, the first that is there counts."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """From the fields of others to those that prepare knows."""

    options: ImportOptions

    def canonical(self, row: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
        """The row in our form; unknown ones stay as they are, and prepare says what it misses.

        Raises:
            Reject: The row breaks the rules of its form.
        """
        form = self.options.format
        if self.options.text_column or form is Format.text:
            return self._text(row)
        if form is Format.mmc4 or (form is not Format.obelics and "text_list" in row and "image_info" in row):
            return mmc4_fields(row, pictures, self.options.image_side)
        if form is Format.obelics or is_obelics(row):
            return obelics_fields(row)
        if "segments" in row or "conversation" in row:
            return row
        if form is Format.llava or is_conversation(row):
            return conversation_fields(self._with_image(row))
        if form is Format.vqa or is_vqa(row):
            return vqa_fields(self._with_image(row))
        return self._with_image(row) if "question" in row else self._pair_or_text(row)

    def image_columns(self) -> tuple[str, ...]:
        """Names under which a picture may stand."""
        return (self.options.image_column,) if self.options.image_column else IMAGE_COLUMNS

    def _with_image(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its picture under the usual name."""
        name = _first(row, self.image_columns())
        if name is None or name == "image" or "images" in row:
            return row
        return {key: value for key, value in row.items() if key != name} | {"image": row[name]}

    def _pair_or_text(self, row: dict[str, Any]) -> dict[str, Any]:
        image = _first(row, self.image_columns())
        if image is None and not self.options.caption_column:
            return self._text(row)
        names = (self.options.caption_column,) if self.options.caption_column else CAPTION_COLUMNS
        caption = _first(row, names)
        if caption is None and self.options.caption_column:
            raise Reject("no_caption", f"the record has no field {self.options.caption_column!r}; it has {_names(row)}")
        if caption is None or image is None:
            return row
        fields = {name: value for name, value in row.items() if name not in (image, caption)}
        fields["captions" if isinstance(row[caption], list) else "caption"] = row[caption]
        fields["image"] = row[image]
        return fields

    def _text(self, row: dict[str, Any]) -> dict[str, Any]:
        given = self.options.text_column
        name = _first(row, (given,) if given else TEXT_COLUMNS)
        if name is None and given:
            raise Reject("no_text", f"the record has no field {given!r}; it has {_names(row)}")
        if name is None or name == "text":
            return row
        return {key: value for key, value in row.items() if key != name} | {"text": row[name]}


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(sorted(row)[:20])
