"""A run goes on in another layout, ZeRO stage or backend as if it had stayed: the same rows, the same losses.

Compared with the run that stayed, not with one process, so the bar is for the change alone. `JANUS_LAYOUTS=all` makes
every change; without it, some of each kind and a few more that `JANUS_LAYOUT_SEED` picks, by default the commit.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from janus_mega.checkpoint.reader import OPTIMIZER_PREFIX, RNG_PREFIX
from janus_mega.config.schema import Backend
from tests.distributed.layout_runs import BARS, difference
from tests.distributed.resume_runs import STEPS, Case, resumed, saved, told, undisturbed
from tests.support.picked import layout_seed, picked_beside, skip_unless_taken
from tests.support.shards import TinyShards, make_shards
from tests.support.tiny import fp32

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

MEGATRON = Backend.megatron
STOP = 2
LOSS_BAR = 1e-5
LAYOUTS = {
    "one": Case(1, fp32()),
    "dp2": Case(2, fp32()),
    "zero2": Case(2, fp32(zero_stage=2)),
    "zero3": Case(2, fp32(zero_stage=3)),
    "tp2": Case(2, fp32(2, sequence_parallel=True)),
    "pp2": Case(2, fp32(1, 2)),
    "interleaved": Case(2, fp32(1, 2, virtual_pp_size=2)),
    "tp2_dp2": Case(4, fp32(2, sequence_parallel=True, zero_stage=2)),
    "tp2_pp2": Case(4, fp32(2, 2)),
    "megatron_dp2": Case(2, fp32(backend=MEGATRON)),
    "megatron_tp2": Case(2, fp32(2, backend=MEGATRON)),
    "megatron_interleaved": Case(2, fp32(1, 2, virtual_pp_size=2, backend=MEGATRON)),
}
CHANGES = (
    ("rows", "tp2", "one"),
    ("rows", "dp2", "one"),
    ("rows", "dp2", "megatron_dp2"),
    ("rows", "dp2", "zero3"),
    ("rows", "one", "tp2_dp2"),
    ("rows", "one", "megatron_interleaved"),
    ("tiny", "pp2", "tp2"),
    ("tiny", "interleaved", "pp2"),
    ("tiny", "interleaved", "zero2"),
    ("tiny", "zero3", "tp2_pp2"),
    ("tiny", "megatron_tp2", "dp2"),
    ("tiny", "megatron_tp2", "zero3"),
    ("tiny", "tp2_pp2", "one"),
)
"""(rows of a compiled plan or the hard rows of `tiny`, before, after)."""
REPRESENTATIVE = {
    ("rows", "dp2", "zero3"),
    ("rows", "dp2", "megatron_dp2"),
    ("tiny", "interleaved", "zero2"),
    ("tiny", "megatron_tp2", "zero3"),
}
TAKEN = REPRESENTATIVE | picked_beside(REPRESENTATIVE, CHANGES, layout_seed())


class Stayed:
    """Undisturbed runs, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: TinyShards | None = None
        self._runs: dict[tuple[str, str], Path] = {}

    def case(self, rows: str, layout: str) -> Case:
        if rows == "rows" and self._shards is None:
            (self._folder / "shards").mkdir()
            self._shards = make_shards(self._folder / "shards")
        return replace(LAYOUTS[layout], ema=0.7, shards=self._shards if rows == "rows" else None)

    def run(self, rows: str, layout: str) -> Path:
        if (rows, layout) not in self._runs:
            folder = self._folder / rows / layout
            self._runs[rows, layout] = undisturbed(folder, self.case(rows, layout), STOP)
        return self._runs[rows, layout]


@pytest.fixture(scope="module")
def stayed(tmp_path_factory: pytest.TempPathFactory) -> Stayed:
    return Stayed(tmp_path_factory.mktemp("stayed"))


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    """Weights and their averages; moments are in the losses after them."""
    reader = saved(run_dir)
    return {name: reader.read(name) for name in reader.names if not name.startswith((OPTIMIZER_PREFIX, RNG_PREFIX))}


@pytest.mark.parametrize("change", CHANGES, ids="-".join)
def test_a_run_goes_on_in_another_layout(
    change: tuple[str, str, str], stayed: Stayed, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    skip_unless_taken(change, TAKEN)
    rows, before, after = change
    source = stayed.run(rows, before)
    run_dir = resumed(tmp_path / "rest", source, STOP, stayed.case(rows, after))
    found, expected = told(run_dir), told(source, after=STOP)
    assert found.keys() == expected.keys() and len(found) == STEPS - STOP
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        for name, value in values.items():
            if not name.startswith(("loss", "grad_norm")):
                assert found[step][name] == value, (step, name)  # rows, rates, amounts, totals: exactly
    losses = [
        abs(found[step][name] - value) / abs(value or 1.0)
        for step, values in expected.items()
        for name, value in values.items()
        if name.startswith(("loss", "grad_norm"))
    ]
    record_property("loss", max(losses))
    assert max(losses) <= LOSS_BAR
    figure = difference(weights_of(run_dir), weights_of(source))
    record_property("weights", figure)
    assert figure <= BARS["weights"]


def test_generators_begin_anew_in_another_layout(stayed: Stayed, tmp_path: Path) -> None:
    """The same seeds whenever the change is made, and other ones than those that were saved."""
    source = stayed.run("tiny", "interleaved")
    after = replace(stayed.case("tiny", "one"), last_step=STOP + 1)
    runs = [resumed(tmp_path / str(number), source, STOP, after) for number in range(2)]
    first, second = (saved(run_dir, STOP + 1).read_state(0).rng for run_dir in runs)
    kept = saved(source, STOP).read_state(0).rng
    assert first.keys() == second.keys() == kept.keys()
    for generator in first:
        assert torch.equal(first[generator], second[generator])
        assert not torch.equal(first[generator], kept[generator])


def test_changes_are_many() -> None:
    assert len(CHANGES) >= 12 and set(CHANGES) >= REPRESENTATIVE
    seen = [picked_beside(REPRESENTATIVE, CHANGES, seed) for seed in range(60)]
    assert all(len(picked) == 2 for picked in seen) and set.union(*seen) == set(CHANGES) - REPRESENTATIVE
    assert {before for _, before, _ in CHANGES} | {after for _, _, after in CHANGES} == set(LAYOUTS)
