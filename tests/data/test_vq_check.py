"""Image ids against their pictures: the right ones agree, and every way of being wrong is seen."""

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.explain.vq_check import check_image_ids, psnr_db, vq_lines
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from tests.support.raw import ColourTokenizer, train_tokenizer, write_jsonl, write_raw


class ColourCodec(ColourTokenizer):
    """Decodes to squares of the codes' colours."""

    def decode(self, ids):
        cell = self.image_size // self.grid
        cells = self.codes[ids].reshape(len(ids), self.grid, self.grid, 3).transpose(0, 3, 1, 2)
        return cells.repeat(cell, axis=2).repeat(cell, axis=3).round().astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Captioned pictures as ids (three crops each), and the same pictures as documents under the same names."""
    root = tmp_path_factory.mktemp("made")
    raw, tokenizer = write_raw(root / "raw"), train_tokenizer(root)
    options = PrepareOptions(samples_per_shard=5, record_size=3, crops=3, flips=True)
    prepare_t2i([raw["t2i"]], root / "t2i", tokenizer, ColourCodec(), options=options)
    pairs = [
        {"id": f"c{n}", "image": f"pictures/{n:03d}.{('png', 'jpeg', 'webp')[n % 3]}", "question": "?", "answer": "a"}
        for n in range(8)
    ]
    documents = write_jsonl(root / "raw" / "pairs.jsonl", pairs)
    prepare_interleaved([documents], root / "documents", tokenizer, options=PrepareOptions(samples_per_shard=5))
    return root


def test_ids_of_the_right_pictures_agree(made):
    seen = []
    found = check_image_ids(
        made / "t2i", ColourCodec(), [made / "raw" / "captions.jsonl"], progress=lambda *step: seen.append(step)
    )
    assert (found.num_asked, found.num_found, found.num_identical, found.agreement) == (12, 12, 12, 1.0)
    assert 5 < found.min_psnr_db <= found.psnr_db < 60
    assert seen[-1] == (12, 12)
    assert any("100.000%" in line for line in vq_lines(found))


def test_pictures_are_joined_from_documents_by_uid(made):
    found = check_image_ids(made / "t2i", ColourCodec(), [made / "documents"])
    assert (found.num_asked, found.num_found, found.agreement) == (12, 8, 1.0)
    both = check_image_ids(made / "t2i", ColourCodec(), [made / "documents", made / "raw" / "captions.jsonl"])
    assert (both.num_found, both.agreement) == (12, 1.0)


def test_a_sample_is_a_sample(made):
    few = check_image_ids(made / "t2i", ColourCodec(), [made / "raw" / "captions.jsonl"], num_pictures=4)
    again = check_image_ids(made / "t2i", ColourCodec(), [made / "raw" / "captions.jsonl"], num_pictures=4)
    assert few == again and few.num_found == 4


def test_another_tokenizer_is_refused_with_both_digests(made):
    other = ColourCodec(codebook_size=32)
    with pytest.raises(UserError, match=rf"{ColourCodec().digest}.*{other.digest}") as error:
        check_image_ids(made / "t2i", other, [made / "raw" / "captions.jsonl"])
    assert "\n" not in str(error.value)


def test_an_encoder_that_drifts_is_measured(made):
    class Drifting(ColourCodec):
        def encode(self, images):
            ids = super().encode(images)
            ids[:, 0] = (ids[:, 0] + 1) % self.codebook_size
            return ids

    found = check_image_ids(made / "t2i", Drifting(), [made / "raw" / "captions.jsonl"])
    assert found.agreement == pytest.approx(15 / 16) and found.num_identical == 0
    assert found.worst[0].agreement == pytest.approx(15 / 16)


def test_mixed_up_pictures_are_seen(made):
    swapped = [
        {"id": f"c{n}", "image": f"pictures/{n ^ 1:03d}.{('png', 'jpeg', 'webp')[(n ^ 1) % 3]}", "caption": "x"}
        for n in range(12)
    ]
    records = write_jsonl(made / "raw" / "swapped.jsonl", swapped)
    found = check_image_ids(made / "t2i", ColourCodec(), [records])
    right = check_image_ids(made / "t2i", ColourCodec(), [made / "raw" / "captions.jsonl"])
    assert found.agreement < 0.5 and found.psnr_db < right.psnr_db - 5


def test_sources_without_ids_and_unrelated_pictures_are_refused(made):
    with pytest.raises(UserError, match="kind interleaved and holds no image ids"):
        check_image_ids(made / "documents", ColourCodec(), [made / "raw" / "captions.jsonl"])
    with pytest.raises(UserError, match="none of 12 pictures is in"):
        check_image_ids(made / "t2i", ColourCodec(), [made / "raw" / "documents.jsonl"])
    with pytest.raises(UserError, match="holds no pictures"):
        check_image_ids(made / "t2i", ColourCodec(), [made / "t2i"])


def test_psnr_of_known_errors():
    flat = np.full((3, 4, 4), 100, np.uint8)
    assert psnr_db(flat, flat) == 100
    assert psnr_db(flat, flat + np.uint8(10)) == pytest.approx(28.131, abs=1e-3)
