"""The traps of ZeRO under megatron's schedules: each remedy, taken away, must show.

A bar that a known bug would pass is no bar. Every trap here is run once as the code stands (within the bars of
test_layouts, there or here) and once with its remedy taken away in the forked ranks, which must miss a bar by at least
FACTOR, or end in an error where the trap is a crash or a hang. The numbers beside the cases are measured multiples of
the bar.
"""

import faulthandler
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from janus_mega.config.schema import Backend, Module, ParallelConfig, Precision
from janus_mega.config.validate import parallel_rules
from janus_mega.engine import deepspeed_backend, megatron_backend
from janus_mega.engine import step as step_module
from janus_mega.engine.mpu import Mpu
from janus_mega.models import janus
from janus_mega.models.janus import JanusChunk
from janus_mega.models.pathways import WayIn
from janus_mega.models.placement import PlacedBatch
from janus_mega.parallel import replicated
from janus_mega.parallel.replicated import REPLICATED_RULES, ReplicatedRule
from tests.distributed.layout_runs import LayoutRun, Variant, compare, over_bar, run_layout
from tests.support.tiny import STAGE3, fp32, tiny_model

pytestmark = pytest.mark.dist

FACTOR = 5
SHORT = 2
"""Steps of a disturbed run; in the second, half of the rows have no image to understand."""
THREE = 3
"""Steps of the bf16 runs, which are slow on a CPU."""
QK_NORM = tiny_model(qk_norm=True)
Runner = Callable[..., LayoutRun]
Measure = Callable[..., float]


def bf16(tp_size: int = 1, pp_size: int = 1, **options: Any) -> ParallelConfig:
    return replace(fp32(tp_size, pp_size, **options), precision=Precision.bf16)


@pytest.fixture
def measure(record_property: Callable[[str, object], None]) -> Measure:
    """`measure(run, one)`: multiples of the bar of the worst figure, or of those named; kept in the test record."""

    def over(disturbed: LayoutRun, one: LayoutRun, *keys: str) -> float:
        figures = compare(disturbed, one)
        value = over_bar({key: figures[key] for key in keys or figures})
        record_property("over_bar", f"{value:.3g} {' '.join(keys)}")
        return value

    return over


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """`run(world_size, parallel, trainable, **variant)`; undisturbed runs in one process are kept."""
    kept: dict[str, LayoutRun] = {}

    def start(
        world_size: int, parallel: ParallelConfig, trainable: tuple[Module, ...] = STAGE3, **variant: Any
    ) -> LayoutRun:
        key = repr((world_size, parallel, trainable, variant))
        if key not in kept or "patch" in variant:
            path: Path = tmp_path_factory.mktemp("run")
            kept[key] = run_layout(path, world_size, parallel, trainable, Variant(**variant))
        return kept[key]

    return start


def without_rules(*rules: ReplicatedRule) -> Callable[[], None]:
    def patch() -> None:
        replicated.REPLICATED_RULES = tuple(rule for rule in REPLICATED_RULES if rule not in rules)

    return patch


def with_deepspeed_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    original = deepspeed_backend.deepspeed_config

    def changed(*args: Any) -> dict[str, Any]:
        config = original(*args)
        change(config)
        return config

    def patch() -> None:
        deepspeed_backend.deepspeed_config = changed

    return patch


EVERY_RULE = fp32(2, sequence_parallel=True, split_encoder=True, micro_batch_size=2)  # an image for either rank


def test_replicated_gradients_are_summed_over_tp(run: Runner, measure: Measure) -> None:
    one = run(1, fp32(), model=QK_NORM)
    assert measure(run(2, EVERY_RULE, model=QK_NORM, num_steps=SHORT), one) <= 1  # 0.07


@pytest.mark.parametrize("rule", REPLICATED_RULES, ids=lambda rule: rule.pattern.strip("*"))
def test_trap_one_replicated_gradient_not_summed(rule: ReplicatedRule, run: Runner, measure: Measure) -> None:
    disturbed = run(2, EVERY_RULE, model=QK_NORM, num_steps=SHORT, patch=without_rules(rule))
    assert measure(disturbed, run(1, fp32(), model=QK_NORM)) >= FACTOR  # 67,000 to 97,000


def test_trap_sequence_parallel_norm_gradients_not_summed(run: Runner, measure: Measure) -> None:
    disturbed = run(2, fp32(2, sequence_parallel=True), patch=without_rules(*REPLICATED_RULES))
    assert measure(disturbed, run(1, fp32()), "norm") >= FACTOR  # 36 after five steps, 3 after two


def test_trap_qk_norm_gradients_not_summed_without_sequence_parallelism(run: Runner, measure: Measure) -> None:
    one = run(1, fp32(), model=QK_NORM)
    assert measure(run(2, fp32(2), model=QK_NORM, num_steps=SHORT), one) <= 1  # 0.07
    disturbed = run(2, fp32(2), model=QK_NORM, num_steps=SHORT, patch=without_rules(*REPLICATED_RULES))
    assert measure(disturbed, one) >= FACTOR  # 97,000


def test_trap_gather_for_heads_sums_gradients_again(run: Runner, measure: Measure) -> None:
    def patch() -> None:
        gather = janus.gather_from_sequence_parallel_region
        janus.gather_from_sequence_parallel_region = lambda hidden, **_: gather(hidden)

    disturbed = run(2, fp32(2, sequence_parallel=True), num_steps=SHORT, patch=patch)
    assert measure(disturbed, run(1, fp32())) >= FACTOR  # 76,000


def test_trap_model_parallel_group_is_tp_only(run: Runner, measure: Measure) -> None:
    def patch() -> None:
        Mpu.get_model_parallel_group = lambda self: self._groups.tp

    disturbed = run(2, fp32(1, 2), num_steps=SHORT, patch=patch)
    assert measure(disturbed, run(1, fp32()), "norm") >= FACTOR  # 29,000
    # Each pipeline rank clips by its own norm: 43,000.
    assert measure(disturbed, run(1, fp32()), "gradients") >= FACTOR


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero2_and_3_with_a_pipeline_are_refused(zero_stage: int) -> None:
    assert list(parallel_rules(fp32(1, 2, zero_stage=1), world_size=2)) == []
    (message,) = parallel_rules(fp32(1, 2, zero_stage=zero_stage), world_size=2)
    assert f"zero_stage {zero_stage}" in message and "pp_size 2" in message


def test_zero0_is_refused() -> None:
    (message,) = parallel_rules(fp32(zero_stage=0), world_size=1)
    assert "zero_stage 0" in message


def test_trap_zero2_with_a_pipeline(run: Runner) -> None:
    with pytest.raises(ProcessRaisedException, match=r"(?s)copy_grads_in_partition.*'NoneType' .* attribute 'view'"):
        run(2, fp32(1, 2, zero_stage=2), num_steps=SHORT, timeout_s=20.0)


@pytest.mark.parametrize("parallel", [bf16(), bf16(1, 2)], ids=["dp2", "pp2"])
def test_bf16_over_dp_and_pp_equals_one_process(parallel: ParallelConfig, run: Runner, measure: Measure) -> None:
    assert measure(run(2, parallel, num_steps=THREE), run(1, bf16(), num_steps=THREE)) <= 1  # 3e-5


BF16_REMEDIES: dict[str, tuple[int, ParallelConfig, Callable[[dict[str, Any]], Any]]] = {
    "fp32_communication": (2, bf16(), lambda config: config.pop("communication_data_type")),
    "fp32_accumulation": (1, bf16(), lambda config: config.pop("data_types")),
}


@pytest.mark.parametrize("remedy", BF16_REMEDIES)
def test_trap_bf16_sums_in_bf16(remedy: str, run: Runner, measure: Measure) -> None:
    world_size, parallel, change = BF16_REMEDIES[remedy]
    disturbed = run(world_size, parallel, num_steps=SHORT, patch=with_deepspeed_config(change))
    assert measure(disturbed, run(1, bf16(), num_steps=THREE)) >= FACTOR  # 330 and 460


def test_trap_bf16_gradients_wait_for_an_epilogue_under_a_pipeline(run: Runner) -> None:
    patch = with_deepspeed_config(lambda config: config["bf16"].pop("immediate_grad_update"))
    with pytest.raises(ProcessRaisedException, match="got a gradient"):
        run(2, bf16(1, 2), num_steps=SHORT, patch=patch, timeout_s=20.0)


def test_trap_managed_accumulation(run: Runner, measure: Measure) -> None:
    patch = with_deepspeed_config(lambda config: config.update(managed_gradient_accumulation=True))
    assert measure(run(1, fp32(), num_steps=SHORT, patch=patch), run(1, fp32())) >= FACTOR  # 140,000


def test_trap_schedule_sees_the_deepspeed_engine(run: Runner) -> None:
    def patch() -> None:
        deepspeed_backend.ScheduledChunk = lambda chunk, forward, number: forward.func

    with pytest.raises(ProcessRaisedException, match=r"(?s)forward_backward_no_pipelining.*'dict' .* 'timers'"):
        run(1, fp32(), num_steps=1, patch=patch)


ONLY_LAST_RANK = (Module.image_head,)
THREE_RATES = (Module.understanding_adaptor, Module.generation_embedding, Module.image_head)
RATES = {"lr_scales": {"understanding_adaptor": 0.5, "generation_embedding": 0.25}}


class WithoutAnchors(nn.Module):
    """Stands in for AnchoredChunks: hands DeepSpeed whatever groups this rank has parameters for."""

    def __init__(self, chunks: list, groups: list, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        groups[:] = [group for group in groups if group.parameters]

    def forward(self, micro_batch: Any, chunk_no: int = 0) -> Tensor:
        return self.chunks[chunk_no](micro_batch)


def without_anchors() -> None:
    deepspeed_backend.AnchoredChunks = WithoutAnchors


def test_pipeline_rank_with_nothing_to_train_equals_one_process(run: Runner, measure: Measure) -> None:
    assert measure(run(2, fp32(1, 2), ONLY_LAST_RANK), run(1, fp32(), ONLY_LAST_RANK)) <= 1


def test_trap_pipeline_rank_with_nothing_to_train(run: Runner) -> None:
    with pytest.raises(ProcessRaisedException, match="empty parameter list"):
        run(2, fp32(1, 2), ONLY_LAST_RANK, num_steps=1, patch=without_anchors, timeout_s=20.0)


def test_groups_that_are_empty_on_a_rank_equal_one_process(run: Runner, measure: Measure) -> None:
    assert measure(run(2, fp32(1, 2), THREE_RATES, optimizer=RATES), run(1, fp32(), THREE_RATES, optimizer=RATES)) <= 1


def test_trap_ranks_bring_different_groups(run: Runner, tmp_path: Path) -> None:
    """Both ranks come to the update of the first step, and not both past it: the norm is reduced once per group."""

    def patch() -> None:
        without_anchors()
        update = deepspeed_backend.DeepSpeedEngine._update

        def telling(*args: Any) -> float:
            (tmp_path / f"came-{dist.get_rank()}").touch()
            norm = update(*args)
            (tmp_path / f"left-{dist.get_rank()}").touch()
            return norm

        deepspeed_backend.DeepSpeedEngine._update = telling

    with pytest.raises(TimeoutError):
        run(2, fp32(1, 2), THREE_RATES, optimizer=RATES, num_steps=1, patch=patch, timeout_s=6.0)
    assert sorted(path.name for path in tmp_path.glob("came-*")) == ["came-0", "came-1"]
    assert len(list(tmp_path.glob("left-*"))) < 2


def without_dummies(walk_in: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Ways into the stream that are walked only by what is there."""

    def only_real_items(self: JanusChunk, way: WayIn, batch: PlacedBatch) -> Tensor | None:
        return walk_in(self, way, batch) if way.items(batch).shape[0] else None

    return only_real_items


def test_trap_modality_absent_on_one_dp_rank(run: Runner) -> None:
    def patch() -> None:
        faulthandler.disable()  # gloo aborts the rank; its Python stacks would only fill the log
        JanusChunk._walk_in = without_dummies(JanusChunk._walk_in)

    # gloo refuses buckets of different sizes; other backends would wait for ever
    with pytest.raises(ProcessExitedException, match="SIGABRT"):
        run(2, fp32(), num_steps=SHORT, patch=patch, timeout_s=20.0)


def test_trap_losses_scaled_by_local_counts(run: Runner, measure: Measure) -> None:
    class OnlyCountsStayLocal:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def all_reduce(self, tensor: Tensor, **options: Any) -> None:
            if tensor.dtype != torch.int64:
                dist.all_reduce(tensor, **options)

    def patch() -> None:
        step_module.dist = OnlyCountsStayLocal()

    disturbed = run(2, fp32(), num_steps=SHORT, patch=patch)
    assert measure(disturbed, run(1, fp32())) >= FACTOR  # 260,000


def test_trap_megatron_decays_vectors_without_multipliers(run: Runner, measure: Measure) -> None:
    """megatron leaves it to its own scheduler to spare vectors the decay."""

    def patch() -> None:
        overrides = megatron_backend._overrides

        def decay_all(groups: Any) -> Any:
            return {key: {**value, "wd_mult": 1.0} for key, value in overrides(groups).items()}

        megatron_backend._overrides = decay_all

    disturbed = run(1, fp32(backend=Backend.megatron), patch=patch)
    assert measure(disturbed, run(1, fp32())) >= FACTOR


def test_trap_interleaving_over_two_ranks_with_batched_messages(run: Runner, measure: Measure) -> None:
    """Messages of both directions between the same two ranks are matched by their order, and so exchanged."""

    def patch() -> None:
        plain = janus.transformer_config

        def batched(*args: Any) -> Any:
            config = plain(*args)
            config.overlap_p2p_comm, config.batch_p2p_comm = False, True
            return config

        janus.transformer_config = batched

    disturbed = run(2, fp32(1, 2, virtual_pp_size=2), patch=patch)
    assert measure(disturbed, run(1, fp32())) >= FACTOR
