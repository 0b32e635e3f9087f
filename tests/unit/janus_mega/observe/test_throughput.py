"""FLOPs against published figures and against products counted by torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from janus_mega.config.load import load_section
from janus_mega.config.schema import Module, Recompute, RunConfig
from janus_mega.observe.throughput import (
    Convention,
    StepCounts,
    backbone_forward_flops,
    encoder_forward_flops,
    mfu,
    module_forward_flops,
    peak_flops,
    step_flops,
    tokens_per_s,
    training_flops,
)

EVERYTHING = frozenset(Module)
BACKBONE_ONLY = StepCounts(tokens=1)


def model_of(name):
    return load_section(RunConfig, "model", f"model/{name}.yaml")


@pytest.mark.parametrize(
    ("name", "backbone_gf", "text_head_gf", "image_head_gf"),
    [("janus_1b", 8.6, 1.26, 0.23), ("janus_pro_7b", 39.4, 2.5, 0.5)],
)
def test_published_flops_per_trained_token(name, backbone_gf, text_head_gf, image_head_gf):
    model = model_of(name)

    def gigaflops(counts):
        return training_flops(model, counts, EVERYTHING, seq_len=4096) / 1e9

    assert gigaflops(BACKBONE_ONLY) == pytest.approx(backbone_gf, rel=0.005)
    assert gigaflops(StepCounts(tokens=0, text_labels=1)) == pytest.approx(text_head_gf, rel=0.01)
    assert gigaflops(StepCounts(tokens=0, image_labels=1)) == pytest.approx(image_head_gf, rel=0.02)


def test_siglip_forward_is_the_measured_381_gigaflops():
    assert encoder_forward_flops(model_of("janus_1b").understanding) / 1e9 == pytest.approx(381, rel=0.005)


def test_palm_counts_twice_the_attention_of_causal():
    backbone = model_of("tiny").backbone
    causal, palm = (backbone_forward_flops(backbone, 256, convention) for convention in Convention)
    assert palm - causal == 4 * 2 * 128 * 256  # layers * 2 * hidden_size * seq_len


def test_closed_form_equals_the_products_that_torch_counts():
    """One gated layer by hand, whole-row attention, on the meta device."""
    backbone, seq_len = model_of("tiny").backbone, 64
    width, ffn = backbone.hidden_size, backbone.ffn_hidden_size
    x = torch.empty(seq_len, width, device="meta")
    with FlopCounterMode(display=False) as counter:
        for shape in [(width, width)] * 4 + [(width, ffn)] * 2:
            x @ torch.empty(shape, device="meta")
        torch.empty(seq_len, ffn, device="meta") @ torch.empty(ffn, width, device="meta")
        scores = x @ x.t()
        scores @ x
    expected = counter.get_total_flops() * backbone.num_layers / seq_len
    assert backbone_forward_flops(backbone, seq_len, Convention.palm) == expected


def test_frozen_modules_cost_less():
    model, seq_len = model_of("tiny"), 64
    counts = StepCounts(tokens=64, understanding_images=1, generation_tokens=16, text_labels=8, image_labels=16)
    forward = module_forward_flops(model, counts, seq_len)

    def cost(*trainable):
        return training_flops(model, counts, trainable, seq_len)

    total = sum(forward.values())
    assert cost() == total
    assert cost(*Module) == 3 * total
    assert cost(Module.text_head) == total + 2 * forward[Module.text_head]
    # An adaptor that trains: gradients cross backbone and heads, not the other pathway.
    crossed = forward[Module.backbone] + forward[Module.text_head] + forward[Module.image_head]
    assert cost(Module.understanding_adaptor) == total + crossed + 2 * forward[Module.understanding_adaptor]


def test_rates():
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
    assert tokens_per_s(1000, 2.0) == 500
    assert tokens_per_s(1000, 0.0) == 0
    assert mfu(flops=312e12, seconds=4.0, num_devices=2, device_peak_flops=312e12) == pytest.approx(0.125)


def test_every_convention_in_use_has_its_name():
    """One row of two documents of half its length, worked through by hand."""
    model, seq_len = model_of("tiny"), 64
    counts = StepCounts(tokens=seq_len)

    def flops(recompute=Recompute.none, trainable=EVERYTHING):
        squared = 2 * 32**2
        return step_flops(model, counts, trainable, seq_len, squared_lengths=squared, recompute=recompute)

    products = 3 * seq_len * backbone_forward_flops(model.backbone, 0, Convention.palm)
    attention = 3 * seq_len * backbone_forward_flops(model.backbone, seq_len, Convention.palm) - products
    plain = flops()
    assert plain["mfu_palm"] == products + attention
    assert plain["mfu_causal"] == products + attention / 2
    assert plain["mfu_documents"] == products + attention / 4
    assert plain["hfu"] == plain["mfu_palm"]
    assert flops(Recompute.full)["hfu"] == pytest.approx(plain["hfu"] * 4 / 3)
    assert flops(Recompute.selective)["hfu"] == pytest.approx(plain["hfu"] + attention / 3)
    assert flops(Recompute.full)["mfu_palm"] == plain["mfu_palm"]
    without_graph = flops(Recompute.full, trainable=())
    assert without_graph["hfu"] == without_graph["mfu_palm"]
