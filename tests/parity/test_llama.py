"""Our decoder is Llama's: with the same weights, transformers' LlamaModel gives the same hidden states and logits."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from janus_mega.config.schema import BackboneConfig
from janus_mega.models.placement import place_batch
from tests.support.chunks import plain, whole_chunk
from tests.support.ranks import results_of_ranks
from tests.support.tiny import batch_of, tiny_model

BAR = 5e-6  # measured worst 4e-7
ROWS = ["ttt", "tt"]


def run_chunk() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights by global name, hidden states and text logits [s, b, ...]; in a lone rank."""
    chunk, parameters = whole_chunk(tiny_model())
    with torch.no_grad():
        hidden = chunk.hidden_states(place_batch(batch_of(ROWS), torch.device("cpu")))
        logits = chunk.text_head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
    return plain(parameters), hidden, logits


def llama(weights: dict[str, Tensor], backbone: BackboneConfig) -> LlamaForCausalLM:
    """transformers' Llama with our weights."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=backbone.hidden_size,
            num_hidden_layers=backbone.num_layers,
            num_attention_heads=backbone.num_heads,
            num_key_value_heads=backbone.num_kv_heads,
            intermediate_size=backbone.ffn_hidden_size,
            vocab_size=backbone.vocab_size,
            rms_norm_eps=backbone.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": backbone.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    queries = backbone.num_heads // backbone.num_kv_heads
    theirs = {
        "model.embed_tokens.weight": weights["text_embedding.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["text_head.weight"],
    }
    for layer in range(backbone.num_layers):
        ours = {
            name.removeprefix(f"decoder.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        fused = ours["self_attention.linear_qkv.weight"].unflatten(0, (backbone.num_kv_heads, queries + 2, -1))
        gate, up = ours["mlp.linear_fc1.weight"].chunk(2)
        parts = {
            "self_attn.q_proj": fused[:, :queries].flatten(0, 2),
            "self_attn.k_proj": fused[:, queries].flatten(0, 1),
            "self_attn.v_proj": fused[:, queries + 1].flatten(0, 1),
            "self_attn.o_proj": ours["self_attention.linear_proj.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": ours["mlp.linear_fc2.weight"],
            "input_layernorm": ours["input_layernorm.weight"],
            "post_attention_layernorm": ours["pre_mlp_layernorm.weight"],
        }
        theirs |= {f"model.layers.{layer}.{name}.weight": value for name, value in parts.items()}
    model.load_state_dict(theirs, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def ours() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    return results_of_ranks(run_chunk, 1)[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_hidden_states_and_logits_equal_llama(ours: tuple[dict[str, Tensor], Tensor, Tensor], record_property) -> None:
    weights, hidden, logits = ours
    model = llama(weights, tiny_model().backbone)
    batch = batch_of(ROWS)
    seq_len = batch["input_ids"].shape[1]
    borders = batch["cu_seqlens"].tolist()
    worst = 0.0
    for start, stop in pairwise(borders):
        row, inside = start // seq_len, slice(start % seq_len, start % seq_len + stop - start)
        ids = batch["input_ids"][row, inside][None]
        theirs = model(input_ids=ids, output_hidden_states=True)
        worst = max(worst, relative(hidden[inside, row], theirs.hidden_states[-1][0]))
        worst = max(worst, relative(logits[inside, row], theirs.logits[0]))
    record_property("worst", worst)
    assert worst <= BAR


@torch.no_grad()
def test_documents_read_as_one_are_noticed(ours: tuple[dict[str, Tensor], Tensor, Tensor]) -> None:
    weights, hidden, _ = ours
    theirs = llama(weights, tiny_model().backbone).model(input_ids=batch_of(ROWS)["input_ids"][:1])
    second = slice(*batch_of(ROWS)["cu_seqlens"][1:3].tolist())
    assert relative(hidden[second, 0], theirs.last_hidden_state[0, second]) >= 1000 * BAR
