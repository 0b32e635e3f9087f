"""The chunk is the equations: loss sums and every gradient equal those of a twin in plain torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data_pipeline.schema import TokenKind
from janus_mega.models.placement import place_batch
from tests.support import oracle
from tests.support.chunks import plain, whole_chunk
from tests.support.ranks import results_of_ranks
from tests.support.tiny import batch_of, tiny_model

BAR = 1e-5
LOSS_BAR = 1e-6  # measured worst 1.2e-7
FACTOR = 5
"""A twin that is wrong on purpose misses the bars at least this many times."""
COEFFICIENTS = torch.tensor([0.01, 0.02, 0.005])
"""Weights of the three sums in the number that is differentiated: unequal, so that a swapped task shows."""

CPU = torch.device("cpu")
BATCHES = {
    "mixed": ["uug", "tgt"],
    "nothing_understood": ["tgt", "gtg"],
    "nothing_drawn": ["utu"],
    "text": ["ttt"],
}
CASES = {
    **{name: (rows, False, 4096) for name, rows in BATCHES.items()},
    "qk_norm": (BATCHES["mixed"], True, 4096),
    "scored_in_chunks": (BATCHES["mixed"], False, 7),
}
"""Rows, qk_norm, chunk_tokens."""

Result = tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]


def run_chunk(rows: list[str], qk_norm: bool, chunk_tokens: int) -> Result:
    """Weights, loss sums and gradients by global name; in a lone rank."""
    chunk, parameters = whole_chunk(tiny_model(qk_norm), chunk_tokens)
    sums = chunk(place_batch(batch_of(rows), CPU))
    torch.dot(sums, COEFFICIENTS).backward()
    return plain(parameters), sums.detach(), {name: parameter.grad for name, parameter in parameters.items()}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Result]:
    (result,) = results_of_ranks(run_chunk, 1, *CASES[request.param])
    return request.param, result


def run_twin(weights: dict[str, Tensor], batch: dict[str, Tensor], qk_norm: bool) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    sums = oracle.loss_sums(leaves, tiny_model(qk_norm), batch)
    torch.dot(sums, COEFFICIENTS).backward()
    return sums.detach(), {name: leaf.grad if leaf.grad is not None else leaf * 0 for name, leaf in leaves.items()}


def worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest |difference| / |expected| and its name. Key biases of the encoder shift all scores of a query alike, so
    their gradient is rounding around zero; it is measured by that of the query biases."""
    assert found.keys() == expected.keys()
    ratios = []
    for name, gradient in expected.items():
        size = expected[name.replace("k_proj.bias", "q_proj.bias")].norm().item()
        ratios.append(((found[name] - gradient).norm().item() / (size or 1.0), name))
    return max(ratios)


def worst_loss(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs() / expected.abs().clamp(min=1.0)).max().item()


def test_loss_and_gradients_equal_the_twin(case: tuple[str, Result], record_property) -> None:
    name, (weights, sums, gradients) = case
    rows, qk_norm, _ = CASES[name]
    twin_sums, twin_gradients = run_twin(weights, batch_of(rows), qk_norm)
    loss, (gradient, where) = worst_loss(sums, twin_sums), worst_gradient(gradients, twin_gradients)
    record_property("loss", loss)
    record_property("gradient", f"{gradient} {where}")
    assert loss <= LOSS_BAR
    assert gradient <= BAR, where  # measured worst 2e-6


def test_absent_pathways_get_gradients_of_exactly_zero(case: tuple[str, Result]) -> None:
    name, (_, _, gradients) = case
    rows = "".join(CASES[name][0])
    absent = {"u": ("understanding_",), "g": ("generation_", "image_head.")}
    prefixes = tuple(prefix for kind, prefixes in absent.items() if kind not in rows for prefix in prefixes)
    for parameter, gradient in gradients.items():
        assert (gradient.abs().sum() == 0) == parameter.startswith(prefixes), parameter


def swap_halves(name: str, dim: int) -> Callable[[dict, dict], None]:
    def disturb(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        weights[name] = torch.cat(weights[name].chunk(2, dim)[::-1], dim)

    return disturb


def join_documents(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    borders = batch["cu_seqlens"]
    batch["cu_seqlens"] = torch.cat((borders[:1], borders[2:]))


def shift_labels(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    batch["labels"] = batch["labels"].roll(1, dims=1)


def text_where_drawn(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    kind = batch["token_kind"]
    batch["token_kind"] = torch.where(kind == TokenKind.image_gen, int(TokenKind.text), kind)


def swap_images(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    batch["pixel_values"] = batch["pixel_values"].flip(0)


DISTURBANCES = {
    "gate_and_up": swap_halves("decoder.layers.1.mlp.linear_fc1.weight", 0),
    "kv_groups": swap_halves("decoder.layers.2.self_attention.linear_qkv.weight", 0),
    "joined_documents": join_documents,
    "shifted_labels": shift_labels,
    "wrong_pathway": text_where_drawn,
    "order_of_images": swap_images,
}


@pytest.fixture(scope="module")
def mixed() -> Result:
    (result,) = results_of_ranks(run_chunk, 1, *CASES["mixed"])
    return result


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_wrong_twin_is_noticed(disturbance: str, mixed: Result, record_property) -> None:
    weights, sums, gradients = dict(mixed[0]), *mixed[1:]
    batch = batch_of(BATCHES["mixed"])
    DISTURBANCES[disturbance](weights, batch)
    twin_sums, twin_gradients = run_twin(weights, batch, qk_norm=False)
    gradient, _ = worst_gradient(gradients, twin_gradients)
    record_property("over_bar", gradient / BAR)
    assert worst_loss(sums, twin_sums) >= FACTOR * LOSS_BAR
    assert gradient >= FACTOR * BAR


def second_document(batch: dict[str, Tensor]) -> tuple[slice, dict[str, Tensor]]:
    """Where the second document of a one-row batch lies, and a batch of it alone; documents have an image each."""
    start, stop = batch["cu_seqlens"][1:3].tolist()
    alone = {name: values[:, start:stop] for name, values in batch.items() if values.ndim == 2}
    alone["cu_seqlens"] = torch.tensor([0, stop - start], dtype=torch.int32)
    alone["pixel_values"] = batch["pixel_values"][1:2]
    return slice(start, stop), alone


def hidden_of_second() -> list[Tensor]:
    """Hidden states of a row's second document: as it is, beside other documents, alone; in a lone rank."""
    chunk, _ = whole_chunk(tiny_model())
    batch = batch_of(["uut"])
    where, alone = second_document(batch)
    beside_others = {name: values.clone() for name, values in batch.items()}
    beside_others["pixel_values"][0] = 255 - batch["pixel_values"][0]
    for outside in (slice(0, where.start), slice(where.stop, None)):
        beside_others["input_ids"][:, outside] = batch["input_ids"][:, outside].flip(1)

    def hidden(of: dict[str, Tensor]) -> Tensor:
        return chunk.hidden_states(place_batch(of, CPU)).detach()

    return [hidden(batch)[where], hidden(beside_others)[where], hidden(alone)]


def test_a_document_does_not_depend_on_its_row(record_property) -> None:
    ((together, beside_others, alone),) = results_of_ranks(hidden_of_second, 1)
    assert torch.equal(together, beside_others)
    difference = ((together - alone).norm() / alone.norm()).item()
    record_property("difference", difference)
    assert difference <= 1e-6  # measured 0
