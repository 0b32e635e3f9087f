"""Frozen weights as they are saved: fp32 themselves, everything else a copy on the host, or only its outline."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from janus_mega.engine.state import weight_slices


def slices_of(weight: torch.Tensor, *, outlines: bool) -> Any:
    engine: Any = SimpleNamespace(groups=SimpleNamespace(layout=SimpleNamespace(tp_rank=0, dp_rank=0)))
    shape = tuple(weight.shape)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    region = SimpleNamespace(local_offset=(0, 0), global_offset=(0, 0), shape=shape)
    shard: Any = SimpleNamespace(
        parameter=parameter, is_cut=False, name="w", global_shape=shape, local_shape=shape, regions=(region,)
    )
    (piece,) = weight_slices(engine, [shard], outlines=outlines)
    return piece


@pytest.mark.parametrize("outlines", [False, True])
def test_fp32_is_told_as_it_lies(outlines: bool) -> None:
    weight = torch.randn(6, 4)
    assert slices_of(weight, outlines=outlines).tensor.data_ptr() == weight.data_ptr()


def test_bf16_is_written_as_fp32_and_its_outline_has_no_content() -> None:
    weight = torch.randn(6, 4).bfloat16()
    piece, outline = slices_of(weight, outlines=False), slices_of(weight, outlines=True)
    assert piece.tensor.device.type == "cpu" and torch.equal(piece.tensor, weight.float())
    assert outline.tensor.is_meta
    assert (outline.tensor.nbytes, outline.tensor.dtype, outline.box) == (96, torch.float32, piece.box)
