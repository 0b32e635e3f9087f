"""The place of this process in a job that srun started, in the variables that torch and everybody here reads.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK itself. srun numbers its tasks in variables of its own, and knows of no
address where ranks meet: that is asked for, not guessed.
"""

import os
from collections.abc import MutableMapping

from data_pipeline.errors import UserError


def take_srun_place(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK by srun's variables.

    Does nothing in a step of one task, and where a launcher has set them already (torchrun under srun).

    Raises:
        UserError: the ranks have nowhere to meet.
    """
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if num_tasks == 1 or "RANK" in environ:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UserError(
            f"srun started {num_tasks} tasks, and no {' and no '.join(missing)} says where they meet; "
            'before srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
            "MASTER_PORT=29500"
        )
    environ.update(RANK=environ["SLURM_PROCID"], WORLD_SIZE=str(num_tasks), LOCAL_RANK=environ["SLURM_LOCALID"])
