"""Anchors fill empty groups, join the graph, and change nothing."""

import torch
from torch import Tensor, nn

from janus_mega.engine.anchors import AnchoredChunks
from janus_mega.optim.param_groups import ParamGroup

CPU = torch.device("cpu")


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def groups() -> list[ParamGroup]:
    return [
        ParamGroup("full", 1.0, 0.1, [nn.Parameter(torch.ones(3))]),
        ParamGroup("empty", 0.5, 0.1),
        ParamGroup("also_empty", 0.5, 0.0),
    ]


def test_every_group_has_a_parameter_afterwards() -> None:
    given = groups()
    full = given[0].parameters[0]
    anchored = AnchoredChunks([Double()], given, CPU, torch.bfloat16)
    assert [len(group.parameters) for group in given] == [1, 1, 1]
    assert given[0].parameters[0] is full
    assert list(anchored.anchors) == [given[1].parameters[0], given[2].parameters[0]]
    assert {(anchor.numel(), anchor.dtype) for anchor in anchored.anchors} == {(1, torch.bfloat16)}


def test_anchors_get_a_gradient_of_zero_and_change_nothing() -> None:
    anchored = AnchoredChunks([Double()], groups(), CPU, torch.float32)
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    out = anchored(x)
    assert torch.equal(out, 2 * x)
    out.sum().backward()
    assert [anchor.grad.item() for anchor in anchored.anchors] == [0.0, 0.0]
    assert x.grad.tolist() == [2.0, 2.0]


def test_no_anchor_where_no_group_is_empty() -> None:
    anchored = AnchoredChunks([Double()], groups()[:1], CPU, torch.float32)
    assert len(anchored.anchors) == 0
    x = torch.ones(2)
    assert torch.equal(anchored(x), 2 * x)


def test_output_keeps_its_format() -> None:
    anchored = AnchoredChunks([Double()], groups(), CPU, torch.float32)
    assert anchored(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
