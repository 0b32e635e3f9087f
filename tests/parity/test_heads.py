"""Heads and text embedding cut over tp equal plain torch: values, logits, gradients, scored whole or in chunks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor, nn

from janus_mega.config.schema import LossConfig
from janus_mega.models.backbone import transformer_config
from janus_mega.models.heads import ImageHead, VocabParallelHead
from janus_mega.models.sharding import sharded_parameters
from janus_mega.parallel.groups import build_groups
from janus_mega.parallel.layout import Layout
from janus_mega.parallel.slices import Slice, assemble_all, index_of, slices_of_local
from tests.support.ranks import results_of_ranks
from tests.support.tiny import fp32, tiny_model

pytestmark = pytest.mark.dist

BAR = 2e-6  # measured worst 2.6e-7
NUM_IDS, NUM_CODES, INNER, NUM_LABELS = 48, 24, 40, 21
SHAPES = {
    "text_embedding.weight": (NUM_IDS, 64),
    "text_head.weight": (NUM_IDS, 64),
    "image_head.fc1.weight": (INNER, 64),
    "image_head.fc1.bias": (INNER,),
    "image_head.fc2.weight": (NUM_CODES, INNER),
    "image_head.fc2.bias": (NUM_CODES,),
}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of labelled positions, text labels, image labels."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(NUM_LABELS, 64, generator=generator)
    text = torch.randint(NUM_IDS, (NUM_LABELS,), generator=generator)
    return hidden, text, torch.randint(NUM_CODES, (NUM_LABELS,), generator=generator)


class Ends(nn.Module):
    """The modules of a chunk that are cut over the vocabulary, under their names."""

    def __init__(self, tp_size: int, loss: LossConfig) -> None:
        super().__init__()
        config = transformer_config(tiny_model().backbone, fp32(tp_size))
        self.text_embedding = VocabParallelEmbedding(NUM_IDS, 64, init_method=nn.init.zeros_, config=config)
        self.text_head = VocabParallelHead(config, NUM_IDS, loss)
        self.image_head = ImageHead(config, INNER, NUM_CODES, loss)


def run_cut(tp_size: int, loss: LossConfig) -> dict[str, object]:
    groups = build_groups(tp_size, 1)
    ends = Ends(tp_size, loss)
    shards = list(sharded_parameters([ends], Layout(tp_size, tp_size, 1, dist.get_rank())))
    full = weights()
    with torch.no_grad():
        for shard in shards:
            shard.parameter.copy_(shard.cut(lambda box, name=shard.name: full[name][index_of(box)]))
    hidden, text, codes = inputs()
    hidden.requires_grad_()
    states = hidden + ends.text_embedding(text)
    sums = torch.stack((ends.text_head(states, text), ends.image_head(states, codes)))
    torch.dot(sums, torch.tensor([1.0, 0.5])).backward()
    gradients = [
        (piece.name, piece.global_shape, piece.offset, piece.tensor.clone())
        for shard in shards
        if shard.is_cut or groups.layout.tp_rank == 0
        for piece in slices_of_local(shard.name, shard.global_shape, shard.regions, shard.parameter.grad)
    ]
    logits = [head(states.detach()).detach() for head in (ends.text_head, ends.image_head)]
    return {"sums": sums.detach(), "hidden": hidden.grad, "gradients": gradients, "logits": logits}


def run_plain(z_loss: float) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Tensor]]:
    leaves = {name: value.requires_grad_() for name, value in weights().items()}
    hidden, text, codes = inputs()
    hidden.requires_grad_()
    states = hidden + leaves["text_embedding.weight"][text]
    inner = F.gelu(states @ leaves["image_head.fc1.weight"].T + leaves["image_head.fc1.bias"])
    logits = [
        states @ leaves["text_head.weight"].T,
        inner @ leaves["image_head.fc2.weight"].T + leaves["image_head.fc2.bias"],
    ]
    sums = torch.stack(
        [
            F.cross_entropy(found, labels, reduction="sum") + z_loss * found.logsumexp(-1).square().sum()
            for found, labels in zip(logits, (text, codes), strict=True)
        ]
    )
    torch.dot(sums, torch.tensor([1.0, 0.5])).backward()
    return sums.detach(), hidden.grad, {name: leaf.grad for name, leaf in leaves.items()}, [x.detach() for x in logits]


@pytest.mark.parametrize("z_loss", [0.0, 1e-2], ids=["plain", "z_loss"])
@pytest.mark.parametrize("chunk_tokens", [4096, 8], ids=["whole", "chunks"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_cut_equals_plain(tp_size: int, chunk_tokens: int, z_loss: float, record_property) -> None:
    sums, hidden, gradients, logits = run_plain(z_loss)
    loss = LossConfig(chunk_tokens=chunk_tokens, z_loss=z_loss)
    ranks = results_of_ranks(run_cut, tp_size, tp_size, loss)
    found = assemble_all(Slice(*piece) for rank in ranks for piece in rank["gradients"])
    assert found.keys() == gradients.keys()
    pairs = [(found[name], gradients[name]) for name in gradients]
    for rank in ranks:
        pairs += [(rank["sums"], sums), (rank["hidden"], hidden), *zip(rank["logits"], logits, strict=True)]
    worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    record_property("worst", worst)
    assert worst <= BAR


def without_gradient(z_loss: float) -> Tensor:
    """Sums of the heads as validation sees them."""
    build_groups(1, 1)
    ends = Ends(1, LossConfig(z_loss=z_loss))
    with torch.no_grad():
        for name, value in weights().items():
            ends.get_parameter(name).copy_(value)
        hidden, text, codes = inputs()
        return torch.stack((ends.text_head(hidden, text), ends.image_head(hidden, codes)))


def test_validation_reports_cross_entropy_alone() -> None:
    (plain,), (with_z,) = results_of_ranks(without_gradient, 1, 0.0), results_of_ranks(without_gradient, 1, 1.0)
    assert torch.equal(plain, with_z)


def in_bf16(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of the text head over many labels, and its gradient, with weights that bf16 holds exactly."""
    build_groups(1, 1)
    head = Ends(1, LossConfig()).text_head.to(dtype)
    generator = torch.Generator().manual_seed(2)
    hidden, labels = torch.randn(1000, 64, generator=generator), torch.randint(NUM_IDS, (1000,), generator=generator)
    with torch.no_grad():
        head.weight.copy_(weights()["text_head.weight"].bfloat16())
    loss = head(hidden.bfloat16().to(dtype), labels)
    loss.backward()
    return loss.detach(), head.weight.grad.float()


def test_bf16_loss_is_summed_in_fp32(record_property) -> None:
    (half,), (full,) = results_of_ranks(in_bf16, 1, torch.bfloat16), results_of_ranks(in_bf16, 1, torch.float32)
    loss, gradient = (((a - b).norm() / b.norm()).item() for a, b in zip(half, full, strict=True))
    record_property("worst", f"{loss} {gradient}")
    assert half[0].dtype == torch.float32
    assert loss <= 2e-4  # a sum rounded to bf16 is up to 2e-3 off
    assert gradient <= 5e-3
