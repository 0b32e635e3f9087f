"""All that a run must find again after a stop: what a checkpoint is made of here, and how a start puts it back.

Saving and restoring stand side by side so that a part that is saved and not put back shows. Files and their names are
the business of `saving`; this module gives slices and values, and takes a reader.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.errors import UserError
from janus_mega.checkpoint.reader import EMA_PREFIX, OPTIMIZER_PREFIX, CheckpointReader, open_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.config.schema import OptimizerState
from janus_mega.engine.ema import MovingAverage
from janus_mega.engine.interface import StatefulEngine
from janus_mega.engine.state import held_masters, held_moments, moment_slices, parameter_slices, weight_slices
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.generators import (
    generator_states,
    has_cuda_states,
    reseed_generators,
    restore_generators,
    seed_host_generators,
)
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.messages import gather_bytes
from janus_mega.parallel.slices import Slice
from janus_mega.train.health import Health
from janus_mega.train.totals import Totals
from janus_mega.train.workload import Recipe, Workload

_log = logging.getLogger(__name__)
_DIFFERENCES_TOLD = 4


class LiveState:
    """What a run holds in memory of a checkpoint: read for saving, filled when it starts or goes back."""

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        engine: StatefulEngine,
        shards: Sequence[ShardedParameter],
        health: Health,
    ) -> None:
        """An average of the weights begins here, as the weights that the engine holds."""
        self.engine = engine
        self.totals = Totals()
        decay = recipe.optimizer.ema_decay
        self.average = MovingAverage(engine, shards, decay) if decay else None
        self._workload = workload
        self._recipe = recipe
        self._shards = shards
        self.health = health

    @property
    def shards(self) -> Sequence[ShardedParameter]:
        """The table of this rank's parameters."""
        return self._shards

    def weights(self) -> list[Slice]:
        """The fp32 weights this rank is the one to write, enough to run the model; views of the engine's memory."""
        return list(weight_slices(self.engine, self._shards))

    def slices(self) -> list[Slice]:
        """All tensors this rank is the one to write, random generators apart; views of the engine's memory."""
        averages = self.average.owned() if self.average else []
        return [*self.weights(), *moment_slices(self.engine, self._shards), *averages]

    def outlines(self) -> list[Slice]:
        """As `slices`, for their sizes: nothing is copied for it."""
        averages = self.average.owned() if self.average else []
        weights = weight_slices(self.engine, self._shards, outlines=True)
        return [*weights, *moment_slices(self.engine, self._shards), *averages]

    def at(self, step: int) -> TrainState:
        """Where the run stands after `step` steps, beside tensors of the model. Collective over: dp."""
        order = self._workload.order
        return TrainState(
            step=step,
            consumed_rows=step * self._recipe.global_batch_size,
            plan_digest=order.digest,
            config_text=self._workload.config_text,
            data_cursor=order.cursor(step),
            counters=self.totals.read(self.engine.groups),
            health=self.health.state(),
            rng=generator_states(),
        )

    def resume(self, reader: CheckpointReader) -> None:
        """Fills what `build_engine` has not: the optimizer, and what is no tensor. The engine is freshly built."""
        state = reader.read_state(self.engine.groups.layout.rank)
        self.health.restore(state.health, state.step)
        self._fill_optimizer(reader)
        self._workload.order.restore(state.data_cursor)
        self.totals.restore(state.counters)
        self._restore_generators(reader, state)

    def begin(self) -> None:
        """Puts in place what a run without a checkpoint of its own begins with, weights apart."""
        seed_host_generators(self._recipe.seed)
        if self._recipe.init_from and self._recipe.optimizer_state is OptimizerState.carry:
            self._carry(open_checkpoint(Path(self._recipe.init_from)))

    def _carry(self, reader: CheckpointReader) -> None:
        """Begins a stage with the optimizer of another: its count of updates, moments and average.

        What did not train there has moments of zero and its average begins as its weights. AdamW counts updates once
        for many parameters, so these share the carried count and their moments are not corrected for having begun at
        zero: where the count is large their first update is (1 - beta1) / sqrt(1 - beta2) of the rate (0.45 at 0.9
        and 0.95, 3.2 at 0.9 and 0.999), not 1.
        """
        if not any(name.startswith(OPTIMIZER_PREFIX) for name in reader.names):
            raise UserError(
                f"{reader.directory}: holds no optimizer state to carry; set stage.optimizer_state=fresh, or start "
                "from a checkpoint of a run"
            )
        state = reader.read_state()
        self.health.updates = state.health.get("updates", state.step)
        self._fill_optimizer(reader, known_only=True)

    def go_back(self, reader: CheckpointReader, step: int) -> None:
        """Puts weights, their average, optimizer and health of an earlier checkpoint in place.

        Step, position in the data, totals and generators stay. Collective over: dp.
        """
        state = reader.read_state()
        self.health.go_back(state.health, state.step, step)
        fill_masters(reader, self.engine, self._shards)
        self._fill_optimizer(reader)

    def _fill_optimizer(self, reader: CheckpointReader, *, known_only: bool = False) -> None:
        """Moments as after the updates that health counts, and the average.

        Args:
            reader: the checkpoint.
            known_only: what the checkpoint does not hold stays zero (moments) or as the weights (averages).
        """
        self.engine.create_moments(self.health.updates)
        known = set(reader.names) if known_only else None
        if self.health.updates:
            reader.fill(_known(held_moments(self.engine, self._shards), known))
        if self.average:
            self.average.restart()
            held = self.average.held()
            if known_only or any(name.startswith(EMA_PREFIX) for name in reader.names):
                reader.fill(_known(held, known))
            else:
                _log.info("%s holds no averaged weights; the average begins with its weights", reader.directory)

    def _restore_generators(self, reader: CheckpointReader, state: TrainState) -> None:
        groups = self.engine.groups
        on_cuda = groups.device.type == "cuda"
        if not _same_places(reader, self._recipe, groups.layout.world_size):
            elsewhere = "in another layout"
        elif has_cuda_states(state.rng) != on_cuda:
            elsewhere = "on the CPU" if on_cuda else "on GPUs"
        else:
            restore_generators(state.rng)
            return
        derived = reseed_generators(self._recipe.seed, state.step, groups.layout)
        _log.info(
            "random generators start anew: %s was saved %s; this rank's seed is %d, of seed %d, step %d and its place",
            reader.directory,
            elsewhere,
            derived,
            self._recipe.seed,
            state.step,
        )


def _known(slices: Iterable[Slice], names: set[str] | None) -> list[Slice]:
    return [piece for piece in slices if names is None or piece.name in names]


def _same_places(reader: CheckpointReader, recipe: Recipe, world_size: int) -> bool:
    """Whether each rank stands where the rank of its number stood when the checkpoint was saved."""
    saved, parallel = reader.manifest.get("layout", {}), recipe.parallel
    mine = {"tp_size": parallel.tp_size, "pp_size": parallel.pp_size, "virtual_pp_size": parallel.virtual_pp_size}
    same = all(saved.get(name, size) == size for name, size in mine.items())
    return same and int(saved.get("world_size", reader.manifest["world_size"])) == world_size


def fill_parameters(reader: CheckpointReader, shards: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Fills the parameters of materialised chunks that no optimizer will hold; the others come by `fill_masters`.

    Raises:
        UserError: the checkpoint is of another model. Collective over: world.
    """
    check_model(reader, shards, groups)
    frozen = [shard for shard in shards if not shard.parameter.requires_grad]
    if groups.layout.dp_rank == 0:  # the others hold the same, and a shared disk gives it out once
        reader.fill(parameter_slices(frozen))
    if groups.layout.dp_size > 1:
        for shard in frozen:
            dist.broadcast(shard.parameter.data, dist.get_global_rank(groups.dp, 0), group=groups.dp)


def fill_masters(reader: CheckpointReader, engine: StatefulEngine, shards: Sequence[ShardedParameter]) -> None:
    """Fills the fp32 weights that each rank updates, and brings them to the parameters of all dp ranks.

    So a rank reads its own share, and under bf16 nothing passes through rounded parameters. Collective over: dp.
    """
    reader.fill(held_masters(engine, shards))
    engine.publish_weights()


def check_resume(reader: CheckpointReader, workload: Workload, recipe: Recipe) -> int:
    """The step that a run's own checkpoint stands at.

    Raises:
        UserError: it was made under another data plan.
    """
    state = reader.read_state()
    if state.plan_digest != workload.order.digest:
        raise UserError(
            f"{recipe.run_dir}: its checkpoint at step {state.step} was trained under data plan "
            f"{state.plan_digest[:12]}, the configuration now gives {workload.order.digest[:12]}: "
            f"{_what_differs(workload, recipe)}; restore what differs, or choose another run_dir"
        )
    return state.step


def _what_differs(workload: Workload, recipe: Recipe) -> str:
    differences = workload.order.differences(recipe.run_dir)
    more = f" and {len(differences) - _DIFFERENCES_TOLD} more" if len(differences) > _DIFFERENCES_TOLD else ""
    return ", ".join(differences[:_DIFFERENCES_TOLD]) + more if differences else "sources, ratios, seed or batch size"


def check_model(reader: CheckpointReader, shards: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Compares the names and shapes of a checkpoint with those of the model, over all pipeline ranks.

    Raises:
        UserError: they differ; the same on every rank. Collective over: world.
    """
    names, mine = reader.weight_names, {shard.name: shard.global_shape for shard in shards}
    problems = dict.fromkeys(mine.keys() - set(names), "is not in the checkpoint")
    for name in names:
        if name in mine and reader.shape(name) != mine[name]:
            problems[name] = f"is {list(reader.shape(name))} there, {list(mine[name])} in the model"
    seen = torch.tensor([*(name in mine for name in names), bool(problems)], dtype=torch.int32, device=groups.device)
    dist.all_reduce(seen)
    *holders, with_problems = seen.tolist()
    problems |= {name: "is not in the model" for name, count in zip(names, holders, strict=True) if not count}
    if not with_problems and not problems:
        return
    told = [json.loads(part) for part in gather_bytes(json.dumps(problems).encode(), groups)]
    differ = {name: what for rank in told for name, what in rank.items()}
    first = min(differ)
    raise UserError(
        f"{reader.directory}: a checkpoint of another model: {len(differ)} parameters differ of {len(names)} there, "
        f"first {first}, which {differ[first]}; change model.*, or start from another checkpoint"
    )
