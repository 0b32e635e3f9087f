"""Files for another layout hold the same checkpoint, and each rank finds its share in few of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from data_pipeline.spec import Template
from janus_mega.checkpoint.claim import claim
from janus_mega.checkpoint.compare import compare
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.format import find_damage
from janus_mega.checkpoint.manager import save_checkpoint
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.checkpoint.reshard import Target, plan_parts, reshard
from janus_mega.checkpoint.state import TrainState
from janus_mega.checkpoint.tensor_file import TensorFile
from janus_mega.checkpoint.trained import companion_files
from janus_mega.cli.main import app
from janus_mega.config.load import dump
from janus_mega.models.sharding import tp_parts
from janus_mega.parallel.layout import Layout
from janus_mega.parallel.slices import Box, Slice, check_coverage
from tests.support.trained import MODEL, make_image_tokenizer, make_tokenizer, random_weights, run_config

LAYOUT = {"world_size": 2, "tp_size": 1, "pp_size": 1, "dp_size": 2, "virtual_pp_size": 1}
TARGETS = {
    "one": Target(1, 1, (2,), 1),
    "dp3": Target(3, 1, (2,), 1),
    "dp3_zero3": Target(3, 1, (2,), 1, cuts_parameters=True),
    "tp2": Target(2, 2, (2,), 1),
    "pp2": Target(2, 1, (1, 1), 2),
    "tp2_dp2_pp2": Target(8, 2, (1, 1), 2),
    "tp2_dp2_zero3": Target(4, 2, (2,), 1, cuts_parameters=True),
}


def whole_slice(name: str, tensor: Tensor) -> Slice:
    return Slice(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with moments, averages, generators of two ranks and all companions, in one file."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer, image_tokenizer = make_tokenizer(folder / "text"), make_image_tokenizer(MODEL, folder / "image")
    weights = random_weights(MODEL)
    trained = [name for name in weights if not name.startswith("understanding")]
    prefixes = ("optimizer.exp_avg/", "optimizer.exp_avg_sq/", "ema/")
    tensors = weights | {prefix + name: torch.randn_like(weights[name]) for prefix in prefixes for name in trained}
    tensors |= {f"rng/{rank:05d}/torch": torch.randint(0, 9, (50,), dtype=torch.uint8) for rank in range(2)}
    state = TrainState(
        step=7,
        consumed_rows=56,
        plan_digest="plan",
        config_text=dump(run_config(MODEL, Template.deepseek, tokenizer)),
        counters={"tokens": 12},
    )
    return save_checkpoint(
        folder / "checkpoints",
        [whole_slice(name, tensor) for name, tensor in tensors.items()],
        state,
        extra_files=companion_files(tokenizer, image_tokenizer),
        about={"layout": LAYOUT},
    )


def shapes_of(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    return {name: reader.shape(name) for name in reader.names}


@pytest.mark.parametrize("name", TARGETS)
def test_every_element_has_one_file_on_a_rank_of_its_place(name: str, source: Path) -> None:
    target, shapes = TARGETS[name], shapes_of(open_checkpoint(source))
    parts = plan_parts(shapes, target)
    assert parts.keys() == shapes.keys()
    loads = [0] * target.world_size
    for tensor, rows in parts.items():
        check_coverage(tensor, shapes[tensor], [box for _, box in rows])
        if tensor.startswith("rng/"):
            continue
        parameter = tensor.split("/")[-1]
        cut = tp_parts(parameter, shapes[tensor], target.tp_size)
        for rank, box in rows:
            layout = Layout(target.world_size, target.tp_size, target.pp_size, rank)
            assert layout.pp_rank == target.pp_rank(parameter)
            _, regions = cut[layout.tp_rank if len(cut) > 1 else 0]
            assert layout.tp_rank == 0 or len(cut) > 1
            assert any(_inside(box, Box(region.global_offset, region.shape)) for region in regions)
            loads[rank] += box.numel * tensor.startswith("ema/")
    for rank, load in enumerate(loads):  # dp ranks of a place hold the same amount of what trains
        mates = [other for other in range(target.world_size) if _place(target, other) == _place(target, rank)]
        assert abs(load - sum(loads[mate] for mate in mates) / len(mates)) <= len(shapes) * target.dp_size


def _inside(box: Box, other: Box) -> bool:
    starts = all(a >= b for a, b in zip(box.offset, other.offset, strict=True))
    return starts and all(a <= b for a, b in zip(box.stop, other.stop, strict=True))


def _place(target: Target, rank: int) -> tuple[int, int]:
    layout = Layout(target.world_size, target.tp_size, target.pp_size, rank)
    return layout.tp_rank, layout.pp_rank


def test_layers_and_ends_live_where_the_pipeline_puts_them() -> None:
    target = Target(2, 1, (1, 2, 2, 1), 2)  # interleaved: layers 0 and 3, 4 on the first rank
    assert [target.pp_rank(f"decoder.layers.{layer}.linear_qkv.weight") for layer in range(6)] == [0, 1, 1, 0, 0, 1]
    assert target.pp_rank("text_embedding.weight") == target.pp_rank("understanding.vision_model.x") == 0
    assert target.pp_rank("decoder.final_layernorm.weight") == target.pp_rank("image_head.fc1.weight") == 1
    with pytest.raises(ValueError, match="decoder.layers.6.x: the model has 6 layers"):
        target.pp_rank("decoder.layers.6.x")


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_checkpoint_in_other_files(name: str, source: Path, tmp_path: Path) -> None:
    target, told = TARGETS[name], []
    found = reshard(open_checkpoint(source), tmp_path / "out", target, progress=lambda *done: told.append(done))
    assert found == tmp_path / "out" / "step-00000007" and find_damage(found) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == [found.name]
    first, second = open_checkpoint(source), open_checkpoint(found)
    comparison = compare(first, second)
    assert comparison.are_equal and comparison.num_equal == len(first.names)
    files = second.manifest["files"]
    assert [file for file in files if file.startswith("tensors-")] == [
        f"tensors-{rank:05d}.safetensors" for rank in range(target.world_size)
    ]
    for file in first.manifest["files"]:
        if "/" in file or file == "config.yaml":
            assert first.read_bytes(file) == second.read_bytes(file)
    assert second.manifest["layout"] == LAYOUT and second.manifest["resharded_for"]["tp_size"] == target.tp_size
    assert told[-1][0] == told[-1][1] == len(first.names)


def test_more_ranks_than_files_that_are_open_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("janus_mega.checkpoint.reshard.FILES_AT_ONCE", 3)
    found = reshard(open_checkpoint(source), tmp_path, TARGETS["tp2_dp2_pp2"])
    assert compare(open_checkpoint(source), open_checkpoint(found)).are_equal


class Readings:
    """Counts what is read of tensor files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.files = 0, set()
        read = TensorFile.read

        def counted(file: TensorFile, key: str, digest: bytes | None) -> Tensor:
            tensor = read(file, key, digest)
            self.bytes += tensor.nbytes
            self.files.add(file.path.name)
            return tensor

        monkeypatch.setattr(TensorFile, "read", counted)

    def take(self) -> tuple[int, set[str]]:
        taken = self.bytes, self.files
        self.bytes, self.files = 0, set()
        return taken


def test_each_stored_piece_is_read_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint(source)
    stored = sum(reader.read(name).nbytes for name in reader.names)
    generators = reader.read_state().rng["torch"].nbytes
    readings = Readings(monkeypatch)
    reshard(open_checkpoint(source), tmp_path, TARGETS["tp2_dp2_pp2"])
    assert readings.take()[0] == stored + generators  # those of rank 0 once more, with its state


@pytest.mark.parametrize("name", ["tp2_dp2_pp2", "tp2_dp2_zero3"])
def test_a_rank_reads_its_share_from_one_file(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, before = TARGETS[name], open_checkpoint(source)
    after = open_checkpoint(reshard(before, tmp_path, target))
    parts = plan_parts(shapes_of(before), target)
    readings = Readings(monkeypatch)
    for rank in range(target.world_size):
        share = 0
        for reader in (after, before):
            views = list(_views(reader, parts, rank))
            reader.fill(views)
            share = sum(view.tensor.nbytes for view in views)
            amount, files = readings.take()
            if reader is after:
                assert (amount, files) == (share, {f"tensors-{rank:05d}.safetensors"})
            else:
                assert amount > 1.5 * share  # what it is for


def _views(reader: CheckpointReader, parts: dict[str, list[tuple[int, Box]]], rank: int) -> Iterator[Slice]:
    for name, rows in parts.items():
        for owner, box in rows:
            if owner == rank and not name.startswith("rng/"):
                yield Slice(name, reader.shape(name), box.offset, torch.zeros(box.shape, dtype=reader.dtype(name)))


def test_damage_is_found_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged" / "step-00000007"
    subprocess.run(["cp", "-r", str(source), str(copy.parent)], check=True) if copy.parent.mkdir() is None else None
    file = copy / "tensors-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="bytes do not match the SHA-256"):
        reshard(open_checkpoint(copy), tmp_path / "out", TARGETS["tp2"])
    assert list((tmp_path / "out").rglob("step-*")) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(3, 3, (2,), 1), "cannot be cut into 3 tp parts; choose another layout"),
        (Target(1, 1, (1,), 1), "the model has 1 layers; choose another layout"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(target: Target, message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        reshard(open_checkpoint(source), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_refused(source: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(source)
    with pytest.raises(UserError, match="holds a checkpoint of step 7 already"):
        reshard(reader, source.parent, TARGETS["tp2"])
    claim(tmp_path / "run")
    with pytest.raises(UserError, match="is the checkpoint folder of a run"):
        reshard(reader, tmp_path / "run", TARGETS["tp2"])


class FullDisk(Disk):
    """Has room for some bytes."""

    room = 100_000

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        super().write(file, content)


def test_a_full_disk_publishes_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        reshard(open_checkpoint(source), tmp_path / "out", TARGETS["tp2"], disk=FullDisk())
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_the_command(source: Path, tmp_path: Path) -> None:
    source_of_text = [f"data.sources.text.{field}" for field in ("path=texts", "task=text", "weight=1")]
    layout = [
        *source_of_text,
        "parallel.tp_size=2",
        "parallel.precision=fp32",
        "stage.trainable=[backbone]",
        "stage.global_batch_size=8",
    ]
    runner = CliRunner()
    done = runner.invoke(
        app,
        ["checkpoint", "reshard", str(source), str(tmp_path / "out"), *layout, "--ranks", "4"],
        catch_exceptions=False,
    )
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == str(tmp_path / "out" / "step-00000007")
    told = json.loads((tmp_path / "out" / "step-00000007" / "manifest.json").read_text())
    assert told["resharded_for"] == {"world_size": 4, "tp_size": 2, "pp_size": 1, "dp_size": 2, "chunks": 1}
    same = runner.invoke(app, ["checkpoint", "diff", str(source), str(tmp_path / "out")])
    assert same.exit_code == 0, same.stdout
    with pytest.raises(UserError, match="tp_size"):
        runner.invoke(
            app,
            ["checkpoint", "reshard", str(source), str(tmp_path / "no"), "parallel.tp_size=3"],
            catch_exceptions=False,
        )


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from janus_mega.checkpoint.manager import save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.reshard import Target, plan_parts, reshard
from janus_mega.checkpoint.state import TrainState
from janus_mega.parallel.slices import Slice

MIB = 2**20
root, layers, rows = Path(sys.argv[1]), 12, 8192  # tensors of 32 MiB
torch.set_num_threads(1)

def peak_since(work):
    Path("/proc/self/clear_refs").write_text("5")
    status = lambda field: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024

def pieces():
    for layer in range(layers):
        tensor = torch.full((rows, 1024), float(layer))
        yield Slice(f"decoder.layers.{layer}.linear_fc2.weight", tuple(tensor.shape), (0, 0), tensor)

state = TrainState(step=1, consumed_rows=1, plan_digest="", config_text="")
save_checkpoint(root / "from", pieces(), state)
target = Target(4, 2, (layers,), 1)
reader = open_checkpoint(root / "from/step-00000001")
warm = reader.read_box("decoder.layers.0.linear_fc2.weight", next(iter(plan_parts({
    "decoder.layers.0.linear_fc2.weight": (rows, 1024)}, target).values()))[0][1])
del warm
reader = open_checkpoint(root / "from/step-00000001")
resharding = peak_since(lambda: reshard(reader, root / "to", target))
parts = plan_parts({name: reader.shape(name) for name in reader.names}, target)
for number, folder in enumerate(("to", "from")):
    reader = open_checkpoint(root / folder / "step-00000001")
    views = [Slice(name, reader.shape(name), box.offset, torch.zeros(box.shape))
             for name, rows in parts.items() for rank, box in rows if rank == 1]
    share = sum(view.tensor.nbytes for view in views) / MIB
    print(folder, share, peak_since(lambda: reader.fill(views)))
print("reshard", 0, resharding)
"""


def test_memory_is_the_share_and_two_tensors(tmp_path: Path) -> None:
    """Resident memory of a fresh process above what it held: 384 MiB of state in tensors of 32 MiB, four ranks."""
    # What is given back to malloc is given back to the system, so that resident memory is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr
    figures = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in done.stdout.splitlines()}
    tensor = 32
    assert figures["to"][0] == figures["from"][0] == 384 / 4
    assert figures["reshard"][1] <= 2.2 * tensor
    # Beside the share, which the process held before.
    assert figures["to"][1] <= 1.2 * tensor
    assert figures["from"][1] <= 1.2 * tensor
