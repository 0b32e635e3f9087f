"""Tables of names: bit-equal both ways, every tensor exactly once, the fused layouts spelled out by hand."""

import pytest
import torch

from data_pipeline.errors import UserError
from janus_mega.checkpoint.hf.names import HF_ROWS
from janus_mega.checkpoint.name_map import (
    BATCHED,
    HALVES,
    JOIN_THREE,
    QKV,
    UNIT_ROWS,
    Heads,
    convert,
    plan_export,
    plan_import,
    row,
)
from janus_mega.checkpoint.trained import heads_of, open_trained
from tests.support.trained import MODEL

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=3)
ROWS = (row("a.{n}.qkv", ("b.{n}.q", "b.{n}.k", "b.{n}.v"), QKV), row("norm.{p}", "ln.{p}"))


def test_qkv_is_grouped_by_kv_head() -> None:
    """Rows are numbered by what they are: 100 * head + row for q, 1000 and 2000 more for k and v."""
    q = torch.arange(4)[:, None] * 100 + torch.arange(3)
    k, v = (kind + torch.arange(2)[:, None] * 100 + torch.arange(3) for kind in (1000, 2000))
    fused = torch.cat([torch.cat([q[2 * g], q[2 * g + 1], k[g], v[g]]) for g in range(2)])[:, None].float()
    parts = QKV.forward([fused], HEADS)
    assert [part.flatten().tolist() for part in parts] == [x.flatten().tolist() for x in (q, k, v)]
    assert torch.equal(QKV.backward(parts, HEADS)[0], fused)


@pytest.mark.parametrize("transform", [HALVES, BATCHED])
def test_transforms_undo_themselves(transform: object) -> None:
    value = torch.randn(6, 5)
    assert torch.equal(transform.backward(transform.forward([value], HEADS), HEADS)[0], value)


def test_join_three_is_undone() -> None:
    parts = [torch.randn(2, 3) for _ in range(3)]
    back = JOIN_THREE.backward(JOIN_THREE.forward(parts, HEADS), HEADS)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_unit_rows_are_unit_and_repeating_changes_nothing() -> None:
    (once,) = UNIT_ROWS.forward([torch.randn(50, 8)], HEADS)
    assert torch.allclose(once.norm(dim=-1), torch.ones(50), atol=1e-6)
    assert torch.equal(UNIT_ROWS.forward([once], HEADS)[0], once)


def test_every_tensor_of_a_checkpoint_goes_out_and_comes_back_bit_equal(checkpoint) -> None:
    trained = open_trained(checkpoint)
    ours = {name: trained.read(name) for name in trained.names}
    theirs = dict(convert(plan_export(HF_ROWS, ours), ours.__getitem__, heads_of(MODEL)))
    back = dict(convert(plan_import(HF_ROWS, theirs), theirs.__getitem__, heads_of(MODEL)))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    again = dict(convert(plan_export(HF_ROWS, back), back.__getitem__, heads_of(MODEL)))
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_unknown_incomplete_and_doubled_names_are_refused() -> None:
    with pytest.raises(UserError, match="tensor stray: 0 rows"):
        plan_export(ROWS, ["a.0.qkv", "stray"])
    with pytest.raises(UserError, match=r"tensor b\.3\.v: missing beside b\.3\."):
        plan_import(ROWS, ["b.3.q", "b.3.k"])
    with pytest.raises(UserError, match="tensor x: two rows"):
        plan_export((row("a", "x"), row("b", "x")), ["a", "b"])
    with pytest.raises(UserError, match="tensor a: 2 rows"):
        plan_export((row("a", "x"), row("a", "y")), ["a"])


def test_convert_holds_one_group_at_a_time() -> None:
    read = []
    weights = convert(plan_export(ROWS, ["a.0.qkv", "a.1.qkv"]), lambda name: _note(read, name), HEADS)
    next(weights)
    assert read == ["a.0.qkv"]


def _note(read: list[str], name: str) -> torch.Tensor:
    read.append(name)
    return torch.zeros(24, 2)
