"""One converted model on several GPUs: results/gpu_tensor_parallel/h100.json.

    torchrun --nproc-per-node 2 benchmarks/gpu_tensor_parallel.py

A model of the shape of Llama-3-8B with random weights in bfloat16, its linears replaced by random groups, with 5 % of
the channels of `lrq` open: tokens in a second through the engine for 1 and 16 sequences, as in `gpu_batches`; first
whole on one GPU while the others wait, then cut as `rankgate.hub.sharding` does it. Embeddings are whole on each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from frame import Columns, Content, Row, card, device_name, parser, record, source, start, table
from gpu import DEVICE
from gpu_batches import METHODS, replaced, step
from gpu_decode import PROMPT
from torch import distributed
from transformers import PreTrainedModel

from rankgate.conversion.convert import converted_layers
from rankgate.decoding.loop import fast_generate
from rankgate.hub.sharding import Share, shard_, take_styles

SEQUENCES, COMPARED = (1, 16), 32  # tokens of a text that are compared


def main() -> None:
    arguments = parser(__doc__)
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", device_id=torch.device(DEVICE, rank))
    start(arguments)
    rows = measured(rank, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        record(f"gpu_tensor_parallel/{device_name()}", {"device": card()}, rows)
    else:
        list(rows)
    distributed.destroy_process_group()


def measured(rank: int, processes: int) -> Iterator[Row]:
    for method in ("int4", "lrq"):
        torch.manual_seed(0)
        model = replaced(METHODS[method])
        alone = {count: step(model, count) for count in SEQUENCES} if rank == 0 else {}
        text = greedy(model) if rank == 0 else None
        distributed.barrier()
        names = [name for name, _ in converted_layers(model)]
        shard_(
            model,
            take_styles(names, [], dict(model.tp_plan)),
            Share(rank, processes, distributed.group.WORLD),
        )
        torch.manual_seed(0)  # the same texts everywhere: they end together
        together = {count: step(model, count) for count in SEQUENCES}
        other = greedy(model)
        same = 0 if text is None else int((text == other).cumprod(0).sum())
        for count in SEQUENCES:
            ms = {"ms_alone": alone.get(count), "ms": together[count]}
            yield {"method": method, "gpus": processes, "sequences": count, **ms, "same_tokens": same}
        del model


@torch.inference_mode()
def greedy(model: PreTrainedModel) -> torch.Tensor:
    """The same text's continuation on every process."""
    ids = torch.randint(5, 250, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    text: torch.Tensor = fast_generate(model, ids, max_new_tokens=COMPARED, do_sample=False)[0, PROMPT:]
    return text


def section(content: Content) -> str:
    columns: Columns = {
        "method": lambda r: r["method"],
        "sequences": lambda r: str(r["sequences"]),
        "GPUs": lambda r: str(r["gpus"]),
        "tokens/s": lambda r: f"{1e3 * r['sequences'] / r['ms']:.0f}",
        "on one GPU": lambda r: f"{1e3 * r['sequences'] / r['ms_alone']:.0f}",
        "× one": lambda r: f"{r['ms_alone'] / r['ms']:.2f}",
        f"first {COMPARED} tokens equal": lambda r: str(r["same_tokens"]),
    }
    return f"""## One converted model on several GPUs ({content["settings"]["device"]})

A model of the shape of Llama-3-8B, random weights, bfloat16; every GPU has its part of each converted layer, the sum of
two layers of a block is one all-reduce each. {source(content)}

{table(content["results"], columns)}
"""


if __name__ == "__main__":
    main()
