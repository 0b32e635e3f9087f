"""Each rule is broken once; what is legal next to it passes; several broken rules are reported together."""

import pytest

from data_pipeline.errors import UserError
from janus_mega.config.load import load_config
from janus_mega.config.schema import RunConfig, TokenizerRunConfig
from janus_mega.config.validate import RUN_RULES, run_problems, tokenizer_run_problems, validate_any, validate_run


def problems(*overrides, world_size=1):
    return list(run_problems(load_config(RunConfig, "run/tiny_cpu.yaml", overrides).config, world_size))


def test_the_plain_run_is_legal():
    assert problems() == []


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["parallel.tp_size=2", "parallel.sequence_parallel=true"], 2),
        (["parallel.tp_size=4"], 4),
        (["parallel.pp_size=4", "parallel.micro_batch_size=1"], 4),
        (["parallel.zero_stage=3"], 2),
        (["parallel.tp_size=2", "parallel.pp_size=2", "parallel.zero_stage=1"], 4),
        (["data.sources.text.weight=0"], 1),
        (["data.sources.text.weight=0", "data.sources.text.schedule=[{at: 9, weight: 1, shape: cosine}]"], 1),
        (["data.sources.text.schedule=[{at: 9, weight: 0, shape: linear}, {at: 9.5, weight: 2}]"], 1),
        (["data.sources.text.max_epochs=0.5", "data.sources.text.on_exhausted=reweight"], 1),
        (["data.sources.generation.captions=one", "data.sources.text.masks=[a, b]", "data.temperature=3"], 1),
        (["stage.stop_at_step=50"], 1),
        (["optimizer.lr_scales={understanding_encoder: 0.1}"], 1),
    ],
)
def test_legal_neighbours_pass(overrides, world_size):
    assert problems(*overrides, world_size=world_size) == []


TP3 = ["parallel.tp_size=3"]


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (TP3, 3, ["num_heads 4", "tp_size 3", "set parallel.tp_size to 1 or 2"]),
        (TP3, 3, ["num_kv_heads 4", "tp_size 3"]),
        (TP3, 3, ["ffn_hidden_size 352", "tp_size 3"]),
        (TP3, 3, ["vocab_size 2048", "tp_size 3", "set it to 2049"]),
        (TP3, 3, ["codebook_size 256", "tp_size 3"]),
        (["parallel.pp_size=8"], 8, ["pp_size 8", "num_layers 4"]),
        (["parallel.tp_size=2"], 3, ["world size 3", "multiple of 2"]),
        (["parallel.zero_stage=2", "parallel.pp_size=2"], 2, ["zero_stage 2", "pp_size 2", "need pp_size 1"]),
        (["parallel.zero_stage=3", "parallel.pp_size=2"], 2, ["zero_stage 3", "pp_size 2"]),
        (["parallel.zero_stage=2", "parallel.backend=megatron"], 2, ["zero_stage 2", "backend megatron"]),
        (["parallel.virtual_pp_size=2"], 1, ["virtual_pp_size 2", "no pipeline to interleave"]),
        (["parallel.pp_size=2", "parallel.pipeline_layers=[1,2]"], 2, ["pipeline_layers [1, 2]", "that sum to"]),
        (["parallel.zero_stage=4"], 1, ["zero_stage 4 is not 1, 2 or 3"]),
        (["parallel.sequence_parallel=true"], 1, ["sequence_parallel needs parallel.tp_size > 1"]),
        (
            ["parallel.sequence_parallel=true", "parallel.tp_size=2", "data.seq_len=255"],
            2,
            ["seq_len 255", "tp_size 2"],
        ),
        (["parallel.micro_batch_size=3"], 1, ["global_batch_size 4", "micro_batch_size 3", "multiple of 3"]),
        (["stage.global_batch_size=4"], 4, ["global_batch_size 4", "dp_size 4", "multiple of 8"]),
        (["parallel.micro_batch_size=0"], 1, ["micro_batch_size 0 must be at least 1"]),
        (["data.seq_len=17"], 1, ["seq_len 17", "20 tokens"]),
        (["data.seq_len=2048"], 1, ["seq_len 2048", "max_position_embeddings 1024"]),
        (["data.geometry.understanding_tokens=9"], 1, ["understanding_tokens is 9, the model makes it 16"]),
        (["data.geometry.codebook_size=512"], 1, ["codebook_size is 512, the model makes it 256"]),
        (["model.understanding.patch_size=8", "data.geometry.understanding_tokens=4"], 1, ["2x2", "4x4", "equal"]),
        (["model.understanding.patch_size=5"], 1, ["image_size 16", "patch_size 5"]),
        (["model.understanding.num_heads=3"], 1, ["understanding.hidden_size 64", "num_heads 3"]),
        (["model.backbone.num_heads=3"], 1, ["hidden_size 128", "num_heads 3"]),
        (["model.backbone.num_heads=128", "model.backbone.num_kv_heads=128"], 1, ["head width 1", "odd"]),
        (["model.backbone.num_kv_heads=3"], 1, ["num_heads 4", "num_kv_heads 3"]),
        (["model.backbone.num_layers=0"], 1, ["num_layers 0 must be at least 1"]),
        (["model.image_tokenizer.base_channels=20"], 1, ["20 channels", "32 norm groups"]),
        (["model.image_tokenizer.channel_multiplier=[]"], 1, ["channel_multiplier is empty"]),
        (["model.image_tokenizer.image_size=18"], 1, ["image_size 18", "divisible by 4"]),
        (["model.image_tokenizer.codebook_size=70000"], 1, ["codebook_size 70000", "65536"]),
        (["data.sources.text.weight=-1"], 1, ["data.sources.text.weight -1.0"]),
        (["data.sources.text.weight=.nan"], 1, ["data.sources.text.weight nan"]),
        (["data.sources.text.weight=.inf"], 1, ["data.sources.text.weight inf"]),
        (
            [f"data.sources.{name}.weight=0" for name in ("text", "understanding", "generation")],
            1,
            ["every weight is 0"],
        ),
        (["data.sources.text.schedule=[{at: 5, weight: -1}]"], 1, ["text.schedule[0].weight -1.0"]),
        (["data.sources.text.schedule=[{at: 0, weight: 1}]"], 1, ["text.schedule[0].at 0 must be above 0"]),
        (
            ["data.sources.text.schedule=[{at: 9, weight: 1}, {at: 5, weight: 1}]"],
            1,
            ["text.schedule[1].at 5 must be after the point before it, 9"],
        ),
        (["data.sources.text.schedule=[{at: .inf, weight: 1}]"], 1, ["text.schedule[0].at inf"]),
        (
            [
                f"data.sources.{name}.schedule=[{{at: {at}, weight: 0}}]"
                for name, at in (("text", 5), ("understanding", 9), ("generation", 7))
            ],
            1,
            ["every weight is 0 from step 9 on"],
        ),
        (["data.sources.text.max_epochs=-1"], 1, ["text.max_epochs -1.0"]),
        (["data.sources.text.masks=[small, dup, small]"], 1, ["text.masks names small more than once"]),
        (["data.sources.text.captions=one"], 1, ["text.captions is one", "task is text"]),
        (["data.temperature=-1"], 1, ["temperature -1.0"]),
        (["data.max_broken_samples=-1"], 1, ["max_broken_samples -1"]),
        (["data.guidance_dropout=1.5"], 1, ["guidance_dropout 1.5"]),
        (["data.num_workers=-1"], 1, ["num_workers -1"]),
        (["loss.task_weights.drawing=1"], 1, ["'drawing' is no task", "generation, text, understanding"]),
        (["loss.task_weights.text=-1"], 1, ["task_weights.text -1.0"]),
        (
            ["loss.task_weights={text: 0, understanding: 0, generation: 0}"],
            1,
            ["gives 0 to every task in the mixture"],
        ),
        (["optimizer.lr=0"], 1, ["lr 0.0 must be positive"]),
        (["optimizer.warmup_steps=101"], 1, ["warmup_steps 101", "100"]),
        (["optimizer.beta2=1"], 1, ["beta2 1.0"]),
        (["optimizer.clip_grad_norm=-1"], 1, ["clip_grad_norm -1.0"]),
        (["optimizer.lr_scales={spine: 2}"], 1, ["'spine' is no module", "backbone"]),
        (["optimizer.lr_scales={backbone: 0}"], 1, ["lr_scales.backbone 0.0"]),
        (["stage.trainable=[]"], 1, ["trainable is empty"]),
        (["stage.trainable=[backbone, backbone]"], 1, ["backbone more than once"]),
        (["stage.num_steps=0", "optimizer.warmup_steps=0"], 1, ["num_steps 0"]),
        (["stage.stop_at_step=101"], 1, ["stop_at_step 101"]),
        (["stage.optimizer_state=carry"], 1, ["optimizer_state carry needs", "stage.init_from"]),
        (["logging.log_every=0"], 1, ["log_every 0"]),
        (["checkpoint.keep_last=0"], 1, ["keep_last 0"]),
    ],
)
def test_each_rule_speaks(overrides, world_size, words):
    found = problems(*overrides, world_size=world_size)
    assert any(all(word in line for word in words) for line in found), found
    assert all("\n" not in line for line in found)


def test_a_run_without_sources_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "include: [model/tiny.yaml]\nname: x\nrun_dir: x\ndata: {text_tokenizer: t, seq_len: 64}\n"
        "optimizer: {lr: 1}\nstage: {name: s, num_steps: 1, global_batch_size: 1, trainable: [backbone]}\n"
    )
    config = load_config(RunConfig, path).config
    assert list(run_problems(config, 1)) == [
        "data.sources is empty; give at least one source as data.sources.NAME.path=..."
    ]


def test_a_source_that_gets_its_weight_later_counts_as_mixed():
    only_text = ["loss.task_weights={text: 1, understanding: 0, generation: 0}"]
    only_text += [f"data.sources.{name}.weight=0" for name in ("text", "understanding")]
    assert any("gives 0 to every task" in line for line in problems(*only_text))
    assert problems(*only_text, "data.sources.text.schedule=[{at: 9, weight: 1}]") == []


def test_all_broken_rules_are_reported_together():
    config = load_config(RunConfig, "run/tiny_cpu.yaml", ["optimizer.lr=-1", "stage.trainable=[]"]).config
    with pytest.raises(UserError) as caught:
        validate_run(config)
    lines = str(caught.value).splitlines()
    assert lines[0] == "config tiny_cpu: 2 rules are broken:"
    assert len(lines) == 3


def test_one_broken_rule_is_one_line():
    config = load_config(RunConfig, "run/tiny_cpu.yaml", ["optimizer.lr=-1"]).config
    with pytest.raises(UserError, match=r"^config tiny_cpu: optimizer\.lr -1\.0 must be positive and finite$"):
        validate_any(config)


def test_the_rules_are_named_once():
    assert len(RUN_RULES) == len(set(RUN_RULES))


@pytest.fixture
def tokenizer_run(tmp_path):
    path = tmp_path / "vq.yaml"
    path.write_text(
        "name: vq\nrun_dir: vq\ndata: {path: raw}\noptimizer: {lr: 1e-3}\nnum_steps: 5\nglobal_batch_size: 8\n"
        "image_tokenizer: {image_size: 16, base_channels: 32, channel_multiplier: [1, 2, 2], codebook_size: 256}\n"
    )

    def found(*overrides, world_size=1):
        return list(tokenizer_run_problems(load_config(TokenizerRunConfig, path, overrides).config, world_size))

    return found


def test_a_tokenizer_run_has_rules_too(tokenizer_run):
    assert tokenizer_run() == []
    assert tokenizer_run(world_size=2) == []
    assert "an image tokenizer is replicated" in tokenizer_run("parallel.tp_size=2", world_size=2)[0]
    assert "global_batch_size 8" in tokenizer_run(world_size=3)[0]
    assert "codebook_size 1 " in tokenizer_run("image_tokenizer.codebook_size=1")[0]
