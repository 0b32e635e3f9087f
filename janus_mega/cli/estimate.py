"""`janus-mega estimate`: what a configuration will cost on some GPUs, before any is asked for."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from janus_mega.estimate.gpus import Gpu
    from janus_mega.estimate.run import Estimate

estimate_app = typer.Typer(rich_markup_mode=None)

GIB = 2**30
SHOWN_LAYOUTS = 20


@estimate_app.command(name="estimate")
def estimate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of a run: a path, or a name under configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values of the file.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the job.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100-40, a100-80, h100-80, h200-141 or b200-180.")] = "h100-80",
    mfu: Annotated[float, typer.Option(help="Share of the peak that a rank reaches while it computes.")] = 0.4,
    search: Annotated[bool, typer.Option("--search", help="Rank the layouts that fit instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Estimate memory, communication and time of a run; or rank the layouts that fit."""
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import RunConfig
    from janus_mega.config.validate import validate_run
    from janus_mega.estimate.gpus import gpu_of
    from janus_mega.estimate.run import estimate as estimate_run
    from janus_mega.estimate.run import ranked

    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu} must lie in (0, 1]; published runs reach 0.2 to 0.5")
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    kind = gpu_of(gpu)
    config = load_config(RunConfig, file, overrides or []).config
    if search:
        found = ranked(config, gpus, kind, mfu)
        if not found:
            raise UserError(f"config {config.name}: no layout fits {gpus} x {gpu}; take more GPUs or larger ones")
        rows = [_row(one) for one in found[:SHOWN_LAYOUTS]]
        print(json.dumps(rows, indent=1) if as_json else "\n".join(_table(rows)))
        return
    validate_run(config, gpus)
    one = estimate_run(config, gpus, kind, mfu)
    print(json.dumps(_report(one, kind), indent=1) if as_json else "\n".join(_lines(one, kind, gpu, mfu)))


def _row(one: "Estimate") -> dict[str, Any]:
    """One line of the ranking."""
    parallel = one.config.parallel
    return {
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "virtual_pp": parallel.virtual_pp_size,
        "zero": parallel.zero_stage,
        "recompute": parallel.recompute.value,
        "peak GiB": round(one.peak_bytes / GIB, 1),
        "bubble": round(one.bubble, 3),
        "step s": round(one.step_s, 3),
        "tokens/s": round(one.tokens_per_s),
        "GPU-hours": round(one.gpu_hours),
    }


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Columns aligned to the right."""
    heads = list(rows[0])
    cells = [heads, *([str(row[head]) for head in heads] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _report(one: "Estimate", gpu: "Gpu") -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    return {
        **_row(one),
        "fits": one.fits(gpu),
        "micro_batches": one.num_micro_batches,
        "step_flops": one.step_flops,
        "communication_s": one.communication_s,
        "saves": asdict(one.saves),
        "ranks": [
            {
                "pp_rank": number,
                "layers": rank.shape.num_layers,
                "parameters": rank.shape.weights,
                "trained": rank.shape.trained,
                "memory": {**rank.memory.parts(), "peak": rank.memory.peak},
                "collectives": {
                    " ".join(key): {"calls": rank.traffic.calls[key], "bytes": rank.traffic.bytes[key]}
                    for key in sorted(rank.traffic.calls)
                },
            }
            for number, rank in enumerate(one.ranks)
        ],
    }


def _lines(one: "Estimate", gpu: "Gpu", gpu_name: str, mfu: float) -> Iterator[str]:
    """The estimate for a reader."""
    verdict = "fits" if one.fits(gpu) else "DOES NOT FIT"
    yield f"{one.config.name} on {one.num_gpus} x {gpu_name}: {verdict}, {one.peak_bytes / GIB:.1f} GiB at the peak"
    parts = list(one.ranks[0].memory.parts())
    memory = [
        {"GiB": part, **{f"stage {n}": f"{r.memory.parts()[part] / GIB:.2f}" for n, r in enumerate(one.ranks)}}
        for part in parts
    ]
    memory.append({"GiB": "peak", **{f"stage {n}": f"{r.memory.peak / GIB:.2f}" for n, r in enumerate(one.ranks)}})
    yield from _table(memory)
    yield "`update` replaces gathered weights, activations, encoder and heads; overhead is a stated constant"
    for number, rank in enumerate(one.ranks):
        for key in sorted(rank.traffic.calls):
            size, calls = rank.traffic.bytes[key] / GIB, rank.traffic.calls[key]
            yield f"stage {number}, {' '.join(key)}: {calls} calls, {size:.3f} GiB a step"
    saves = one.saves
    copied = f"{saves.staging / GIB:.2f} GiB of host memory a rank, at most {saves.node_staging / GIB:.1f} GiB a node"
    yield f"a checkpoint has {saves.checkpoint / GIB:.1f} GiB, {saves.disk / GIB:.1f} GiB of disk are needed; " + (
        f"to write it beside training takes {copied}" if saves.staging else "training waits while it is written"
    )
    yield (
        f"at {mfu:g} MFU while computing: {one.step_s:.3f} s a step ({one.communication_s:.3f} s in collectives if "
        f"nothing hides them, bubble {one.bubble:.1%} of {one.num_micro_batches} micro-batches), "
        f"{one.tokens_per_s:,.0f} tokens/s, {one.gpu_hours:,.0f} GPU-hours for the stage"
    )
