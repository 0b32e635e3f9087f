"""The two normalisations by hand, with counts that are unequal everywhere, over every split of the global batch."""

import pytest
import torch
from torch import Tensor

from janus_mega.config.schema import LossNormalization
from janus_mega.models.losses import loss_scales, task_denominators

NAMES = ("text", "understanding", "generation")
WEIGHTS = {"text": 1.0, "understanding": 2.0, "generation": 0.25}

# Eight micro-batches: loss sums and label counts per task; the second task is missing from half of them.
SUMS = torch.tensor(
    [[30.0, 0, 800], [7, 12, 0], [41, 3, 650], [0, 0, 910], [11, 5, 0], [23, 0, 77], [2, 31, 1204], [19, 0, 0]]
)
COUNTS = torch.tensor(
    [[10, 0, 160], [3, 4, 0], [14, 1, 128], [0, 0, 176], [4, 2, 0], [9, 0, 16], [1, 11, 240], [6, 0, 0]]
)

PER_TOKEN = (133 * 1.0 + 51 * 2.0 + 3641 * 0.25) / (47 + 18 + 720)
PER_TASK = 133 / 47 * 1.0 + 51 / 18 * 2.0 + 3641 / 720 * 0.25


def value_of_split(normalization: LossNormalization, dp_size: int, num_micro_batches: int) -> float:
    """What an engine makes of the micro-batches: sums joined per micro-batch, averaged over them and over dp."""
    scales = loss_scales(task_denominators(COUNTS.sum(0), normalization), NAMES, WEIGHTS, dp_size, num_micro_batches)
    per_micro_batch: Tensor = SUMS.view(dp_size * num_micro_batches, -1, 3).sum(1)
    losses = (per_micro_batch * scales).sum(1)
    return losses.view(dp_size, num_micro_batches).mean(1).mean(0).item()


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("normalization", "expected"),
    [(LossNormalization.per_token, PER_TOKEN), (LossNormalization.per_task, PER_TASK)],
    ids=["per_token", "per_task"],
)
def test_any_split_gives_the_formula(normalization: LossNormalization, expected: float, dp_size: int) -> None:
    for num_micro_batches in (1, 2, 4, 8):
        if dp_size * num_micro_batches <= 8:
            assert value_of_split(normalization, dp_size, num_micro_batches) == pytest.approx(expected, rel=1e-6)


def test_the_two_normalisations_differ() -> None:
    assert abs(PER_TOKEN - PER_TASK) > 1


def test_a_task_without_labels_adds_nothing_and_divides_by_one() -> None:
    for normalization in LossNormalization:
        denominators = task_denominators(torch.tensor([5, 0, 20]), normalization)
        scales = loss_scales(denominators, NAMES, {}, 1, 1)
        assert torch.isfinite(scales).all()
        assert torch.dot(scales, torch.tensor([10.0, 0.0, 0.0])).item() == pytest.approx(
            10 / 25 if normalization == LossNormalization.per_token else 10 / 5
        )
    assert task_denominators(torch.zeros(3, dtype=torch.long), LossNormalization.per_token).tolist() == [1, 1, 1]


def test_tasks_without_a_weight_count_once() -> None:
    scales = loss_scales(torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64), NAMES, {"generation": 3.0}, 1, 1)
    assert scales.tolist() == [0.5, 0.5, 1.5]


def test_counts_beyond_single_precision_stay_exact() -> None:
    many = 2**24 + 1
    assert task_denominators(torch.tensor([many, 0, 0]), LossNormalization.per_token)[0].item() == many
