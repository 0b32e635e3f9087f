"""One rank of a GPU test: trains the tiny Janus in a layout, or attends alone, and writes what it saw.

    python -m torch.distributed.run --nproc_per_node N -m tests.gpu.rank_main '{"case": "train", "out": ...}'

Without CUDA the same program runs in fp32 over gloo: that is the reference.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from janus_mega.config.schema import Backend, ParallelConfig, Precision, Recompute
from janus_mega.models.attention import DocumentAttention, document_spans
from janus_mega.parallel.groups import build_groups, destroy_groups, init_distributed
from janus_mega.train.run import build_engine
from tests.support.tiny import STAGE1, STAGE3, TinyWorkload, tiny_recipe

NUM_STEPS = 5
STAGES = {"stage1": STAGE1, "stage3": STAGE3}
BORDERS = (0, 5, 5, 40, 96, 130, 192)
"""Documents of two rows of 96 tokens, one of them empty."""


def train(options: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of five steps, and how far the weights are from where they began."""
    fields = dict(options["parallel"])
    fields["precision"] = Precision(fields.get("precision", "fp32"))
    fields["backend"] = Backend(fields.get("backend", "deepspeed"))
    fields["recompute"] = Recompute(fields.get("recompute", "none"))
    parallel = ParallelConfig(**fields)
    init_distributed()
    groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
    workload = TinyWorkload(STAGES[options["stage"]], parallel)
    engine, _ = build_engine(workload, tiny_recipe(Path(options["out"]), parallel, NUM_STEPS), groups)
    layout = groups.layout
    found: dict[str, Any] = {"device": groups.device.type, "losses": [], "grad_norms": []}
    for batches in workload.batches(layout.dp_rank, layout.dp_size, 0, NUM_STEPS):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        step = engine.train_step([workload.place(batch, groups) for batch in batches], counts, lr=1e-3)
        found["losses"].append(step.loss)
        found["grad_norms"].append(step.grad_norm)
    found["rank"] = layout.rank
    destroy_groups()
    return found


def attend(options: dict[str, Any]) -> dict[str, Any]:
    """Packed attention on the device, in bf16 if asked for (fp32 on the CPU): output and gradients, as lists."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and options["precision"] == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (96, 2, 4, 16), "key": (96, 2, 2, 16), "value": (96, 2, 2, 16)}
    leaves = {
        name: torch.randn(shape, generator=generator).bfloat16().to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    weight = torch.randn((96, 2, 64), generator=generator).bfloat16().to(device, dtype)
    attention = DocumentAttention.__new__(DocumentAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None  # its constructor wants a whole megatron configuration for this one number
    spans = document_spans(torch.tensor(BORDERS, dtype=torch.int32), 2, 96, device, dtype)
    out = attention(**leaves, attention_mask=None, packed_seq_params=spans)
    (out * weight).sum().backward()
    tensors = {"out": out, **{name: leaf.grad for name, leaf in leaves.items()}}
    values = {name: tensor.detach().float().cpu().flatten().tolist() for name, tensor in tensors.items()}
    return {"device": device.type, "rank": 0, **values}


def main() -> None:
    """Rank 0 writes result.json into the directory `out`."""
    options = json.loads(sys.argv[1])
    found = {"train": train, "attend": attend}[options["case"]](options)
    if found["rank"] == 0:
        (Path(options["out"]) / "result.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
