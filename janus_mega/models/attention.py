"""Causal attention inside packed documents: no token sees another document, nothing of size s x s is stored.

`DocumentSpans` is computed once per micro-batch and travels through megatron's layers as their packed-sequence
argument. In half precision on CUDA the spans feed torch's varlen flash attention. That kernel has no fp32, and the CPU
has no such kernel: there documents of similar length are attended together, each padded at its end to its bucket's
length, which causality hides from every real token. Attention is the same function of (query, key, value) either way; a
test compares both with a block mask.

Shapes: `s` seq_len, `b` rows, `n` query heads here, `k` kv heads here, `d` head_dim, `t` = s * b tokens. Flat
positions are sequence-first (position * b + row), as megatron's `[s, b, ...]` tensors flatten; the borders of flash
attention are row-first (row * s + position).
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
"""Lengths documents are padded to in buckets; longer ones to a multiple of the step: what is padded costs its square,
a call of its own next to nothing."""
_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class DocumentSpans(PackedSeqParams):
    """Where documents lie in a micro-batch; `qkv_format` sbhd keeps megatron's own packed paths out of the way."""

    qkv_format: str = "sbhd"
    buckets: list[tuple[Tensor, int, int]] = field(default_factory=list)
    """Per bucket: int64 [documents * length] flat positions of tokens (0 for padding), and both factors. Empty where
    flash attention takes `cu_seqlens_q` and `max_seqlen_q` instead."""
    unbucket: Tensor | None = None
    """int64 [t]: where each flat position's output lies in the concatenated buckets."""


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether varlen flash attention computes in this number format on this device."""
    return device.type == "cuda" and dtype in _FLASH_DTYPES


def document_spans(
    cu_seqlens: Tensor, num_rows: int, seq_len: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> DocumentSpans:
    """Prepares a micro-batch's documents for attention; all that depends on their lengths is decided here, on the host.

    Args:
        cu_seqlens: int32 [documents + 1] on the CPU, borders over the row-first flattened tokens.
        num_rows: b.
        seq_len: s.
        device: where attention will run.
        dtype: what queries, keys and values will be.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    if has_flash(device, dtype):
        return DocumentSpans(
            cu_seqlens_q=cu_seqlens.to(device, non_blocking=True),
            max_seqlen_q=int(lengths.max()),
        )
    tokens = torch.arange(num_rows * seq_len)
    row_first = tokens % seq_len * num_rows + tokens // seq_len
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
        buckets.append((flat.to(device, non_blocking=True), int(chosen.sum()), bucket_len))
        filled += flat.numel()
    return DocumentSpans(buckets=buckets, unbucket=unbucket.to(device, non_blocking=True))


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
        attend = self._attend_flash if packed_seq_params.unbucket is None else self._attend_buckets
        return attend(query, key, value, packed_seq_params).flatten(2)

    def _attend_flash(self, query: Tensor, key: Tensor, value: Tensor, spans: DocumentSpans) -> Tensor:
        """As `forward` [s, b, n, d]; rows are brought together, a view where there is one."""
        seq_len, num_rows, num_heads, head_dim = query.shape
        out = varlen_attn(
            *(x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)),
            spans.cu_seqlens_q,
            spans.cu_seqlens_q,
            spans.max_seqlen_q,
            spans.max_seqlen_q,
            scale=self.scale,
            window_size=(-1, 0),  # causal
            enable_gqa=key.shape[2] != num_heads,
        )
        return out.view(num_rows, seq_len, num_heads, head_dim).transpose(0, 1).contiguous()

    def _attend_buckets(self, query: Tensor, key: Tensor, value: Tensor, spans: DocumentSpans) -> Tensor:
        """As `forward` [s, b, n, d]."""
        if query.is_cuda and key.shape[2] != query.shape[2]:
            # The one SDPA kernel that has fp32 and stores no scores knows no groups of heads.
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
        flat_query, flat_key, flat_value = (x.flatten(0, 1) for x in (query, key, value))  # [t, heads, d]
        outs = []
        for flat, num_documents, bucket_len in spans.buckets:
            q, k, v = (
                x.index_select(0, flat).view(num_documents, bucket_len, *x.shape[1:]).transpose(1, 2)
                for x in (flat_query, flat_key, flat_value)
            )  # [documents, heads, bucket_len, d]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
            )
            outs.append(out.transpose(1, 2).reshape(num_documents * bucket_len, *flat_query.shape[1:]))
        return torch.cat(outs).index_select(0, spans.unbucket).view(query.shape)
