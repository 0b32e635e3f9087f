"""Targets: met, missed and absent figures, and a bound that is another figure."""

from janus_mega.demo.targets import RULES, TARGETS, judge_figures

PERFECT = {
    "und_accuracy": 1.0,
    "gen_accuracy": 1.0,
    "gen_cas": 1.0,
    "gen_unique": 1.0,
    "gen_copies": 0.0,
    "pair_accuracy": 1.0,
    "difference_accuracy": 1.0,
    "vq_accuracy": 1.0,
    "text_bpb": 1.5,
    "text_bpb_bigram": 2.0,
    "hf_max_logit_diff": 0.0,
    "hf_greedy_equal": True,
    "layout_max_loss_diff": 0.0,
    "layout_max_norm_diff": 0.0,
    "padding_fraction": 0.0,
    "seconds_total": 1.0,
    "peak_pss_gib": 1.0,
}


def test_every_target_can_be_met_and_missed():
    assert all(verdict.is_met for verdict in judge_figures(PERFECT))
    worst = {
        key: (2e9 if value in (0.0, 1.5) or key.startswith(("sec", "peak")) else 0.0) for key, value in PERFECT.items()
    }
    worst |= {"hf_greedy_equal": False, "text_bpb_bigram": 1.0}
    assert not any(verdict.is_met for verdict in judge_figures(worst))


def test_an_absent_figure_is_missed():
    assert not any(verdict.is_met for verdict in judge_figures({}))
    assert {verdict.value for verdict in judge_figures({})} == {None}


def test_bits_per_byte_must_be_lower_than_the_bigrams_not_equal():
    (verdict,) = (v for v in judge_figures({**PERFECT, "text_bpb": 2.0}) if v.target.key == "text_bpb")
    assert verdict.bound == 2.0 and not verdict.is_met


def test_keys_are_unique_and_rules_known():
    assert len({target.key for target in TARGETS}) == len(TARGETS)
    assert {target.rule for target in TARGETS} <= set(RULES)
