"""A step does not depend on how its rows are cut into micro-batches, nor on how its documents are packed into rows."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from data_pipeline.schema import TokenKind
from janus_mega.models.janus import JanusChunk
from janus_mega.models.placement import place_batch
from tests.support.chunks import whole_chunk
from tests.support.ranks import results_of_ranks
from tests.support.tiny import SEQ_LEN, make_batch, random_row, tiny_model

CPU = torch.device("cpu")
KINDS = ("ugt", "tug", "gt", "uug")
COEFFICIENTS = torch.tensor([0.01, 0.02, 0.005])
LOSS_BAR = 1e-6
GRADIENT_BAR = 1e-6
"""Of the gradient of the whole model: norm of the difference over norm."""
FACTOR = 5

Row = dict[str, Tensor]
Found = tuple[Tensor, Tensor]
"""Loss sums per task; the gradients of all parameters, joined."""


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    return [random_row(generator, kinds) for kinds in KINDS]


def unpacked(row: Row) -> list[Row]:
    """Each document in a row of its own, the rest padding."""
    found, used = [], 0
    for start, stop in pairwise(row["cu_seqlens"].tolist()):
        kinds = row["token_kind"][start:stop]
        if (kinds == TokenKind.pad).all():
            continue
        length, alone = stop - start, {}
        for name, values in row.items():
            if name in ("cu_seqlens", "pixel_values"):
                continue
            alone[name] = torch.full_like(values, int(TokenKind.pad) if name == "token_kind" else 0)
            alone[name][:length] = values[start:stop]
        alone["position_ids"][length:] = torch.arange(SEQ_LEN - length)
        alone["cu_seqlens"] = torch.tensor([0, length, SEQ_LEN], dtype=torch.int32)
        num_images = int((kinds == TokenKind.image_und).sum()) // 16
        alone["pixel_values"] = row["pixel_values"][used : used + num_images]
        used += num_images
        found.append(alone)
    return found


def trained_on(chunk: JanusChunk, parameters: dict[str, torch.nn.Parameter], batches: list[Row]) -> Found:
    """What some micro-batches sum up to."""
    chunk.zero_grad()
    sums = torch.zeros(3)
    for batch in batches:
        of_batch = chunk(place_batch(batch, CPU))
        torch.dot(of_batch, COEFFICIENTS).backward()
        sums += of_batch.detach()
    return sums, torch.cat([parameter.grad.flatten() for _, parameter in sorted(parameters.items())])


def splits() -> list[Found]:
    """4x1, 2x2 and 1x4 (micro-batches x rows), every document in a row of its own, and two of them seen as one; in a
    lone rank."""
    chunk, parameters = whole_chunk(tiny_model())
    whole = rows()
    cut = [[make_batch(whole[at : at + size]) for at in range(0, 4, size)] for size in (1, 2, 4)]
    alone = [make_batch([document]) for row in whole for document in unpacked(row)]
    joined = [make_batch([row]) for row in whole]
    joined[0]["cu_seqlens"] = torch.cat((joined[0]["cu_seqlens"][:1], joined[0]["cu_seqlens"][2:]))
    return [trained_on(chunk, parameters, batches) for batches in (*cut, alone, joined)]


@pytest.fixture(scope="module")
def found() -> list[Found]:
    (result,) = results_of_ranks(splits, 1)
    return result


def off(found: Found, expected: Found) -> tuple[float, float]:
    loss = ((found[0] - expected[0]).abs() / expected[0].abs()).max().item()
    return loss, ((found[1] - expected[1]).norm() / expected[1].norm()).item()


@pytest.mark.parametrize(("other", "name"), [(1, "2x2"), (2, "1x4"), (3, "unpacked")])
def test_splits_and_packing_are_equal(other: int, name: str, found: list[Found], record_property) -> None:
    loss, gradient = off(found[other], found[0])
    record_property(name, f"loss {loss:.1e} gradient {gradient:.1e}")
    assert loss <= LOSS_BAR  # measured worst 2.3e-7
    assert gradient <= GRADIENT_BAR  # measured worst 2.4e-7


def test_documents_that_see_each_other_are_noticed(found: list[Found], record_property) -> None:
    loss, gradient = off(found[4], found[0])
    record_property("over_bar", (loss / LOSS_BAR, gradient / GRADIENT_BAR))
    assert loss >= FACTOR * LOSS_BAR
    assert gradient >= FACTOR * GRADIENT_BAR


def test_every_document_was_unpacked() -> None:
    whole = rows()
    documents = [document for row in whole for document in unpacked(row)]
    for name in ("label_head", "pixel_values"):
        assert sum(int((d[name] > 0).sum()) for d in documents) == sum(int((row[name] > 0).sum()) for row in whole)
