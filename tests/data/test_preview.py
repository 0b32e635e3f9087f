"""The preview page: it shows what the rows hold, escapes everything, asks nobody for anything, and stays small."""

import html.parser
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.explain.blame import Layout
from data_pipeline.explain.inspection import inspect_source
from data_pipeline.explain.originals import Originals, open_originals
from data_pipeline.explain.preview import Picture, Viewer, view_rows, view_samples
from data_pipeline.explain.readable import TextSpan, TokenReader
from data_pipeline.manifest import open_source
from data_pipeline.schema import LabelHead, TokenKind
from data_pipeline.stream.dataset import RowDataset
from janus_mega.report.data_page import Budget, add_source, budget_note, content, rows_page
from tests.support.shards import make_shards


class Decoder:
    """Ids to flat pictures whose grey is the first id."""

    digest = "0" * 64

    def decode(self, ids):
        return np.broadcast_to(ids[:, :1, None, None].astype(np.uint8), (len(ids), 3, 16, 16)).copy()


@pytest.fixture(scope="module")
def data(shards):
    return shards.open()


@pytest.fixture(scope="module")
def views(data):
    return [view for step in (1, 2, 3) for view in view_rows(data, step, Viewer(decoder=Decoder()), Layout(2, 1))]


class Reader(html.parser.HTMLParser):
    """Collects tags, their attributes and all text; complains about unbalanced tags."""

    VOID = frozenset(["meta", "img", "br", "rect", "link"])

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.words = [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID or (tag == "rect" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_views_hold_what_the_rows_hold(data, views):
    dataset = RowDataset(data)
    for view in views:
        row = dataset[view.row]
        kinds = np.concatenate([np.full(stop - start, kind) for kind, start, stop in view.kinds])
        assert (kinds == row.token_kind).all()
        trained = np.zeros(view.seq_len, bool)
        for start, stop in view.trained:
            trained[start:stop] = True
        assert (trained == (row.label_head != LabelHead.none)).all()
        assert view.num_padding == (row.token_kind == TokenKind.pad).sum()
        assert [d.start for d in view.documents] == row.cu_seqlens[: len(view.documents)].tolist()
        shown = [
            p.pixels for d in view.documents for p in d.parts if isinstance(p, Picture) and p.label.startswith("seen")
        ]
        assert len(shown) == len(row.pixel_values) and all(
            (a == b).all() for a, b in zip(shown, row.pixel_values, strict=True)
        )
        drawn = [p for d in view.documents if d.used.images_drawn for p in d.parts if isinstance(p, Picture)]
        first_ids = [row.input_ids[start] for kind, start, _ in view.kinds if kind is TokenKind.image_gen]
        assert [int(p.pixels[0, 0, 0]) for p in drawn] == first_ids


def test_green_text_is_exactly_what_is_predicted(data, views):
    reader = TokenReader(data.builder.tokenizer)
    dataset = RowDataset(data)
    for view in views[:8]:
        row = dataset[view.row]
        for document in view.documents:
            here = slice(document.start, document.stop)
            marked = "".join(
                p.text for p in document.parts if isinstance(p, TextSpan) and p.is_trained and not p.is_special
            )
            predicted = row.labels[here][row.label_head[here] == LabelHead.text]
            assert marked == reader.text(predicted)


def test_dropped_prompts_and_pieces_are_said(views):
    page = rows_page("t", "s", views, shows_ranks=True)[0].render()
    dropped = sum(document.used.dropped_prompt for view in views for document in view.documents)
    assert dropped and page.count(">prompt dropped</span>") == dropped + 1  # and the legend
    assert "from token " in page and "rank 1, micro-batch" in page


def test_the_page_is_whole_and_asks_nobody(data, views):
    page, budget = rows_page("Data & <rows>", "s", views, shows_ranks=False)
    for planned, source in zip(data.plan.sources, data.sources, strict=True):
        viewer = Viewer(data.builder.tokenizer, Decoder())
        add_source(page, budget, inspect_source(source.path, 0), view_samples(source, viewer, 4), planned.name)
    text = page.render()
    reader = Reader(text)
    addresses = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert addresses and all(value.startswith("data:image/") for value in addresses)
    assert not re.search(r"<script|<link|@import|url\(|\bon\w+=", text)
    assert "Data & <rows>" in reader.words
    assert len(text) < 2_000_000


def test_texts_and_names_are_escaped():
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    markup = content(
        [TextSpan(evil, True), TextSpan(evil), Picture(evil), TextSpan(evil, is_special=True)], Budget()
    ).html
    picture = content([Picture(evil, np.zeros((3, 4, 4), np.uint8))], Budget()).html
    for part in (markup, picture):
        assert "<script" not in part and "<img src=x" not in part
    assert markup.count("&lt;script&gt;") == 4


def test_a_full_page_leaves_out_and_says_so():
    budget = Budget(picture_bytes=400, text_chars=100)
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    small = np.zeros((3, 4, 4), np.uint8)
    markup = content([Picture("a", noise), Picture("b", small), TextSpan("x" * 150), TextSpan("y" * 9)], budget).html
    assert markup.count("<img") == 1 and "the page is full" in markup and "y" not in markup
    assert (budget.pictures_left_out, budget.chars_left_out) == (1, 59)
    assert "1 pictures and 59 characters" in budget_note(budget).html
    assert budget_note(Budget()).html == ""


def test_a_hole_is_shown_as_one(tmp_path):
    shards = make_shards(tmp_path, num_samples=8)
    tar = Path(shards.spec.sources["questions"].path) / "shards" / "000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b'{"seq"')] ^= 1
    tar.write_bytes(content)
    views = [view for step in (1, 2) for view in view_rows(shards.open(), step, Viewer())]
    holes = [document for view in views for document in view.documents if document.hole]
    assert holes and all("checksum" in document.hole and document.parts == () for document in holes)
    page = rows_page("t", "s", views, shows_ranks=False)[0].render()
    assert page.count('class="card hole"') == len(holes) and "the tar is damaged" in page
    Reader(page)


def test_originals_stand_beside_what_was_drawn(shards, tmp_path):
    """Questions under the uids of drawings: their pictures are the originals."""
    path = shutil.copytree(Path(shards.spec.sources["questions"].path), tmp_path / "q")
    drawings = open_source(shards.spec.sources["drawings"].path)
    source = open_source(path)
    source.uids = np.array(drawings.uids)
    originals = Originals([source])
    single = [i for i in range(len(source)) if source.num_und_images[i] == 1]
    assert originals.find(drawings.uid(single[0])).shape == (3, 16, 16)
    double = next(i for i in range(len(source)) if source.num_und_images[i] == 2)
    assert originals.find(drawings.uid(double)) is None, "which of two pictures was drawn?"
    samples = view_samples(drawings, Viewer(shards.tokenizer, Decoder(), originals), len(drawings))
    shown = [[part.label for part in sample.parts if isinstance(part, Picture)] for sample in samples]
    assert shown[single[0]] == ["original", "decoded ids"] and shown[double] == ["decoded ids"]
    with pytest.raises(UserError, match="holds no pictures"):
        open_originals([shards.spec.sources["drawings"].path])
    with pytest.raises(UserError, match=r"holds no janus\.json"):
        open_originals([tmp_path])


def test_samples_without_tokenizers_show_ids(shards):
    source = open_source(shards.spec.sources["drawings"].path)
    (sample,) = view_samples(source, Viewer(), 1)
    picture, text = sample.parts
    assert picture.pixels is None and picture.label == "16 image ids" and text.text.startswith("ids ")


def test_ids_of_another_tokenizer_are_refused(shards):
    source = open_source(shards.spec.sources["drawings"].path)
    other = Decoder()
    other.digest = "f" * 64
    with pytest.raises(UserError, match="0{64}.*f{64}"):
        view_samples(source, Viewer(decoder=other), 1)
    tokenizer = replace(shards).tokenizer
    wrong = type("Wrong", (), {"digest": "e" * 64, "decode": tokenizer.decode})()
    with pytest.raises(UserError, match="text tokenizer"):
        view_samples(source, Viewer(tokenizer=wrong), 1)


def test_rows_of_another_step_are_refused(data):
    with pytest.raises(UserError, match="row 8 is not in step 1, whose rows are 0 to 7"):
        view_rows(data, 1, Viewer(), rows=[8])
