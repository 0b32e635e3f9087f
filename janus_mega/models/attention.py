"""Causal attention inside packed documents: no token sees another document, nothing of size s x s is stored.

`DocumentSpans` is computed once per micro-batch and travels through megatron's layers as their packed-sequence
argument. On CUDA the spans feed torch's varlen flash attention. On the CPU, which has no varlen kernel, documents of
similar length are attended together: each is padded at its end to its bucket's length, which causality hides from every
real token. Attention is the same function of (query, key, value) either way; a test compares both with a block mask.

Shapes: `s` seq_len, `b` rows, `n` query heads here, `k` kv heads here, `d` head_dim, `t` = s * b tokens. Flat
positions are sequence-first (position * b + row), as megatron's `[s, b, ...]` tensors flatten.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

_BUCKET_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LONG_STEP = 16
"""Lengths documents are padded to on the CPU; longer ones to a multiple of the step: what is padded costs its square,
a call of its own next to nothing."""


@dataclass
class DocumentSpans(PackedSeqParams):
    """Where documents lie in a micro-batch; `qkv_format` sbhd keeps megatron's own packed paths out of the way."""

    qkv_format: str = "sbhd"
    row_first: Tensor | None = None
    """int64 [t]: flat (sequence-first) position of each token in row-first order. CUDA only."""
    sequence_first: Tensor | None = None
    """int64 [t]: inverse of row_first. CUDA only."""
    buckets: list[tuple[Tensor, int, int]] = field(default_factory=list)
    """CPU only. Per bucket: int64 [documents * length] flat positions of tokens (0 for padding), and both factors."""
    unbucket: Tensor | None = None
    """int64 [t]: where each flat position's output lies in the concatenated buckets. CPU only."""


def document_spans(cu_seqlens: Tensor, num_rows: int, seq_len: int, device: torch.device) -> DocumentSpans:
    """Prepares a micro-batch's documents for attention.

    Args:
        cu_seqlens: int32 [documents + 1] on the CPU, borders over the row-first flattened tokens.
        num_rows: b.
        seq_len: s.
        device: where attention will run.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    tokens = torch.arange(num_rows * seq_len)
    row_first = tokens % seq_len * num_rows + tokens // seq_len
    if device.type == "cuda":
        return DocumentSpans(
            cu_seqlens_q=cu_seqlens.to(device, non_blocking=True),
            max_seqlen_q=int(lengths.max()),
            row_first=row_first.to(device, non_blocking=True),
            sequence_first=torch.argsort(row_first).to(device, non_blocking=True),
        )
    buckets = []
    unbucket = torch.empty_like(row_first)
    starts = cu_seqlens[:-1].long()
    padded = torch.tensor([_bucket_length(length) for length in lengths.tolist()])
    filled = 0
    for bucket_len in padded.unique().tolist():
        chosen = (padded == bucket_len) & (lengths > 0)
        if not chosen.any():
            continue
        offsets = torch.arange(bucket_len)
        is_token = offsets < lengths[chosen, None]  # [documents, bucket_len]
        positions = torch.where(is_token, starts[chosen, None] + offsets, 0)
        flat = torch.where(is_token, row_first[positions], 0).flatten()
        slots = filled + torch.arange(flat.numel())
        unbucket[flat[is_token.flatten()]] = slots[is_token.flatten()]
        buckets.append((flat, int(chosen.sum()), bucket_len))
        filled += flat.numel()
    return DocumentSpans(buckets=buckets, unbucket=unbucket)


def _bucket_length(length: int) -> int:
    for bucket_len in _BUCKET_LENGTHS:
        if length <= bucket_len:
            return bucket_len
    return -(-length // _LONG_STEP) * _LONG_STEP


class DocumentAttention(nn.Module):
    """megatron's core attention, per document; the constructor is the one megatron's specs call."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or attention_type != "self" or cp_comm_type not in (None, "p2p"):
            raise ValueError(
                f"DocumentAttention computes causal self-attention without context parallelism, not "
                f"{attn_mask_type}, {attention_type}, {cp_comm_type}"
            )
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: DocumentSpans | None = None,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, k, d] -> [s, b, n * d]."""
        if packed_seq_params is None or attention_mask is not None or attention_bias is not None:
            raise ValueError("DocumentAttention takes its structure from DocumentSpans, not from masks or biases")
        seq_len, num_rows, num_heads, head_dim = query.shape
        attend = self._attend_cuda if query.is_cuda else self._attend_cpu
        out = attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), packed_seq_params)  # [t, n, d]
        return out.reshape(seq_len, num_rows, num_heads * head_dim)

    def _attend_cuda(self, query: Tensor, key: Tensor, value: Tensor, spans: DocumentSpans) -> Tensor:
        query, key, value = (x.index_select(0, spans.row_first) for x in (query, key, value))
        out = varlen_attn(
            query,
            key,
            value,
            spans.cu_seqlens_q,
            spans.cu_seqlens_q,
            spans.max_seqlen_q,
            spans.max_seqlen_q,
            scale=self.scale,
            window_size=(-1, 0),  # causal
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out.index_select(0, spans.sequence_first)

    def _attend_cpu(self, query: Tensor, key: Tensor, value: Tensor, spans: DocumentSpans) -> Tensor:
        outs = []
        for flat, num_documents, bucket_len in spans.buckets:
            q, k, v = (
                x.index_select(0, flat).view(num_documents, bucket_len, *x.shape[1:]).transpose(1, 2)
                for x in (query, key, value)
            )  # [documents, heads, bucket_len, d]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
            )
            outs.append(out.transpose(1, 2).reshape(num_documents * bucket_len, *query.shape[1:]))
        return torch.cat(outs).index_select(0, spans.unbucket)
