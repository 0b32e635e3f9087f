"""The commands that look at data: what they print, their exit codes, and that bad input ends in one line."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from data_pipeline.explain.replay import BATCHES_FILE
from data_pipeline.stream.dataset import RowDataset
from janus_mega.cli.data import data_app
from janus_mega.config.load import load_config, save
from janus_mega.config.schema import RunConfig
from tests.support.shards import make_shards
from tests.support.tars import tar_of

RUN = """\
name: looked_at
run_dir: {root}/run
model:
  name: tiny
  backbone: {{hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, ffn_hidden_size: 64, vocab_size: 340,
             max_position_embeddings: 192}}
  understanding: {{image_size: 16, patch_size: 4, hidden_size: 16, num_layers: 1, num_heads: 2}}
  image_tokenizer: {{image_size: 16, base_channels: 32, channel_multiplier: [1, 1, 2], num_res_blocks: 1,
                    latent_channels: 32, codebook_size: 256, code_dim: 8}}
data:
  sources:
    text: {{path: {root}/text, task: text, weight: 3}}
    questions: {{path: {root}/questions, task: understanding, weight: 2}}
    drawings: {{path: {root}/drawings, task: generation, weight: 5}}
  text_tokenizer: {root}/text.model
  geometry: {{understanding_size: 16, understanding_tokens: 16, generation_size: 16, generation_tokens: 16,
             codebook_size: 256}}
  seq_len: 192
  window_rows: 32
  guidance_dropout: 0.3
parallel: {{micro_batch_size: 2, precision: fp32, torch_threads: 1}}
optimizer: {{lr: 1e-3, warmup_steps: 0}}
stage: {{name: stage2, num_steps: 12, global_batch_size: 8, trainable: [backbone]}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("looked_at")
    make_shards(root)
    (root / "run.yaml").write_text(RUN.format(root=root))
    return root


@pytest.fixture(scope="module")
def run_dir(root):
    """What a run leaves behind: its configuration, and the hashes of its batches."""
    directory = root / "run"
    directory.mkdir()
    config = load_config(RunConfig, root / "run.yaml").config
    save(config, directory / "config.yaml")
    from data_pipeline.plan.open import open_data
    from data_pipeline.text.load import load_text_tokenizer

    data = open_data(config.data, load_text_tokenizer(config.data.text_tokenizer), global_batch_size=8)
    hashes = [{"step": step, "batch_hash": RowDataset(data).step_hash(step - 1)} for step in range(1, 6)]
    (directory / BATCHES_FILE).write_text("".join(json.dumps(line) + "\n" for line in hashes))
    return directory


def call(*words, code=0):
    result = CliRunner().invoke(data_app, [str(word) for word in words])
    if isinstance(result.exception, UserError):
        assert code == 2 and "\n" not in str(result.exception)
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_inspect(root):
    assert "repeated uids" in call("inspect", root / "text")
    found = json.loads(call("inspect", root / "drawings", "--json"))
    uid = found["examples"][2]["uid"]
    assert found["duplicate_uids"] == 0 and found["images"]["distinct"] == 60 and found["masks"] == {}
    (same,) = json.loads(call("inspect", root / "drawings", "--json", "--uid", uid))["examples"]
    assert same == found["examples"][2]
    assert "no sample has uid" in call("inspect", root / "text", "--uid", "0" * 32, code=2)


def test_verify(root, tmp_path):
    tokenizer = ("--text-tokenizer", root / "text.model")
    assert "as the manifest says" in call("verify", root / "questions", *tokenizer)
    damaged = shutil.copytree(root / "questions", tmp_path / "damaged")
    tar = damaged / "shards" / "000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert "has crc32" not in call("verify", root / "questions")
    lines = call("verify", damaged, code=1).splitlines()
    assert any("sha256" in line for line in lines) and "problems" in lines[-1]
    assert len(json.loads(call("verify", damaged, "--json", code=1))["problems"]) == len(lines) - 1
    assert "data doctor" in call("verify", tmp_path, code=2)


def test_doctor(root, tmp_path):
    assert "nothing that costs samples" in call("doctor", root / "text", root / "questions", root / "drawings")
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of(("a.jpg", b"no picture"), ("b.pyd", b"x")))
    told = call("doctor", tar, code=1)
    assert "[unsafe] pickle" in told and "[stops] undecodable" in told and f"{tar}:0 'a.jpg'" in told
    found = json.loads(call("doctor", tar, "--json", code=1))
    assert found["counts"]["pickle"] == 1 and found["kinds"]["pickle"]["fix"]
    assert "give tars" in call("doctor", tmp_path / "none", code=2)
    assert "--limit 0" in call("doctor", tar, "--limit", 0, code=2)


def test_blame(root, run_dir, tmp_path):
    documents = json.loads(call("blame", root / "run.yaml", "--step", 2, "--world-size", 2, "--json"))
    assert {document["dp_rank"] for document in documents} == {0, 1}
    told = call("blame", run_dir, "--step", 2)
    assert all(document["uid"] in told for document in documents)
    row = documents[0]["row"]
    one = call("blame", run_dir, "--step", 2, "--row", row, "--html", tmp_path / "row.html")
    assert f"row {row}" in one and (tmp_path / "row.html").read_text().count("<details") == 1
    uses = json.loads(call("blame", run_dir, "--uid", documents[0]["uid"], "--json"))
    assert 2 in [use["step"] for use in uses]
    assert "uses in steps 3 to 4" in call(
        "blame", run_dir, "--uid", documents[0]["uid"], "--first-step", 3, "--last-step", 4
    )


@pytest.mark.parametrize("options", [(), ("--world-size", 4, "--workers", 1)])
def test_replay_of_what_was_trained(run_dir, options):
    assert "equal to the batch that was trained" in call("replay", run_dir, "--step", 3, *options)


def test_replay_of_something_else(root, run_dir):
    assert "step 9 is not in it, it holds steps 1 to 5" in call("replay", run_dir, "--step", 9, code=2)
    told = call("replay", run_dir, "data.seed=1", "--step", 3, code=1)
    assert "in the run's log" in told
    printed = call("replay", root / "run.yaml", "--step", 3)
    batch_hash = printed.split()[2]
    assert "equal to the hash expected" in call("replay", root / "run.yaml", "--step", 3, "--expect", batch_hash)
    call("replay", root / "run.yaml", "--step", 3, "--expect", "0" * 64, code=1)


def test_preview(root, run_dir, tmp_path):
    page = tmp_path / "page.html"
    call("preview", run_dir, "--out", page, "--rows", 3, "--samples", 2)
    assert page.read_text().count("<details") == 3
    call("preview", root / "questions", "--out", page)
    assert "What it holds" in page.read_text()
    assert page.stat().st_size < 10_000_000


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("blame", "{root}/run.yaml"), "needs either --step or --uid"),
        (("blame", "{root}/run.yaml", "--step", -1), "counted from 1"),
        (("blame", "{root}/run.yaml", "--step", 1, "--row", 99), "step 1 has no document in this row"),
        (("blame", "{root}/run.yaml", "--step", 1, "--world-size", 3), "world size 3|multiple|divis"),
        (("blame", "{root}", "--step", 1), "holds no config.yaml"),
        (("replay", "{root}/run.yaml"), "needs --step"),
        (("replay", "{root}/run.yaml", "--step", 1, "--world-size", -2), "must be at least 1"),
        (("preview", "{root}/run.yaml", "--step", 0), "--step 0 must be at least 1"),
        (("preview", "{root}/nowhere"), "nowhere"),
        (("verify-vq", "{root}/drawings", "--image-tokenizer", "{root}", "--images", "{root}"), "{root}"),
    ],
)
def test_bad_input_is_one_line(root, tmp_path, words, complaint):
    import re

    given = [str(word).format(root=root) for word in words]
    assert re.search(complaint.format(root=root), call(*given, code=2))
    assert not list(Path(tmp_path).iterdir())
