"""Two run directories, step by step: what differs, from which step on, and what does not count."""

import json
from pathlib import Path

import pytest

from tools.compare_runs import differences, is_of_machine, main, read_steps, relative


def make_run(path: Path, num_steps: int = 4, *, loss_of_3: float = 2.0, hash_of_2: str = "b2") -> Path:
    path.mkdir()
    metrics = [{"step": n, "time_s": path.stat().st_ino + n, "loss": 1.0, "seconds/step": n} for n in range(1, 3)]
    metrics.append({"step": 3, "time_s": 0.0, "loss": loss_of_3})
    metrics += [{"step": n, "loss": None} for n in range(4, num_steps + 1)]
    batches = [{"step": n, "batch_hash": hash_of_2 if n == 2 else f"b{n}"} for n in range(1, num_steps + 1)]
    for name, rows in (("metrics.jsonl", metrics), ("batches.jsonl", batches)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert main([str(a), str(b), "--assert-equal"]) == 0
    assert "equal in all common steps" in capsys.readouterr().out


def test_the_first_step_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", loss_of_3=2.0002, hash_of_2="other")
    assert main([str(a), str(b)]) == 0
    assert main([str(a), str(b), "--assert-equal"]) == 1
    out = capsys.readouterr().out
    assert "first step that differs: 2" in out and "b2 -> other" in out
    found = differences(read_steps(a), read_steps(b), rtol=0.0)
    assert [(d.name, d.first_step, d.num_steps) for d in found] == [("batch_hash", 2, 1), ("loss", 3, 1)]
    assert found[1].largest == pytest.approx(1e-4, rel=1e-3)
    (only,) = differences(read_steps(a), read_steps(b), rtol=1e-3)
    assert only.name == "batch_hash"  # a hash has no tolerance


def test_steps_of_one_run_only_are_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", num_steps=6)
    assert main([str(a), str(b), "--assert-equal"]) == 1
    assert "only B has steps 5, 6" in capsys.readouterr().out


def test_a_resumed_run_counts_its_later_lines(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", loss_of_3=9.0)
    with (b / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 3, "loss": 2.0}) + "\n")
    assert differences(read_steps(a), read_steps(b), rtol=0.0) == []


def test_half_a_line_that_a_kill_left_does_not_count(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    with (b / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "lo')
    assert differences(read_steps(a), read_steps(b), rtol=0.0) == []


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "\ufffd", "7", ""])
def test_a_damaged_line_in_the_middle_is_bad_input(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    lines = (b / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    lines[1] = damage
    (b / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main([str(a), str(b)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"compare_runs: {b / 'metrics.jsonl'}:2: damaged") and said.err.count("\n") == 1
    assert said.out == ""


def test_what_the_machine_decides_is_left_out() -> None:
    machine = ["time_s", "seconds/data", "tokens_per_second", "mfu/palm", "memory/peak_gib", "TFLOP_s"]
    training = ["loss", "loss/text", "grad_norm", "lr", "amount/images", "batch_hash"]
    assert all(map(is_of_machine, machine)) and not any(map(is_of_machine, training))


def test_what_is_no_number_differs() -> None:
    assert relative(float("nan"), 1.0) == relative(None, 1.0) == relative("a", "b") == float("inf")
    assert relative(None, None) == relative(0.0, 0.0) == 0.0
    assert relative(1.0, 2.0) == 0.5


def test_a_directory_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "name a run directory" in capsys.readouterr().err
