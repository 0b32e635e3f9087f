"""A Janus in plain torch on one device: the reference that the real chunk is compared with.

Written from the equations, not from the library: no megatron, no transformers, no packing tricks. Documents are looped
over one by one, attention is a masked softmax, cross entropy is a log-softmax. It reads weights by their global names,
so it states the checkpoint layout once more: fused projections are taken apart here by hand.

Shapes: `n` tokens of a document, `h` hidden_size, `d` head_dim, `p` patches, `e` encoder width.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.schema import LabelHead, TaskId, TokenKind
from janus_mega.config.schema import ModelConfig

Weights = Mapping[str, Tensor]


def loss_sums(weights: Weights, model: ModelConfig, batch: Mapping[str, Tensor]) -> Tensor:
    """[tasks]: sums of cross entropies of a Batch (data_pipeline.schema.BATCH_KEYS), per task."""
    logits_of = {LabelHead.text: text_logits, LabelHead.image: image_logits}
    sums = [torch.zeros(()) for _ in TaskId]
    for document in documents(batch):
        hidden = hidden_states(weights, model, document)
        for position in range(hidden.shape[0]):
            head = LabelHead(int(document["label_head"][position]))
            if head != LabelHead.none:
                log_probabilities = torch.log_softmax(logits_of[head](weights, hidden[position]), dim=-1)
                task = int(document["label_task"][position])
                sums[task] = sums[task] - log_probabilities[document["labels"][position]]
    return torch.stack(sums)


def documents(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A Batch taken apart into its documents, each with its own pictures; padding is a document too."""
    flat = {name: values.flatten() for name, values in batch.items() if name not in ("cu_seqlens", "pixel_values")}
    pictures = batch["pixel_values"]
    tokens_each = int((flat["token_kind"] == TokenKind.image_und).sum()) // max(1, len(pictures))
    borders = batch["cu_seqlens"].tolist()
    found, used = [], 0
    for start, stop in pairwise(borders):
        document = {name: values[start:stop] for name, values in flat.items()}
        num_pictures = int((document["token_kind"] == TokenKind.image_und).sum()) // max(1, tokens_each)
        document["pixel_values"] = pictures[used : used + num_pictures]
        used += num_pictures
        found.append(document)
    return found


def hidden_states(weights: Weights, model: ModelConfig, document: Mapping[str, Tensor]) -> Tensor:
    """[n, h] after the final norm."""
    backbone = model.backbone
    x = _embed(weights, model, document)
    for layer in range(backbone.num_layers):
        prefix = f"decoder.layers.{layer}."
        normed = _rms_norm(x, weights[f"{prefix}input_layernorm.weight"], backbone.norm_eps)
        x = x + _self_attention(weights, f"{prefix}self_attention.", model, normed)
        normed = _rms_norm(x, weights[f"{prefix}pre_mlp_layernorm.weight"], backbone.norm_eps)
        gate, up = (normed @ weights[f"{prefix}mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"{prefix}mlp.linear_fc2.weight"].T
    return _rms_norm(x, weights["decoder.final_layernorm.weight"], backbone.norm_eps)


def text_logits(weights: Weights, hidden: Tensor) -> Tensor:
    """[..., h] -> [..., text ids]."""
    return hidden @ weights["text_head.weight"].T


def image_logits(weights: Weights, hidden: Tensor) -> Tensor:
    """[..., h] -> [..., image ids]."""
    return _two_layers(weights, "image_head.", hidden)


def _embed(weights: Weights, model: ModelConfig, document: Mapping[str, Tensor]) -> Tensor:
    ids, kind = document["input_ids"], document["token_kind"]
    understood = iter(())
    if len(document["pixel_values"]):
        features = _encode(weights, model, document["pixel_values"])
        understood = iter(_two_layers(weights, "understanding_adaptor.", features).flatten(0, 1))
    vectors = []
    for token, where in zip(ids.tolist(), kind.tolist(), strict=True):
        if where == TokenKind.image_und:
            vectors.append(next(understood))
        elif where == TokenKind.image_gen:
            code = weights["generation_embedding.weight"][token]
            vectors.append(_two_layers(weights, "generation_adaptor.", code))
        else:
            vectors.append(weights["text_embedding.weight"][token])
    return torch.stack(vectors)


def _two_layers(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    inner = x @ weights[f"{prefix}fc1.weight"].T + weights[f"{prefix}fc1.bias"]
    return _gelu(inner) @ weights[f"{prefix}fc2.weight"].T + weights[f"{prefix}fc2.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _self_attention(weights: Weights, prefix: str, model: ModelConfig, x: Tensor) -> Tensor:
    backbone = model.backbone
    head_dim = backbone.hidden_size // backbone.num_heads
    queries_per_kv = backbone.num_heads // backbone.num_kv_heads
    fused = (x @ weights[f"{prefix}linear_qkv.weight"].T).unflatten(-1, (backbone.num_kv_heads, -1, head_dim))
    mask = torch.ones(len(x), len(x)).tril().bool()
    outs = []
    for head in range(backbone.num_heads):
        group = fused[:, head // queries_per_kv]  # [n, queries_per_kv + 2, d]
        query, key, value = group[:, head % queries_per_kv], group[:, -2], group[:, -1]
        if backbone.qk_norm:
            query = _rms_norm(query, weights[f"{prefix}q_layernorm.weight"], backbone.norm_eps)
            key = _rms_norm(key, weights[f"{prefix}k_layernorm.weight"], backbone.norm_eps)
        query, key = _rotate(query, backbone.rope_theta), _rotate(key, backbone.rope_theta)
        scores = (query @ key.T / math.sqrt(head_dim)).masked_fill(~mask, -math.inf)
        outs.append(torch.softmax(scores, dim=-1) @ value)
    return torch.cat(outs, dim=-1) @ weights[f"{prefix}linear_proj.weight"].T


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Turns the pairs (i, i + d/2) of position m by m * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    first, second = x[:, :half], x[:, half:]
    angle = torch.outer(torch.arange(len(x)).float(), theta ** (-torch.arange(half).float() / half))
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


def _encode(weights: Weights, model: ModelConfig, pixels: Tensor) -> Tensor:
    """SigLIP: uint8 [m, 3, H, W] -> [m, p, e]."""
    encoder = model.understanding
    found = {name[22:]: value for name, value in weights.items() if name.startswith("understanding_encoder.")}
    x = pixels.float() / 127.5 - 1
    side = encoder.patch_size
    patches = F.unfold(x, kernel_size=side, stride=side).transpose(1, 2)  # [m, p, 3 * side * side]
    x = patches @ found["embeddings.patch_embedding.weight"].flatten(1).T + found["embeddings.patch_embedding.bias"]
    x = x + found["embeddings.position_embedding.weight"]
    for layer in range(encoder.num_layers):
        prefix = f"encoder.layers.{layer}."
        normed = _norm(found, f"{prefix}layer_norm1", x)
        x = x + _encoder_attention(found, f"{prefix}self_attn.", encoder.num_heads, normed)
        x = x + _two_layers(found, f"{prefix}mlp.", _norm(found, f"{prefix}layer_norm2", x))
    return _norm(found, "post_layernorm", x)


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _encoder_attention(weights: Weights, prefix: str, num_heads: int, x: Tensor) -> Tensor:
    query, key, value = (
        (x @ weights[f"{prefix}{part}_proj.weight"].T + weights[f"{prefix}{part}_proj.bias"])
        .unflatten(-1, (num_heads, -1))
        .transpose(1, 2)
        for part in "qkv"
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    out = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)
    return out @ weights[f"{prefix}projection_layer.weight"].T + weights[f"{prefix}projection_layer.bias"]
