"""What the readers of raw input can be told. Everything here changes what a record says, so all of it is in the digest
of the settings; where pictures lie counts by name alone, as inputs do.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Format(Enum):
    """How raw input is laid out; `auto` goes by suffixes and by the fields of each record."""

    auto = "auto"
    jsonl = "jsonl"
    text = "text"
    folder = "folder"
    parquet = "parquet"
    img2dataset = "img2dataset"
    obelics = "obelics"
    mmc4 = "mmc4"
    llava = "llava"
    vqa = "vqa"


class OnMissingImage(Enum):
    """What becomes of a picture that is not there or does not decode: its record goes, or it alone."""

    reject = "reject"
    drop = "drop"


class ImageSide(Enum):
    """Where a picture of MMC4 goes: before or after the sentence that it was matched with."""

    before = "before"
    after = "after"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """Settings of all readers; empty names of columns mean the usual ones."""

    format: Format = Format.auto
    """How the input is laid out."""
    images: tuple[Path, ...] = ()
    """Where pictures lie that records name by file name or URL: directories, tars, .jsonl maps of url to file."""
    text_column: str = ""
    """Field with the text of a document; usual: text, content."""
    caption_column: str = ""
    """Field with the caption or captions of a picture; usual: captions, caption, text."""
    image_column: str = ""
    """Field with the picture, its bytes or its path; usual: image, image_path, jpg, png, webp, file_name."""
    keep_columns: tuple[str, ...] = ()
    """Numeric fields that masks will ask for, such as scores."""
    class_names: Path | None = None
    """Names of class folders: a JSON object, or lines of folder and name."""
    on_missing_image: OnMissingImage = OnMissingImage.reject
    """What becomes of pictures that cannot be used (interleaved)."""
    image_side: ImageSide = ImageSide.before
    """Side of the matched sentence (MMC4)."""

    def settings(self) -> dict[str, Any]:
        """What the output depends on, ready for JSON."""
        return {
            "format": self.format.value,
            "images": [path.name for path in self.images],
            "text_column": self.text_column,
            "caption_column": self.caption_column,
            "image_column": self.image_column,
            "keep_columns": list(self.keep_columns),
            "class_names": self.class_names.name if self.class_names else "",
            "on_missing_image": self.on_missing_image.value,
            "image_side": self.image_side.value,
        }
