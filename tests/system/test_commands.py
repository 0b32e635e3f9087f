"""The commands one after another, from raw records to a drawing, on a model that learns nothing in two steps.

Every command runs in a fork of this process, which has imported the libraries once and never joins a job itself. What
the numbers must be is tested elsewhere; here every command takes what the one before it wrote, and bad input ends in
one line and exit code 2.
"""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from janus_mega.cli import main as cli
from tests.support.ranks import import_what_ranks_need

pytestmark = [pytest.mark.slow, pytest.mark.dist]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")

TOKENIZER_RUN = """\
name: vq
run_dir: vq
image_tokenizer: {image_size: 16, base_channels: 32, channel_multiplier: [1, 2, 2], num_res_blocks: 1,
                  latent_channels: 32, codebook_size: 256, code_dim: 8}
data: {path: captions.jsonl}
parallel: {precision: fp32, micro_batch_size: 16, torch_threads: 1}
optimizer: {lr: 1e-3}
num_steps: 2
global_batch_size: 16
"""

OVERRIDES = (
    "model.backbone.vocab_size=512",
    "model.image_tokenizer.num_res_blocks=1",
    "model.image_tokenizer.latent_channels=32",
    "data.text_tokenizer=text.model",
    "data.image_tokenizer=vq/image_tokenizer",
    "data.sources.text.path=shards/text",
    "data.sources.understanding.path=shards/und",
    "data.sources.generation.path=shards/gen",
    "stage.num_steps=2",
    "optimizer.warmup_steps=1",
    "logging.log_every=1",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with raw records: 32 pictures with captions and questions, and some prose."""
    place = tmp_path_factory.mktemp("commands")
    (place / "pictures").mkdir()
    random = np.random.default_rng(0)
    captions, questions = [], []
    for number in range(32):
        name, word = f"pictures/{number}.png", WORDS[number % len(WORDS)]
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place / name)
        captions.append({"id": str(number), "image": name, "caption": f"the picture {word}"})
        questions.append({"id": str(number), "image": name, "question": "which picture is it?", "answer": word})
    prose = "\n".join(
        " ".join(random.choice([*WORDS, "reads", "minus", "equals", "the", "of"], 12)) for _ in range(300)
    )
    (place / "prose.txt").write_text(prose)
    for file, records in (("captions.jsonl", captions), ("questions.jsonl", questions)):
        (place / file).write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "vq.yaml").write_text(TOKENIZER_RUN)
    return place


@pytest.fixture(scope="module")
def run(place):
    """Runs a command in a fork; returns its output, or its complaint where another exit code is expected."""
    import_what_ranks_need()

    def run(*words, code=0):
        pid = os.fork()
        if pid == 0:
            _become_command([str(word) for word in words], place)
        _, status = os.waitpid(pid, 0)
        out, err = ((place / name).read_text() for name in ("stdout", "stderr"))
        assert os.waitstatus_to_exitcode(status) == code, f"{words}\n{out}\n{err}"
        return out if code == 0 else err

    return run


def _become_command(words, place):
    """Turns this fork into the command; never returns."""
    code = 1
    try:
        os.chdir(place)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["janus-mega", *words]
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def shards(run):
    """Both tokenizers and one source of every kind."""
    run(
        "tokenizer",
        "train-text",
        "prose.txt",
        "captions.jsonl",
        "questions.jsonl",
        "--out=text.model",
        "--vocab-size=400",
    )
    assert run("tokenizer", "train-image", "vq.yaml").strip() == "vq/image_tokenizer"
    common = ("--text-tokenizer", "text.model")
    assert "text tokens" in run("data", "prepare", "text", "prose.txt", "--out=shards/text", *common)
    assert "32 samples" in run("data", "prepare", "interleaved", "questions.jsonl", "--out=shards/und", *common)
    images = ("--image-tokenizer", "vq/image_tokenizer")
    assert "32 samples" in run("data", "prepare", "t2i", "captions.jsonl", "--out=shards/gen", *common, *images)


@pytest.fixture(scope="module")
def trained(run, shards):
    run("train", "run/tiny_cpu.yaml", *OVERRIDES, "run_dir=run")


@pytest.mark.timeout(300)
def test_the_plan_is_told_before_anything_runs(run, shards):
    report = json.loads(run("data", "plan", "run/tiny_cpu.yaml", *OVERRIDES, "--json"))
    assert report["num_rows"] == 8
    assert {source["name"] for source in report["sources"]} == {"text", "understanding", "generation"}
    assert "padding" in run("data", "plan", "run/tiny_cpu.yaml", *OVERRIDES)


@pytest.mark.parametrize(("source", "kind"), [("text", "text"), ("und", "interleaved"), ("gen", "t2i")])
def test_shards_can_be_looked_into(run, shards, source, kind):
    assert json.loads(run("data", "inspect", f"shards/{source}", "--json"))["kind"] == kind
    assert f"{kind} (janus-shards/1)" in run("data", "inspect", f"shards/{source}")


@pytest.mark.timeout(300)
def test_training_leaves_a_run_directory(run, place, trained):
    assert len((place / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((place / "run" / "events").iterdir())
    assert "step                     2 (8 rows)" in run("describe", "run")
    assert "run/config.yaml:1" in run("config", "run/config.yaml")


@pytest.mark.timeout(300)
def test_the_model_leaves_draws_and_writes(run, place, trained):
    assert run("export", "run", "--out=hf").strip() == "hf"
    assert (place / "hf" / "model.safetensors").is_file()
    assert "exists already" in run("export", "run", "--out=hf", code=2)
    drawn = run("generate", "run", "--caption=the picture one", "--caption=the picture two", "--out=drawn").split()
    for path in drawn:
        with Image.open(place / path) as picture:
            assert picture.size == (16, 16)
    assert len(drawn) == 2
    run("generate", "run", "--question=which picture is it?", "--image=pictures/0.png", "--max-new-tokens=3")
    run("generate", "run", "--beginning=one two", "--max-new-tokens=3")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("train", "run/tiny_cpu.yaml", "paralel.tp_size=2"), "did you mean 'parallel'"),
        (("train", "run/tiny_cpu.yaml", "parallel.tp_size=3", "--ranks=3"), "num_heads 4 is not divisible"),
        (("train", "run/tiny_cpu.yaml", "parallel.pp_size=2", "parallel.zero_stage=2", "--ranks=2"), "zero_stage 2"),
        (("train", "run/tiny_cpu.yaml", *OVERRIDES, "data.sources.text.path=nowhere"), "nowhere/janus.json"),
        (("data", "plan", "run/tiny_cpu.yaml", *OVERRIDES, "data.sources.text.weight=-1"), "weight -1.0"),
        (("data", "prepare", "t2i", "captions.jsonl", "--out=x", "--text-tokenizer=text.model"), "--image-tokenizer"),
        (("generate", "run", "--caption=a", "--question=b"), "exactly one of"),
        (("generate", "run", "--question=what?", "--image=prose.txt"), "prose.txt: it is neither JPEG"),
        (("export", "shards", "--out=x"), "holds no whole checkpoint"),
    ],
)
@pytest.mark.timeout(300)
def test_bad_input_is_one_line(run, place, trained, words, complaint):
    shown = run(*words, code=2)
    assert complaint in shown
    assert len([line for line in shown.splitlines() if line.startswith("janus-mega: ")]) == 1
    assert "Traceback" not in shown
    assert not (place / "x").exists()


@pytest.mark.timeout(300)
def test_a_truncated_tar_stops_training_on_every_rank(run, place, trained, tmp_path):
    (tar,) = (place / "shards" / "und" / "shards").glob("*.tar")
    whole = tar.read_bytes()
    try:
        tar.write_bytes(whole[:-512])
        words = ("train", "run/tiny_cpu.yaml", *OVERRIDES, f"run_dir={tmp_path / 'run'}", "--ranks=2")
        assert "the tar is truncated" in run(*words, code=2)
    finally:
        tar.write_bytes(whole)
    assert not (tmp_path / "run").exists()
