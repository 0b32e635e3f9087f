"""Ranks and coordinates: a bijection, tp fastest, pp slowest."""

import pytest

from data_pipeline.errors import UserError
from janus_mega.parallel.layout import chunk_places, make_layout

SHAPES = [(1, 1, 1), (8, 2, 2), (8, 2, 1), (8, 1, 4), (12, 2, 3), (16, 4, 2)]


@pytest.mark.parametrize(("world_size", "tp_size", "pp_size"), SHAPES)
def test_ranks_and_coordinates_are_a_bijection(world_size: int, tp_size: int, pp_size: int) -> None:
    layouts = [make_layout(world_size, rank, tp_size, pp_size) for rank in range(world_size)]
    dp_size = layouts[0].dp_size
    assert tp_size * pp_size * dp_size == world_size
    assert [(layout.pp_rank, layout.dp_rank, layout.tp_rank) for layout in layouts] == [
        (pp, dp, tp) for pp in range(pp_size) for dp in range(dp_size) for tp in range(tp_size)
    ]


def test_a_world_that_does_not_divide_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"6 ranks cannot be cut into tp_size 2 x pp_size 2: start a multiple of 4"):
        make_layout(6, 0, 2, 2)


@pytest.mark.parametrize(("layer_counts", "pp_size"), [((24,), 1), ((7, 6, 6, 5), 4), ((2, 1, 2, 1), 2), ((1,) * 6, 3)])
def test_chunks_share_all_layers_in_the_order_of_the_stream(layer_counts: tuple[int, ...], pp_size: int) -> None:
    ranks = [chunk_places(layer_counts, pp_size, rank) for rank in range(pp_size)]
    in_order = [place for round_ in zip(*ranks, strict=True) for place in round_]
    assert [layer for place in in_order for layer in place.layers] == list(range(sum(layer_counts)))
    assert tuple(len(place.layers) for place in in_order) == layer_counts
    assert [place.is_first for place in in_order] == [True] + [False] * (len(in_order) - 1)
    assert [place.is_last for place in in_order] == [False] * (len(in_order) - 1) + [True]
