"""All that a run must find again after a stop: what a checkpoint is made of here, and how a start puts it back.

Saving and restoring stand side by side so that a part that is saved and not put back shows. Files and their names are
the business of `saving`; this module gives slices and values, and takes a reader.
"""

from collections.abc import Iterable, Sequence

from data_pipeline.errors import UserError
from janus_mega.checkpoint.reader import CheckpointReader
from janus_mega.checkpoint.state import TrainState
from janus_mega.engine.interface import StatefulEngine
from janus_mega.engine.state import load_weights, moment_slices, restore_masters, restore_moments, weight_slices
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import Slice
from janus_mega.train.health import Health
from janus_mega.train.workload import Recipe, Workload

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
        self.engine = engine
        self._workload = workload
        self._recipe = recipe
        self._shards = shards
        self._health = health

    def weights(self) -> list[Slice]:
        """The fp32 weights this rank is the one to write, enough to run the model; views of the engine's memory."""
        return list(weight_slices(self.engine, self._shards))

    def slices(self) -> list[Slice]:
        """All tensors this rank is the one to write, random generators apart; views of the engine's memory."""
        return [*self.weights(), *moment_slices(self.engine, self._shards)]

    def at(self, step: int) -> TrainState:
        """Where the run stands after `step` steps, beside tensors."""
        order = self._workload.order
        return TrainState(
            step=step,
            consumed_rows=step * self._recipe.global_batch_size,
            plan_digest=order.digest,
            config_text=self._workload.config_text,
            data_cursor=order.cursor(step),
            health=self._health.state(),
        )

    def resume(self, reader: CheckpointReader) -> None:
        """Fills what `build_engine` has not: the optimizer, and what is no tensor. The engine is freshly built."""
        state = reader.read_state()
        self._health.restore(state.health, state.step)
        restore_moments(self.engine, self._shards, self._health.updates, reader.read_box)
        self._workload.order.restore(state.data_cursor)

    def go_back(self, reader: CheckpointReader, step: int) -> None:
        """Puts weights, optimizer and health of an earlier checkpoint in place; step and position in the data stay.

        Collective over: dp.
        """
        state = reader.read_state()
        self._health.go_back(state.health, state.step, step)
        restore_masters(self.engine, self._shards, reader.read_box)
        self.engine.publish_weights()
        restore_moments(self.engine, self._shards, self._health.updates, reader.read_box)


def fill_weights(reader: CheckpointReader, shards: Sequence[ShardedParameter]) -> None:
    """Fills materialised chunks before an engine wraps them.

    Raises:
        UserError: the checkpoint is of another model.
    """
    check_model(reader, shards)
    load_weights(shards, reader.read_box)


def fill_masters(reader: CheckpointReader, engine: StatefulEngine, shards: Sequence[ShardedParameter]) -> None:
    """Fills the fp32 weights of the engine that was built around the chunks."""
    restore_masters(engine, shards, reader.read_box)


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


def check_model(reader: CheckpointReader, shards: Iterable[ShardedParameter]) -> None:
    """Raises UserError where a checkpoint lacks a parameter of this rank or holds it in another shape."""
    known = set(reader.weight_names)
    problems = []
    for shard in shards:
        if shard.name not in known:
            problems.append(f"{shard.name} is missing")
        elif reader.shape(shard.name) != shard.global_shape:
            problems.append(
                f"{shard.name} is {list(reader.shape(shard.name))}, the model has {list(shard.global_shape)}"
            )
    if problems:
        raise UserError(
            f"{reader.directory}: a checkpoint of another model ({len(problems)} parameters differ, "
            f"first: {problems[0]}); change model.* or init_from"
        )
