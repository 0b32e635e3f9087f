"""Two checkpoints side by side, by the library and by the command."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from janus_mega.checkpoint.compare import compare
from janus_mega.checkpoint.manager import save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.cli.checkpoint import checkpoint_app
from janus_mega.parallel.slices import Slice

TENSORS = {
    "decoder.layers.0.mlp.linear_fc2.weight": torch.arange(24.0).reshape(6, 4),
    "decoder.final_layernorm.weight": torch.linspace(0, 1, 4),
    "optimizer.exp_avg/decoder.final_layernorm.weight": torch.linspace(1, 2, 4),
}


def save(root: Path, tensors: dict[str, Tensor] = TENSORS, step: int = 3, num_files: int = 1) -> Path:
    slices = []
    for name, tensor in tensors.items():
        for part in range(num_files):  # as if written by that many ranks, one after the other
            rows = tensor[part::num_files] if num_files == 1 else tensor.chunk(num_files)[part]
            offset = (part * -(-tensor.shape[0] // num_files),) + (0,) * (tensor.ndim - 1)
            slices.append(Slice(name, tuple(tensor.shape), offset, rows))
    state = TrainState(step=step, consumed_rows=8 * step, plan_digest="ab12", config_text="name: x\n")
    return save_checkpoint(root, slices, state)


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(checkpoint_app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_how_they_were_cut_makes_no_difference(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other", num_files=2)
    found = compare(open_checkpoint(one), open_checkpoint(other))
    assert found.are_equal and found.num_equal == len(TENSORS)
    assert run("diff", one, other)[0] == 0


def test_every_difference_is_told(tmp_path: Path) -> None:
    changed = {name: tensor.clone() for name, tensor in TENSORS.items()}
    changed["decoder.layers.0.mlp.linear_fc2.weight"][2, 3] += 0.5
    changed["optimizer.exp_avg/decoder.final_layernorm.weight"] = torch.zeros(5)
    changed["text_head.weight"] = torch.zeros(2, 2)
    one, other = save(tmp_path / "one"), save(tmp_path / "other", changed, step=4)
    found = compare(open_checkpoint(one), open_checkpoint(other))
    (tensor,) = found.different
    assert (tensor.name, tensor.num_different, tensor.largest) == ("decoder.layers.0.mlp.linear_fc2.weight", 1, 0.5)
    norm = TENSORS[tensor.name].norm().item()
    assert tensor.relative == pytest.approx(0.5 / norm)
    assert found.only_first == ("optimizer.exp_avg/decoder.final_layernorm.weight",)
    assert set(found.only_second) == {"optimizer.exp_avg/decoder.final_layernorm.weight", "text_head.weight"}
    assert found.state == {"step": (3, 4), "consumed_rows": (24, 32)}
    code, output = run("diff", one, other)
    assert code == 1 and "text_head.weight: only in" in output and "step: 3 and 4" in output


def test_weights_can_be_compared_alone(tmp_path: Path) -> None:
    changed = {**TENSORS, "optimizer.exp_avg/decoder.final_layernorm.weight": torch.zeros(4)}
    one, other = save(tmp_path / "one"), save(tmp_path / "other", changed)
    assert run("diff", one, other)[0] == 1
    assert run("diff", one, other, "--weights")[0] == 0


def test_a_run_is_listed_and_damage_found(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", step=3)
    newest = save(tmp_path / "checkpoints", step=5)
    code, output = run("list", tmp_path)
    assert code == 0 and output.count("bytes\n") == 2 and "2 checkpoints, 0 damaged" in output
    assert run("verify", tmp_path)[0] == 0
    file = newest / "tensors-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, output = run("verify", newest)
    assert code == 1 and file.name in output and "1 damaged" in output
    file.write_bytes(content[:-1])
    assert "1 damaged" in run("list", tmp_path)[1]
    content[-1] ^= 1
    file.write_bytes(content)
    (newest / "stray").write_bytes(b"x")
    code, output = run("verify", newest)
    assert code == 1 and "stray: not listed" in output


def test_what_a_checkpoint_holds_is_told(tmp_path: Path) -> None:
    output = run("inspect", save(tmp_path), "--tensors")[1]
    assert "step 3, 24 rows" in output
    assert "weights" in output and "2 tensors" in output and "28 values" in output
    assert "decoder.layers.0.mlp.linear_fc2.weight  float32 [6, 4]" in output
