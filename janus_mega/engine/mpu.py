"""The questions DeepSpeed asks about model parallelism, answered from our groups.

DeepSpeed counts a parameter that is not cut over tp once by asking for the tensor rank, but sums the norm over the
`model_parallel` group. So tensor getters answer tp and model-parallel getters answer tp x pp; a tp-only model group
would clip each pipeline rank by its own norm.
"""

import torch.distributed as dist

from janus_mega.parallel.groups import ProcessGroups


class Mpu:
    """DeepSpeed's `mpu` over a ProcessGroups."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """tp."""
        return self._groups.tp

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank in tp."""
        return self._groups.tp.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of tp."""
        return self._groups.tp.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """tp x pp."""
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        """Rank in tp x pp."""
        return self._groups.model.rank()

    def get_model_parallel_world_size(self) -> int:
        """Size of tp x pp."""
        return self._groups.model.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """dp."""
        return self._groups.dp

    def get_data_parallel_rank(self) -> int:
        """Rank in dp."""
        return self._groups.dp.rank()

    def get_data_parallel_world_size(self) -> int:
        """Size of dp."""
        return self._groups.dp.size()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Size of pp."""
        return self._groups.pp.size()
