"""The job script of training with stand-ins for SLURM's commands: what each exit code of srun leads to."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

JOB = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "stage1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8"}

SRUN = """#!/bin/bash
printf '%s\\n' "$MASTER_ADDR:$MASTER_PORT" "$@" >srun.called
trap -p TERM USR1 >srun.ignores
[ -e signalled ] && kill -USR1 $PPID $(ps -o ppid= -p $PPID) && /bin/sleep 0.3
exit $(cat srun.code)
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'node1\\nnode2\\n' && exit
[ -e refusing ] && rm refusing && exit 1
echo "$@" >>requeued
"""
SLEEP = "#!/bin/bash\n[ $1 -lt 600 ] || kill -KILL $PPID\n"  # SLURM ends the script while it waits to be queued again


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    return tmp_path


def submit(repository: Path, folder: Path, code: int, *arguments: str, **environ: str) -> tuple[int, bool]:
    """Returns the script's exit code and whether the job was queued again."""
    (folder / "srun.code").write_text(str(code))
    (folder / "requeued").unlink(missing_ok=True)
    if not (folder / "sleep").exists():
        (folder / "sleep").write_text(SLEEP)
        (folder / "sleep").chmod(stat.S_IRWXU)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")} | environ
    ended = subprocess.run(
        ["bash", str(repository / "slurm" / "train.sbatch"), *arguments],
        env={**environ, **JOB, "PATH": f"{folder}:{environ['PATH']}"},
        cwd=folder,
        capture_output=True,
        check=False,
        timeout=30,
    )
    return ended.returncode, (folder / "requeued").exists()


def test_ranks_are_told_where_to_meet_and_what_to_train(repository: Path, folder: Path) -> None:
    assert submit(repository, folder, 0, "run.yaml", "run_dir=a b") == (0, False)
    called = (folder / "srun.called").read_text().splitlines()
    assert called[0] == "node1:20042"
    assert (folder / "srun.ignores").read_text() == ""
    assert called[1:] == [
        "--cpus-per-task=8", "--kill-on-bad-exit=0", "--wait=60", "janus-mega", "train", "run.yaml", "run_dir=a b",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [75, 77, 130, 138, 143])
def test_a_stopped_run_is_queued_again_however_often(repository: Path, folder: Path, code: int) -> None:
    assert all(submit(repository, folder, code) == (-9, True) for _ in range(8))
    assert (folder / "requeued").read_text() == "requeue 42\n"


@pytest.mark.parametrize("code", [2, 76, 78])
def test_what_needs_a_person_is_not_queued_again(repository: Path, folder: Path, code: int) -> None:
    assert submit(repository, folder, code) == (code, False)


@pytest.mark.parametrize("code", [1, 86, 134, 135, 137, 139])
def test_crashes_are_limited(repository: Path, folder: Path, code: int) -> None:
    assert [submit(repository, folder, code)[1] for _ in range(7)] == [True] * 5 + [False] * 2
    for ended_well in (75, 0):
        submit(repository, folder, ended_well)
        assert [submit(repository, folder, code)[1] for _ in range(6)] == [True] * 5 + [False]


@pytest.mark.parametrize("code", [0, 2])
def test_a_signal_to_the_whole_job_waits_for_the_ranks(repository: Path, folder: Path, code: int) -> None:
    (folder / "signalled").touch()
    assert submit(repository, folder, code) == (code, False), "the code is srun's, not that of an interrupted wait"


def test_a_stop_in_between_does_not_hide_crashes(repository: Path, folder: Path) -> None:
    assert [submit(repository, folder, code)[1] for code in (*(1, 77) * 5, 1)] == [True] * 10 + [False]


def test_a_crash_after_an_hour_is_the_first_in_a_row(repository: Path, folder: Path) -> None:
    assert all(submit(repository, folder, 1, SECONDS="3600") == (-9, True) for _ in range(7))


def test_a_refused_requeue_is_tried_again(repository: Path, folder: Path) -> None:
    (folder / "refusing").touch()
    assert submit(repository, folder, 75) == (-9, True)


def test_a_meeting_place_that_was_chosen_is_kept(repository: Path, folder: Path) -> None:
    submit(repository, folder, 0, MASTER_ADDR="here", MASTER_PORT="1")
    assert (folder / "srun.called").read_text().splitlines()[0] == "here:1"
