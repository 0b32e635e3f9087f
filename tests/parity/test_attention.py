"""DocumentAttention is causal softmax attention under a block mask: values and gradients, on the CPU."""

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from janus_mega.config.schema import ParallelConfig, Precision
from janus_mega.models import attention as attention_module
from janus_mega.models.attention import _BUCKET_LENGTHS, DocumentAttention, _bucket_length, document_spans, has_flash
from janus_mega.models.backbone import transformer_config
from tests.support.tiny import fp32, tiny_model

BAR = 5e-6  # measured worst 2.2e-6, where the gradient is zero; elsewhere 3e-7
HEAD_DIM = 16
CPU = torch.device("cpu")

# Row lengths are the sums; documents of every bucket up to 512, at its edge and beside it.
ROWS = {
    "many_buckets": [[1, 7, 8, 9, 15, 16, 17, 24, 25, 31, 33, 47, 49, 65, 97, 2]],
    "long": [[129, 193, 257, 385, 36]],
    "one_document_a_row": [[64], [64], [64]],
    "length_one_documents": [[1] * 12],
    "mixed_rows": [[30, 1, 9], [40], [1, 39]],
    "with_empty_document": [[8, 0, 8]],
}


def block_causal(query: Tensor, key: Tensor, value: Tensor, rows: list[list[int]]) -> Tensor:
    """[s, b, n, d], [s, b, k, d] twice -> [s, b, n * d], with a dense mask."""
    num_heads = query.shape[2]
    key, value = (x.repeat_interleave(num_heads // x.shape[2], dim=2) for x in (key, value))
    document = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    seq_len = document.shape[1]
    mask = (document[:, :, None] == document[:, None, :]) & torch.ones(seq_len, seq_len).tril().bool()
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / math.sqrt(HEAD_DIM)
    weights = torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)


def attention() -> DocumentAttention:
    config = transformer_config(tiny_model().backbone, fp32())
    return DocumentAttention(config, 1, AttnMaskType.causal, "self")


def document_attention(query: Tensor, key: Tensor, value: Tensor, rows: list[list[int]]) -> Tensor:
    borders = torch.tensor([0, *(length for row in rows for length in row)]).cumsum(0).int()
    spans = document_spans(borders, len(rows), sum(rows[0]), CPU)
    return attention()(query, key, value, None, packed_seq_params=spans)


def random_inputs(rows: list[list[int]], num_heads: int, num_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(rows[0]), len(rows))
    return [
        torch.randn(*shape, heads, HEAD_DIM, generator=generator).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def with_gradients(function, inputs: list[Tensor], rows: list[list[int]]) -> list[Tensor]:
    out = function(*inputs, rows)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, towards)]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative; where softmax is over one token, gradients of queries and keys are zero and the difference absolute."""
    return max(((a - b).norm() / b.norm().clamp(min=1.0)).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", ROWS)
def test_equals_a_dense_block_mask(name: str, heads: tuple[int, int], record_property) -> None:
    rows = ROWS[name]
    inputs = random_inputs(rows, *heads)
    difference = worst(with_gradients(document_attention, inputs, rows), with_gradients(block_causal, inputs, rows))
    record_property("worst", difference)
    assert difference <= BAR


def dense_varlen(query, key, value, borders, key_borders, longest, longest_key, **options) -> Tensor:
    """What `varlen_attn` gives for row-first tokens [t, n, d]: each document by itself."""
    lengths = borders.diff().tolist()
    assert (longest, options["window_size"], query.is_contiguous()) == (max(lengths), (-1, 0), True)
    assert torch.equal(key_borders, borders) and longest_key == longest
    assert options["enable_gqa"] == (key.shape[1] != query.shape[1])
    parts = zip(*(x.split(lengths) for x in (query, key, value)), lengths, strict=True)
    outs = [block_causal(*(x[:, None] for x in part), [[length]])[:, 0] for *part, length in parts if length]
    return torch.cat(outs).view(query.shape)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", ROWS)
def test_flash_attention_gets_whole_documents(
    name: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "has_flash", lambda device, dtype: True)
    monkeypatch.setattr(attention_module, "varlen_attn", dense_varlen)
    rows = ROWS[name]
    inputs = random_inputs(rows, *heads)
    found, expected = with_gradients(document_attention, inputs, rows), with_gradients(block_causal, inputs, rows)
    assert found[0].is_contiguous()
    assert worst(found, expected) <= BAR


def test_flash_attention_is_for_half_precision_on_cuda() -> None:
    cuda = torch.device("cuda")
    assert has_flash(cuda, torch.bfloat16) and has_flash(cuda, torch.float16)
    assert not has_flash(cuda, torch.float32)
    assert not has_flash(CPU, torch.bfloat16)


def test_buckets_lie_where_attention_runs() -> None:
    spans = document_spans(torch.tensor([0, 3, 8], dtype=torch.int32), 1, 8, torch.device("meta"), torch.float32)
    assert spans.unbucket.is_meta and all(flat.is_meta for flat, _, _ in spans.buckets)


def test_a_moved_border_is_noticed() -> None:
    inputs = random_inputs([[30, 10]], 4, 2)
    found = with_gradients(document_attention, inputs, [[30, 10]])
    for rows in ([[29, 11]], [[40]], [[10, 30]]):
        assert worst(found, with_gradients(block_causal, inputs, rows)) >= 1000 * BAR


def test_nothing_of_size_s_squared_is_stored() -> None:
    rows = [[8] * 64]
    borders = torch.arange(0, 513, 8, dtype=torch.int32)
    spans = document_spans(borders, 1, sum(rows[0]), CPU)
    assert [(documents, length) for _, documents, length in spans.buckets] == [(64, 8)]


def test_every_length_has_a_bucket_that_holds_it() -> None:
    assert list(_BUCKET_LENGTHS) == sorted(set(_BUCKET_LENGTHS))
    for length in (1, 8, 9, 100, 4096, 4097, 8192, 10_000):
        bucket = _bucket_length(length)
        assert length <= bucket
        assert bucket <= max(8, 2 * length)
    assert _bucket_length(10_001) == 10_016


def test_bf16_keeps_its_format() -> None:
    rows = [[20, 12]]
    inputs = [x.detach().bfloat16() for x in random_inputs(rows, 4, 2)]
    config = transformer_config(tiny_model().backbone, ParallelConfig(precision=Precision.bf16))
    assert config.params_dtype == torch.bfloat16
    out = document_attention(*inputs, rows)
    assert out.dtype == torch.bfloat16
    reference = block_causal(*(x.float() for x in inputs), rows)
    assert ((out.float() - reference).norm() / reference.norm()).item() <= 1e-2


def test_other_attention_is_refused() -> None:
    config = transformer_config(tiny_model().backbone, fp32())
    with pytest.raises(ValueError, match="causal self-attention"):
        DocumentAttention(config, 1, AttnMaskType.padding, "self")
    query, key, value = random_inputs([[4]], 2, 2)
    with pytest.raises(ValueError, match="DocumentSpans"):
        attention()(query, key, value, None)
    with pytest.raises(ValueError, match="DocumentSpans"):
        attention()(
            query,
            key,
            value,
            torch.ones(4, 4),
            packed_seq_params=document_spans(torch.tensor([0, 4], dtype=torch.int32), 1, 4, CPU),
        )
