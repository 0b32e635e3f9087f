"""Ranks and coordinates: a bijection, tp fastest, pp slowest."""

import pytest

from data_pipeline.errors import UserError
from janus_mega.parallel.layout import layer_range, make_layout

SHAPES = [(1, 1, 1), (8, 2, 2), (8, 2, 1), (8, 1, 4), (12, 2, 3), (16, 4, 2)]


@pytest.mark.parametrize(("world_size", "tp_size", "pp_size"), SHAPES)
def test_ranks_and_coordinates_are_a_bijection(world_size: int, tp_size: int, pp_size: int) -> None:
    layouts = [make_layout(world_size, rank, tp_size, pp_size) for rank in range(world_size)]
    dp_size = layouts[0].dp_size
    assert tp_size * pp_size * dp_size == world_size
    assert [(layout.pp_rank, layout.dp_rank, layout.tp_rank) for layout in layouts] == [
        (pp, dp, tp) for pp in range(pp_size) for dp in range(dp_size) for tp in range(tp_size)
    ]


def test_ends_of_the_pipeline() -> None:
    ends = [(lay.is_first_pp_rank, lay.is_last_pp_rank) for lay in (make_layout(3, rank, 1, 3) for rank in range(3))]
    assert ends == [(True, False), (False, False), (False, True)]
    alone = make_layout(1, 0, 1, 1)
    assert alone.is_first_pp_rank and alone.is_last_pp_rank


def test_a_world_that_does_not_divide_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"6 ranks cannot be cut into tp_size 2 x pp_size 2: start a multiple of 4"):
        make_layout(6, 0, 2, 2)


@pytest.mark.parametrize(("num_layers", "pp_size"), [(24, 1), (24, 4), (6, 3), (2, 2)])
def test_pipeline_ranks_share_all_layers_in_order(num_layers: int, pp_size: int) -> None:
    shares = [layer_range(num_layers, pp_size, rank) for rank in range(pp_size)]
    assert [layer for share in shares for layer in share] == list(range(num_layers))
    assert len({len(share) for share in shares}) == 1
