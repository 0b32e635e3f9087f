"""Our engine on one process, and the same modules in a bare torch loop: what lies between is the framework's cost."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from janus_mega.config.schema import (
    LossConfig,
    LossNormalization,
    ModelConfig,
    Module,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from janus_mega.engine.deepspeed_backend import DeepSpeedEngine
from janus_mega.engine.megatron_backend import MegatronEngine
from janus_mega.engine.step import EngineSettings
from janus_mega.models.backbone import compile_layers
from janus_mega.models.init import initialize
from janus_mega.models.janus import MODULE_ATTRIBUTES, build_chunks
from janus_mega.models.losses import loss_scales, task_denominators
from janus_mega.models.placement import TASKS, count_labels, place_batch
from janus_mega.models.sharding import sharded_parameters
from janus_mega.optim.param_groups import build_param_groups
from janus_mega.parallel.groups import ProcessGroups

Batches = Sequence[dict[str, Tensor]]


def build_whole(model: ModelConfig, groups: ProcessGroups) -> tuple[Any, dict[str, Tensor]]:
    """A chunk that is the whole model, with fresh weights, and its parameters by global name."""
    parallel = ParallelConfig(precision=Precision.fp32)
    (chunk,) = build_chunks(model, parallel, LossConfig(), groups.layout)
    chunk.to_empty(device=groups.device)
    shards = list(sharded_parameters([chunk], groups.layout))
    initialize(shards, model.backbone, seed=0)
    chunk.set_input_tensor([None])
    return chunk, {shard.name: shard.parameter for shard in shards}


class OurTraining:
    """An engine as a run builds it: DeepSpeed, ZeRO-1, or megatron's."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        groups: ProcessGroups,
        batches: Batches,
        *,
        compiled: bool = False,
        engine: type[DeepSpeedEngine] | type[MegatronEngine] = DeepSpeedEngine,
    ) -> None:
        chunk, parameters = build_whole(model, groups)
        if compiled:
            compile_layers(chunk.decoder)
        self.weights = {name: value.detach().clone() for name, value in parameters.items()}
        self._groups, self._lr = groups, optimizer.lr
        num_rows, seq_len = batches[0]["input_ids"].shape
        parallel = ParallelConfig(precision=Precision.fp32, micro_batch_size=num_rows)
        names = {module.value: attribute for module, attribute in MODULE_ATTRIBUTES.items()}
        param_groups = build_param_groups([chunk], names, [module.value for module in Module], optimizer)
        settings = EngineSettings(parallel, optimizer, TASKS, seq_len)
        self._engine = engine([chunk], param_groups, groups, settings, _scaler(len(batches)))

    def step(self, batches: Batches) -> float:
        """One update, placing included; returns the loss."""
        counts = torch.stack([count_labels(batch) for batch in batches]).sum(0)
        placed = [place_batch(batch, self._groups.device) for batch in batches]
        return self._engine.train_step(placed, counts, self._lr).loss


class BareTraining:
    """The same modules, batches and arithmetic without engine: forward, backward, clip, AdamW."""

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, groups: ProcessGroups) -> None:
        self._chunk, parameters = build_whole(model, groups)
        self._parameters = list(parameters.values())
        self._groups, self._clip = groups, optimizer.clip_grad_norm
        betas = (optimizer.beta1, optimizer.beta2)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=optimizer.lr, betas=betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )

    def step(self, batches: Batches) -> float:
        """One update, placing included; returns the loss."""
        counts = torch.stack([count_labels(batch) for batch in batches]).sum(0)
        scales = _scaler(len(batches))(counts) / len(batches)
        total = 0.0
        for batch in batches:
            loss = torch.dot(self._chunk(place_batch(batch, self._groups.device)), scales)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


def _scaler(num_micro_batches: int) -> Any:
    def scale(global_counts: Tensor) -> Tensor:
        denominators = task_denominators(global_counts, LossNormalization.per_token)
        return loss_scales(denominators, TASKS, {}, 1, num_micro_batches)

    return scale
