"""`janus-mega data mask` on real shards: filters, lists and duplicates in one call, what is told, what is refused."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.masks.store import list_masks, mask_facts, read_mask
from data_pipeline.prepare.foreign import index_tars
from data_pipeline.prepare.importing import ImportOptions
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.text.load import load_text_tokenizer
from janus_mega.cli.data import data_app
from tests.support.pictures import COPIES, encoded, scenes
from tests.support.raw import ColourTokenizer, train_tokenizer, write_jsonl

NUM = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Documents and drawings of 12 captioned pictures: 3 and 7 look like 0; 5 is small; scores 0 to 11, 8 has none."""
    root = tmp_path_factory.mktemp("made")
    pictures = scenes(NUM, side=96)
    files = {n: encoded(pixels) for n, pixels in enumerate(pictures)}
    files |= {3: COPIES["half size"](pictures[0]), 7: COPIES["webp"](pictures[0])}
    files[5] = encoded(pictures[5][:30, :40])
    rows = []
    for n, content in files.items():
        (root / f"{n}.jpg").write_bytes(content)
        row = {"id": f"p{n}", "image": f"{n}.jpg", "caption": "a scene " * (1 + n % 3), "lang": "en" if n % 4 else "de"}
        rows.append(row | ({"score": n} if n != 8 else {}))
    raw = write_jsonl(root / "raw.jsonl", rows)
    options = PrepareOptions(samples_per_shard=5, record_size=4, importing=ImportOptions(keep_columns=("score",)))
    tokenizer = train_tokenizer(root)
    prepare_interleaved([raw], root / "documents", tokenizer, options=options)
    prepare_t2i([raw], root / "drawings", tokenizer, ColourTokenizer(), options=options)
    return root


@pytest.fixture
def root(made, tmp_path):
    for kind in ("documents", "drawings"):
        shutil.copytree(made / kind, tmp_path / kind)
    return tmp_path


def mask(*arguments):
    """Runs the command; returns what it prints, raises what it raises."""
    result = CliRunner().invoke(data_app, ["mask", *map(str, arguments)])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def left_out(directory, name):
    return np.flatnonzero(read_mask(open_source(directory), name)).tolist()


def refused(message, *arguments):
    with pytest.raises(UserError, match=message) as error:
        mask(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["documents", "drawings"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--min-side", 40], [5]),
        (["--max-side", 95], [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]),
        (["--max-aspect", 1.2], [5]),
        (["--min-chars", 10], [0, 3, 6, 9]),
        (["--max-chars", 20], [2, 5, 8, 11]),
        (["--language", "en"], [0, 4, 8]),
        (["--language", "en", "--language", "de", "--drop-if", "score<2"], [0, 1]),
        (["--keep-if", "score>=4"], [0, 1, 2, 3, 8]),
        (["--keep-if", "score>=4", "--keep-unknown"], [0, 1, 2, 3]),
        (["--drop-if", "score>=4"], [4, 5, 6, 7, 9, 10, 11]),
        (["--keep-if", "score>2", "--keep-if", "score<6"], [0, 1, 2, 6, 7, 8, 9, 10, 11]),
        (["--min-images", 1, "--drop-if", "score==11"], [11]),
    ],
)
def test_filters(root, kind, options, expected):
    mask(root / kind, "--name", "m", *options)
    assert left_out(root / kind, "m") == expected


def test_criteria_of_one_call_make_one_mask_with_reasons(root):
    (root / "bad.txt").write_text("p1\np2\nelsewhere\n")
    told = mask(
        root / "documents", "--name", "all", "--min-side", 40, "--keep-if", "score>=1",
        "--uids", root / "bad.txt", "--drop", "--dedup", "near",
    )  # fmt: skip
    # 0 is out by its score, so of its copies 3 and 7 the first one stays.
    assert left_out(root / "documents", "all") == [0, 1, 2, 5, 7, 8]
    facts = mask_facts(open_source(root / "documents"), "all")
    reasons = {"min_side < 40": 1, "score < 1": 1, "score unknown": 1, "listed": 2, "near duplicate": 1}
    assert {reason: count for reason, count in facts["reasons"].items() if count} == reasons
    assert facts["num_left_out"] == 6 and facts["settings"]["lists"][0]["name"] == "bad.txt"
    for line in ("12 samples, mask 'all'", "min_side < 40", "left out", "50.00 %", "2 ids found here", "6 images"):
        assert line in told


def test_the_same_call_writes_the_same_bytes(root):
    def written():
        mask(root / "documents", "--name", "m", "--dedup", "near", "--min-side", 40)
        return [(root / "documents" / "masks" / f"m.{end}").read_bytes() for end in ("npy", "json")]

    first = written()
    shutil.rmtree(root / "documents" / "masks")
    assert written() == first


def test_duplicates_across_sources_by_precedence(root):
    shutil.copytree(root / "documents", root / "more")
    sources = (root / "documents", root / "more")
    refused(
        "more: nothing would be left of its 12 samples .12 by 'near dup", *sources, "--name", "m", "--dedup", "near"
    )
    assert list_masks(open_source(root / "documents")) == []
    mask(root / "documents", "--name", "few", "--keep-if", "score<=5")
    mask(*reversed(sources), "--name", "few", "--keep-if", "score<=5")
    mask(*sources, "--name", "m", "--dedup", "near", "--given", "few")
    assert left_out(root / "documents", "m") == [3]
    assert left_out(root / "more", "m") == [0, 1, 2, 3, 4, 5]


def test_drawings_by_the_pictures_of_another_source(root):
    mask(root / "drawings", "--name", "near", "--dedup", "near", "--images", root / "documents")
    assert left_out(root / "drawings", "near") == [3, 7]
    mask(root / "documents", "--name", "first", "--drop-if", "score==0")
    mask(root / "documents", "--name", "near", "--dedup", "near", "--given", "first")
    assert left_out(root / "documents", "near") == [7]


def test_a_list_of_what_to_keep(root):
    drawings = open_source(root / "drawings")
    np.save(root / "subset.npy", np.array([tuple(pair) for pair in drawings.uids[[2, 4]].tolist()], "u8,u8"))
    for kind in ("drawings", "documents"):
        told = mask(root / kind, "--name", "subset", "--uids", root / "subset.npy", "--keep")
        assert left_out(root / kind, "subset") == [n for n in range(NUM) if n not in (2, 4)]
        assert "2 ids listed" in told and "2 ids found here" in told


def test_looking_first_writes_nothing(root):
    told = mask(root / "documents", "--dry-run", "--min-side", 40)
    assert "nothing is written" in told and "min_side < 40" in told
    assert list_masks(open_source(root / "documents")) == []


def test_masks_are_listed_and_removed(root):
    mask(root / "documents", "--name", "a", "--min-side", 40)
    mask(root / "documents", "--name", "b", "--min-chars", 10)
    assert "a: leaves out 1 of 12 (min_side < 40 1)" in mask(root / "documents", "--list")
    assert "1 mask" in mask(root / "documents", "--remove", "a")
    assert list_masks(open_source(root / "documents")) == ["b"]
    manifest = root / "documents" / "janus.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "licence": "CC0"}))
    assert "was made for manifest" in mask(root / "documents", "--list")
    mask(root / "documents", "--remove", "b")
    refused("no mask 'b' to remove", root / "documents", "--remove", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-side", "40"], "needs a --name"),
        (["--name", "m"], "a mask needs a criterion"),
        (["--name", "../m", "--min-side", "40"], "is no name of a mask"),
        (["--name", "m", "--min-side", "9999"], "nothing would be left of its 12 samples"),
        (["--name", "m", "--keep-if", "score"], "is no rule"),
        (["--name", "m", "--keep-if", "beauty>5"], "no sample has 'beauty'; attributes there are: .*score"),
        (["--name", "m", "--keep-if", "score>high"], "score is a number"),
        (["--name", "m", "--keep"], "add --uids FILE"),
        (["--name", "m", "--uids", "none.txt"], "--uids needs --keep"),
        (["--name", "m", "--uids", "none.txt", "--drop"], "none.txt: no such file"),
        (["--name", "m", "--dedup", "near", "--distance", "11"], "must be 0 to 10"),
        (["--name", "m", "--dedup", "exact", "--distance", "4"], "with --dedup near"),
        (["--name", "m", "--dedup", "near", "--given", "x"], "no mask 'x', there is none"),
        (["--remove", "m"], "no mask 'm' to remove"),
    ],
)
def test_bad_calls(root, options, message):
    refused(message, root / "documents", *options)
    assert list_masks(open_source(root / "documents")) == []


def test_bad_directories(root):
    refused("is no directory of shards", root, "--name", "m", "--min-side", 40)
    refused("given twice", root / "documents", root / "documents", "--name", "m", "--dedup", "exact")
    refused("hold ids, not pictures", root / "drawings", "--name", "m", "--dedup", "near")


def test_tars_of_others_are_masked_where_they_lie(made, tmp_path):
    """A tar as img2dataset writes it; scores that the index does not keep come from its .json."""
    copies = [COPIES["webp"](scenes(NUM, side=96)[1]), encoded(scenes(1, side=96, seed=5)[0]), b""]
    copies[2] = copies[1]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for n, content in enumerate(copies):
            facts = {"caption": f"caption {n}", "clip_score": 0.2 + n / 10, "watermark": None, "source": "web"}
            key = "deep/" * 30 + f"{n:09d}"
            members = {"webp" if n == 0 else "JPG": content, "json": json.dumps(facts).encode()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_tars([tmp_path / "tars"], tmp_path / "index", load_text_tokenizer(made / "text.model"))
    before = (tmp_path / "tars" / "00000.tar").read_bytes()
    mask(tmp_path / "index", "--name", "score", "--keep-if", "clip_score>0.25", "--min-chars", 5)
    assert left_out(tmp_path / "index", "score") == [0]
    shutil.copytree(made / "documents", tmp_path / "documents")
    mask(tmp_path / "documents", tmp_path / "index", "--name", "near", "--dedup", "near")
    assert left_out(tmp_path / "index", "near") == [0, 2]
    mask(tmp_path / "index", "--name", "exact", "--dedup", "exact", "--drop-if", "clip_score>9")
    assert left_out(tmp_path / "index", "exact") == []
    refused("no sample has 'aesthetic'; .*clip_score", tmp_path / "index", "--name", "m", "--keep-if", "aesthetic>5")
    assert (tmp_path / "tars" / "00000.tar").read_bytes() == before
